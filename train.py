"""SafeDiffusion-R1: post-train a text-to-image diffusion model online, with GRPO and a CLIP steering reward.

One epoch: draw P prompts, sample G pictures of each with the policy (sample.py), score them (reward.py), turn
scores into advantages within each prompt's group, take some clipped steps on the recorded transitions
(grpo.py), log, save.

Departures from the paper (arXiv 2605.18719) and from its released code, with reasons in the README:
 1. exact KL to the frozen base, which the released code lacks; unsafe prompts alone are steered by default
 2. stored latents are float32: what is scored is what is trained on, so the ratio of the first update is 1
 3. the last two transitions are left out: at T = 50 one of them carries half of the gradient's variance
 4. P = 8 prompts and 2 updates per rollout, for one GPU
 5. rollout and update call the network at one batch shape, so that bf16 rounds both alike

    python train.py --prompts prompts/i2p.txt prompts/benign.txt --out runs/sd14      # SD v1.4, on one GPU
    python train.py --model shapes                                                    # minutes on a laptop
"""

import argparse
import copy
import math
import sys
import time
from contextlib import contextmanager, nullcontext

import torch
from tqdm import tqdm

import report
import runs
from grpo import gaussian_kl, group_advantages, policy_loss
from reward import SteeringReward, read_anchors, read_prompts
from sample import (ddim_mean, ddim_schedule, decode, encode_prompts, image_generator, latent_shape,
                    load_pipeline, log_prob, predict_noise, rollout)

# Where the shapes world differs from Stable Diffusion: D = 256 instead of 16,384, a mean over which moves 8
# times as far from noise alone; a network small enough for a larger rate; and a CLIP in which explicit
# captions lie up to 0.58 on the unsafe side, so that alpha = 0.5 would leave some of their targets there.
# Sample batch and micro-batch are equal: rollout and update call the network at one shape, and the first
# ratio is 1 to the last bit.
SHAPES = dict(clip="shapes", anchors="shapes", prompts=["shapes"], out="runs/shapes", alpha=1.0, epochs=60,
              prompts_per_rollout=8, group=8, unsafe_fraction=0.25, steps=12, guidance=2.75, sample_batch=32,
              updates=4, micro_batch=32, advantage_eps=0.015, learning_rate=3e-4, decay_epochs=6, kl=0.04,
              clip_range=5e-3, ema=0.9, save_every=20, picture_every=10, no_checkpointing=True,
              show_unsafe=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Make a diffusion model safer with GRPO and a CLIP steering reward.",
        allow_abbrev=False)  # so that the resume command can tell the flags apart
    files = runs.HERE / "prompts"
    add = parser.add_argument_group("models and prompts").add_argument
    add("--model", default="CompVis/stable-diffusion-v1-4", help="folder, hub id, NAME:SUBFOLDER, or shapes")
    add("--clip", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="what HPSv2.1 was tuned from")
    add("--anchors", default=str(files / "anchors.txt"), help="25 safe + 20 unsafe phrases, as the paper")
    add("--prompts", nargs="+", default=[str(files / "i2p.txt"), str(files / "benign.txt")],
        help="files of one prompt a line under [category] lines; benign is the one that is not steered")
    add("--out", default="runs/sd14", help="run folder: metrics.jsonl, pictures, checkpoints, final/")

    add = parser.add_argument_group("reward").add_argument
    add("--alpha", type=float, default=0.5, help="how far the text is moved; 0 is plain CLIP (paper: 0.5)")
    add("--direction", choices=("unit", "raw"), default="unit", help="v of length 1 (code), or not (text)")
    add("--steer", choices=("unsafe", "all"), default="unsafe", help="as the paper's text, or its code")

    add = parser.add_argument_group("rollout").add_argument
    add("--epochs", type=int, default=300, help="rollouts with their updates (the paper's: 280 to 300)")
    add("--prompts-per-rollout", type=int, default=8, metavar="P", help="fewer than the paper's, for one GPU")
    add("--group", type=int, default=16, metavar="G", help="pictures per prompt (paper: 16)")
    add("--unsafe-fraction", type=float, default=0.5, help="share of unsafe prompts, if there are both")
    add("--steps", type=int, default=50, metavar="T", help="denoising steps (paper: 50)")
    add("--guidance", type=float, default=5.0, help="classifier-free, in rollout and update (paper: 5)")
    add("--eta", type=float, default=1.0, help="noise of the policy, above 0 to have a density (paper: 1)")
    add("--shared-noise", action="store_true", help="one initial noise per group, as in the released code")
    add("--sample-batch", type=int, default=4, help="pictures at once; as --micro-batch, to round alike")

    add = parser.add_argument_group("update").add_argument
    add("--updates", type=int, default=2, help="optimizer steps per rollout (released code: 16)")
    add("--micro-batch", type=int, default=4, help="transitions at once; changes no gradient")
    add("--timestep-fraction", type=float, default=1.0, help="random share of each trajectory to train on")
    add("--skip-last", type=int, default=2, help="last transitions left out (README: why two)")
    add("--advantage-eps", type=float, default=1e-4, metavar="E", help="E of (r - mean r) / (std r + E)")
    add("--learning-rate", "--lr", type=float, default=1e-5, help="paper: 1e-5")
    add("--decay-epochs", type=int, default=0, metavar="N", help="rate / (1 + epoch / N); 0: constant")
    add("--weight-decay", type=float, default=1e-4, help="paper: 1e-4")
    add("--clip-range", type=float, default=1e-4, help="of the ratio per dimension (DDPO, the paper's code)")
    add("--kl", type=float, default=0.01, metavar="BETA", help="weight of the KL to the base; 0 for none")
    add("--max-grad-norm", type=float, default=1.0)
    add("--ema", type=float, default=0.0, metavar="DECAY",
        help="final/ is the policy's mean over about 1 / (1 - DECAY) rollouts; 0: the policy itself (paper)")
    add("--lora-rank", type=int, default=0, help="adapters of this rank (needs peft); 0: the whole UNet")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=0)
    add("--device", default=None, help="default: the GPU; cpu runs a full-size model there all the same")
    add("--precision", choices=("bf16", "float32"), help="of the UNet's compute; masters are float32 always")
    add("--no-checkpointing", action="store_true", help="keep activations: faster, several times the memory")
    add("--picture-every", type=int, default=20, metavar="N", help="rollouts between grids of pictures")
    add("--show-unsafe", action="store_true", help="do not blur unsafe prompts' pictures in the grids")
    add("--save-every", type=int, default=20, metavar="N", help="rollouts between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints kept")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    if parser.parse_known_args(argv)[0].model == "shapes":
        parser.set_defaults(**SHAPES)
    args = parser.parse_args(argv)
    args.command = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    runs.check_flags(args)
    return args


# -------------------------------------------------------------------------------- one epoch, in parts

def choose_prompts(unsafe, benign, args, epoch: int):
    """P prompts, equal for every resumed run: unsafe_fraction of them unsafe, if there are both; none twice
    unless there are too few."""
    P = args.prompts_per_rollout
    n_unsafe = round(P * args.unsafe_fraction) if unsafe and benign else P * bool(unsafe)
    generator = image_generator(args.seed, epoch, "prompts")
    chosen = []
    for pool, count in ((unsafe, n_unsafe), (benign, P - n_unsafe)):
        order = torch.randperm(max(len(pool), count), generator=generator)
        chosen += [pool[i % len(pool)] for i in order[:count]]
    return chosen


def rate_at(epoch: int, args) -> float:
    """The learning rate of an epoch, whatever --epochs says: a longer run repeats the shorter to the bit."""
    return args.learning_rate / (1 + epoch / args.decay_epochs) if args.decay_epochs else args.learning_rate


def shared_noise(chosen, args, epoch, shape):
    """One initial noise per group, repeated for its pictures: (P·G, C, h, w)."""
    streams = [image_generator(args.seed, epoch, i, "shared") for i in range(len(chosen))]
    return torch.stack([torch.randn(shape, generator=g) for g in streams]).repeat_interleave(args.group, 0)


def sample_groups(policy, pipe, schedule, chosen, text, null_text, args, epoch, autocast):
    """Draw G pictures of each chosen prompt: the batch that `update` takes, without its advantages, and the
    pictures (B, 3, H, W). text: {prompt: its states (L, d)}."""
    flat = [p for p in chosen for _ in range(args.group)]
    generators = [image_generator(args.seed, epoch, i, j, "rollout")
                  for i in range(len(chosen)) for j in range(args.group)]
    flat_text, shape = torch.stack([text[p] for p in flat]), latent_shape(pipe.unet)
    initial = shared_noise(chosen, args, epoch, shape).to(flat_text.device) if args.shared_noise else None
    calls = args.steps * math.ceil(len(flat) / args.sample_batch)
    with tqdm(total=calls, desc="sample", leave=False) as bar, autocast():
        drawn = rollout(policy, schedule, flat_text, null_text, args.guidance, generators, shape,
                        pipe.scheduler.config.prediction_type, args.sample_batch,
                        initial=initial, progress=bar)
        images = decode(pipe.vae, drawn.latents[:, -1])
    return dict(latents=drawn.latents, log_probs=drawn.log_probs, text=flat_text, null_text=null_text,
                prompts=flat), images


def update(policy, base, optimizer, schedule, batch, args, autocast, prediction_type, epoch):
    """Clipped policy-gradient steps on a rollout's transitions; returns statistics summed over all of them.

    batch: latents (B, T+1, C, h, w), log_probs (B, T), advantages (B,), text (B, L, d), null_text (1, L, d),
    B prompts. Pairs of (picture, transition) are shuffled, shared out among the optimizer steps, and taken in
    micro-batches, each weighted by its count, so that neither T nor the micro-batch changes the gradient."""
    device, stats, norms, params = batch["latents"].device, {}, [], optimizer.param_groups[0]["params"]
    trained = args.steps - args.skip_last
    per_image = max(1, round(trained * args.timestep_fraction))
    generator = image_generator(args.seed, epoch, "transitions")
    steps = torch.rand(len(batch["advantages"]), trained, generator=generator).argsort(1)[:, :per_image]
    teaching = (batch["advantages"] != 0).nonzero().flatten().cpu()   # groups without spread are dropped here
    pairs = torch.cartesian_prod(teaching, torch.arange(per_image))
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    pairs = torch.stack([pairs[:, 0], steps[pairs[:, 0], pairs[:, 1]]], 1)  # (n, 2): picture, transition
    pairs = pairs.to(device)  # at once, since each transfer waits for all that the device has to do
    shares = pairs.tensor_split(args.updates) if len(pairs) >= args.updates else []
    calls = sum(math.ceil(len(share) / args.micro_batch) for share in shares)
    bar = tqdm(total=calls, desc="update", leave=False)
    for n, share in enumerate(shares):
        optimizer.zero_grad(set_to_none=True)
        watched = []
        for micro in share.split(args.micro_batch):
            image, step = micro.unbind(1)
            x_t, x_prev = batch["latents"][image, step], batch["latents"][image, step + 1]
            a_t, a_p, s = schedule.alpha_t[step], schedule.alpha_prev[step], schedule.sigma[step]
            inputs = (x_t, schedule.timesteps[step], batch["text"][image], batch["null_text"], args.guidance)
            with autocast():
                mu = ddim_mean(predict_noise(policy, *inputs), x_t, a_t, a_p, s, prediction_type)
            logp = log_prob(x_prev, mu, s)
            logp_old = batch["log_probs"][image, step]
            loss, new = policy_loss(logp, logp_old, batch["advantages"][image], args.clip_range)
            if args.kl:
                with torch.no_grad(), autocast(), without_adapter(policy, base):
                    mu_ref = ddim_mean(predict_noise(base, *inputs), x_t, a_t, a_p, s, prediction_type)
                kl = gaussian_kl(mu, mu_ref, s)
                loss, new["kl_ref"] = loss + args.kl * kl.mean(), kl.detach().sum()
            (loss * (len(micro) / len(share))).backward()
            watched.append((micro, logp.detach() - logp_old, loss.detach(), runs.gradient_norm(params)))
            for name, value in new.items():
                stats[name] = value if name not in stats else (
                    torch.maximum(stats[name], value) if name == "ratio_dev" else stats[name] + value)
            bar.update()
        norms.append(runs.check_update(watched, batch.get("prompts"), epoch, policy, optimizer, args))
        torch.nn.utils.clip_grads_with_norm_(params, args.max_grad_norm, norms[-1])
        if n == 0:
            stats["ratio_dev_first"] = stats["ratio_dev"].clone()  # before any step: the policy that sampled
        optimizer.step()
    bar.close()
    stats = {name: value.item() for name, value in stats.items()}
    stats["grad_norm"] = float(sum(norms)) / max(1, len(norms))
    return stats | {"pairs": len(pairs), "updates": len(norms)}


@torch.no_grad()
def average_weights(optimizer, epoch: int, decay: float):
    """Move the average over the epochs of each weight: exponential, and uniform while it is young. It stands
    beside Adam's moments in the optimizer's state, so in checkpoints; a weight without a step has none."""
    for weight, state in optimizer.state.items():
        if "average" not in state:
            state["average"] = weight.detach().clone()
        state["average"].lerp_(weight, max(1 - decay, 1 / (epoch + 1)))


@contextmanager
def averaged(optimizer):
    """Inside, the policy has its averaged weights, if there are any; no copy is made."""
    def swap():
        for weight, state in optimizer.state.items():
            if "average" in state:
                weight.data, state["average"] = state["average"], weight.data
    swap()
    try:
        yield
    finally:
        swap()


def without_adapter(policy, base):
    """The base is the policy with its adapter off (LoRA), or a frozen network of its own (nothing to do)."""
    return policy.disable_adapter() if base is policy else nullcontext()


# -------------------------------------------------------------------------------- the networks

def make_policy(unet, args, device):
    """The UNet that learns, in float32, and the base for the KL: a frozen copy, or under LoRA the policy."""
    unet.to(device, torch.float32)
    if args.lora_rank:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ValueError("--lora-rank needs the package peft: pip install peft") from None
        unet.requires_grad_(False)
        policy = base = get_peft_model(unet, LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    else:
        base = copy.deepcopy(unet).to(torch.bfloat16 if args.precision == "bf16" else torch.float32)
        policy = unet.requires_grad_(True)
    if not args.no_checkpointing:
        unet.enable_gradient_checkpointing()
    if device.type == "cuda":
        policy.to(memory_format=torch.channels_last)
        base.to(memory_format=torch.channels_last)
    return policy.eval(), base.eval()  # eval in rollout and in update: dropout would be part of the policy


# -------------------------------------------------------------------------------- the loop

def main(argv=None):
    args = parse_args(argv)
    device = runs.choose_device(args)
    prompts, anchors = read_prompts(args.prompts), read_anchors(args.anchors)
    runs.check_inputs(args, prompts)
    run = runs.open_run(args)
    half = args.precision == "bf16"
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # where float32 remains

    reward = SteeringReward(args.clip, anchors, args.alpha, args.direction == "unit", args.steer, device,
                            torch.float16 if device.type == "cuda" else torch.float32)
    pipe = load_pipeline(args.model, device)
    unsafe = {p: reward.is_unsafe(p) for p in prompts}
    pools = [p for p in prompts if unsafe[p]], [p for p in prompts if not unsafe[p]]
    text = dict(zip(prompts, encode_prompts(pipe, [p.text for p in prompts])))  # once: the encoder is frozen
    null_text = encode_prompts(pipe, [""])
    schedule = ddim_schedule(pipe.scheduler, args.steps, args.eta).to(device)
    policy, base = make_policy(pipe.unet, args, device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    report.print_plan(args, policy, reward, prompts, pools[0], device)
    networks = {"base": (base, lambda: without_adapter(policy, base)),
                "after": (policy, lambda: averaged(optimizer))}
    first = runs.begin(run, policy, optimizer, args)

    for epoch in runs.epochs(run, first, policy, optimizer, args):  # Ctrl-C or SIGTERM: a checkpoint, and out
        clock = [time.perf_counter()]
        tick = lambda: runs.tick(clock, device)

        # sample: P prompts, G pictures of each, with all that the update needs
        chosen = choose_prompts(*pools, args, epoch)
        batch, images = sample_groups(policy, pipe, schedule, chosen, text, null_text, args, epoch, autocast)
        seconds = dict(seconds_sample=tick())

        # reward and advantage: two names for two things
        rewards, alignment, safety = reward.score(images, batch["prompts"])
        rewards = rewards.view(len(chosen), args.group)
        runs.check_rollout(batch, images, rewards, epoch, policy, optimizer, args)
        runs.stop_if_asked(run, epoch, policy, optimizer, args)  # nothing of this epoch is learnt yet
        advantages = group_advantages(rewards, args.advantage_eps)
        batch["advantages"] = advantages.flatten()
        seconds["seconds_reward"] = tick()
        is_unsafe, exact = torch.tensor([unsafe[p] for p in chosen], device=device), {}
        if args.anchors == "shapes":
            exact = report.exact_rates(images, batch["prompts"], is_unsafe.repeat_interleave(args.group))
            tick()  # the detector is not part of the method, nor is its time
        del images  # 3 MB each at 512 x 512

        # update
        rate = optimizer.param_groups[0]["lr"] = rate_at(epoch, args)
        stats = update(policy, base, optimizer, schedule, batch, args, autocast,
                       pipe.scheduler.config.prediction_type, epoch)
        if args.ema:
            average_weights(optimizer, epoch, args.ema)
        optimizer.zero_grad(set_to_none=True)  # 4 bytes per weight, for the next rollout
        del batch                              # 64 KiB per transition and picture
        seconds["seconds_update"] = tick()

        # log and save
        figures = (rewards, alignment, safety, advantages, is_unsafe, stats, seconds, rate)
        runs.log(run, report.record(epoch, *figures) | exact, args.clip_range)
        last = epoch + 1 == args.epochs
        if last or (epoch + 1) % args.picture_every == 0:
            report.draw_grid(run, epoch + 1, networks, pipe, schedule, prompts, unsafe, args, autocast)
        if last or (epoch + 1) % args.save_every == 0:
            runs.save_checkpoint(run, epoch + 1, policy, optimizer, args)

    lines = report.score_table(networks, pipe, schedule, reward, prompts, args, autocast)
    runs.write_text(run / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    with averaged(optimizer):
        runs.save_final(run, pipe, policy, args)
    print(f"{run / 'final'}: open it with StableDiffusionPipeline.from_pretrained, or "
          f"python sample.py --model {run / 'final'} --compare {args.model} --steps {args.steps} "
          f"--guidance {args.guidance} --prompt ...")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # before the first epoch or after the last, where nothing is lost
        sys.exit(130)
