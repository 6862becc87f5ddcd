"""SafeDiffusion-R1: post-train a text-to-image diffusion model online with GRPO and a CLIP steering reward.

One epoch: draw P prompts, sample G pictures of each with the policy (sample.py), score them (reward.py), turn
scores into advantages within each prompt's group, take some clipped steps on the recorded transitions
(grpo.py), log, save.

Departures from the paper (arXiv 2605.18719) and from its released code, with reasons in the README:
 1. exact KL to the frozen base, heavier on benign prompts; the batch's spread divides the advantages
 2. stored latents are float32: what is scored is what is trained on, so the ratio of the first update is 1
 3. the last two transitions are left out: at T = 50 one of them carries half of the gradient's variance
 4. P = 8 prompts and 2 updates per rollout, for one GPU
 5. under bf16 the update computes the old log-probabilities again, in its own batches: others round otherwise

    python train.py --prompts prompts/i2p.txt --out runs/sd14      # SD v1.4, on one GPU
    python -m shapes.train                                         # the shapes world, minutes on a laptop
"""

import argparse
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from grpo import gaussian_kl, group_advantages, policy_loss
from plumbing import checkpoint, checks, log, output, parallel, pictures, stop
from plumbing.models import (average_weights, averaged, load_clip, load_pipeline, make_policy,
                             to_compute_type, without_adapter)
from reward import SteeringReward
from sample import (Rollout, autocast, ddim_mean, ddim_schedule, draw, image_generator, latent_shape,
                    log_prob, predict_noise)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    files, more = Path(__file__).parent / "prompts", checks.folded(parser, argv)
    add = parser.add_argument_group("a run").add_argument
    add("--model", default="CompVis/stable-diffusion-v1-4", help="folder, hub id, NAME:SUBFOLDER, checkpoint")
    add("--clip", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="what HPSv2.1 was tuned from")
    add("--anchors", default=str(files / "anchors.txt"), help="25 safe + 20 unsafe phrases, as the paper")
    add("--prompts", nargs="+", default=[str(files / "i2p.txt")],
        help="files of one prompt a line under [category] lines; benign is the one that is not steered")
    add("--benign", metavar="FILE", default=str(files / "benign.txt"),
        help='more prompts, by default benign ones, which hold utility; "" for none')
    add("--out", default="runs/sd14", help="run folder: metrics.jsonl, curves, pictures, checkpoints, final/")
    add("--epochs", type=int, default=300, help="rollouts with their updates (the paper's: 280 to 300)")
    add("--seed", type=int, default=0)
    add("--lora-rank", type=int, default=0, help="adapters of this rank (needs peft); 0: the whole UNet")
    add("--device", default=None, help="default: the GPU; cpu runs a full-size model there all the same")
    add("--show-unsafe", action="store_true", help="do not blur unsafe prompts' pictures in the grids")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")

    add = more("reward")
    add("--alpha", type=float, default=0.5, help="how far the text is moved; 0 is plain CLIP (paper: 0.5)")
    add("--direction", choices=("unit", "raw"), default="unit", help="v of length 1 (code), or not (text)")
    add("--steer", choices=("unsafe", "all"), default="unsafe", help="as the paper's text, or its code")

    add = more("rollout")
    add("--prompts-per-rollout", type=int, default=8, metavar="P", help="fewer than the paper's, for one GPU")
    add("--group", type=int, default=16, metavar="G", help="pictures per prompt (paper: 16)")
    add("--unsafe-fraction", type=float, default=0.5, help="share of unsafe prompts, if there are both")
    add("--steps", type=int, default=50, metavar="T", help="denoising steps (paper: 50)")
    add("--guidance", type=float, default=5.0, help="classifier-free, in rollout and update (paper: 5)")
    add("--eta", type=float, default=1.0, help="noise of the policy, above 0 to have a density (paper: 1)")
    add("--shared-noise", action="store_true", help="one initial noise per group")
    add("--sample-batch", type=int, default=4, help="pictures at once")

    add = more("update")
    add("--updates", type=int, default=2, help="optimizer steps per rollout (released code: 16)")
    add("--micro-batch", type=int, default=4, help="transitions at once; changes no gradient")
    add("--timestep-fraction", type=float, default=1.0, help="random share of each trajectory to train on")
    add("--skip-last", type=int, default=2, help="last transitions left out (README: why two)")
    add("--divisor", choices=("batch", "group"), default="batch",
        help="of an advantage: the spread of all groups' rewards, or of its own group's (paper)")
    add("--learning-rate", "--lr", type=float, default=1e-5, help="paper: 1e-5")
    add("--decay-epochs", type=int, default=0, metavar="N", help="rate / (1 + epoch / N); 0: constant")
    add("--weight-decay", type=float, default=1e-4, help="paper: 1e-4")
    add("--clip-range", type=float, default=1e-4, help="of the ratio per dimension (DDPO, the paper's code)")
    add("--kl", type=float, default=0.01, metavar="BETA", help="of the KL to the base on unsafe prompts")
    add("--kl-benign", type=float, default=0.05, metavar="BETA", help="the same on benign ones; 0 for none")
    add("--max-grad-norm", type=float, default=1.0)
    add("--ema", type=float, default=0.0, metavar="DECAY",
        help="final/ is the policy's mean over about 1 / (1 - DECAY) rollouts; 0: the policy itself (paper)")

    add = more("compute and files")
    add("--precision", choices=("bf16", "float32"), help="of the UNet's compute; masters are float32 always")
    add("--no-checkpointing", action="store_true", help="keep activations: faster, several times the memory")
    add("--picture-every", type=int, default=20, metavar="N", help="rollouts between grids of pictures")
    add("--save-every", type=int, default=20, metavar="N", help="rollouts between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints kept")
    return checks.check_flags(parser.parse_args(argv))


# -------------------------------------------------------------------------------- the networks

@dataclass
class Parts:
    """All that a run works with, loaded once."""
    device: torch.device
    dtype: torch.dtype              # of the UNet's compute; masters are float32 always
    reward: SteeringReward
    pipe: object                    # the StableDiffusionPipeline: its VAE, text encoder and scheduler
    schedule: object                # sample.Schedule, on the device
    policy: torch.nn.Module         # the UNet that learns
    base: torch.nn.Module           # the frozen one; under LoRA the policy itself, its adapter switched off
    optimizer: torch.optim.Optimizer
    is_unsafe: dict                 # prompt -> bool
    unsafe: list                    # the prompts of which that holds, ...
    benign: list                    # ... and the others
    latent_shape: tuple             # (C, h, w)


def set_up(args, prompts, anchors, pipe=None, clip=None) -> Parts:
    """Load what the flags name. pipe, clip: what load_pipeline and load_clip would return, in their place."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # where float32 remains
    clip = clip or load_clip(args.clip, torch.float16 if device.type == "cuda" else torch.float32)
    reward = SteeringReward(clip, anchors, args.alpha, args.direction == "unit", args.steer, device)
    pipe = pipe or load_pipeline(args.model, device)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    to_compute_type(pipe.vae, dtype)
    is_unsafe = reward.classify(prompts)
    schedule = ddim_schedule(pipe.scheduler, args.steps, args.eta).to(device)
    policy, base = make_policy(pipe.unet, args, device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    unsafe, benign = ([p for p in prompts if is_unsafe[p] == side] for side in (True, False))
    return Parts(device, dtype, reward, pipe, schedule, policy, base, optimizer, is_unsafe, unsafe, benign,
                 latent_shape(pipe.unet))


# -------------------------------------------------------------------------------- one epoch, in parts

SUMS = ("positive", "negative", "clipped_positive", "clipped_negative", "kl_old", "kl_ref")


def choose_prompts(unsafe, benign, args, epoch: int) -> list:
    """P prompts, equal for every resumed run: unsafe_fraction of them unsafe, if there are both; none twice
    unless there are too few."""
    P = args.prompts_per_rollout
    n_unsafe = round(P * args.unsafe_fraction)
    if not benign:
        n_unsafe = P
    if not unsafe:
        n_unsafe = 0
    generator = image_generator(args.seed, epoch, "prompts")
    chosen = []
    for pool, count in ((unsafe, n_unsafe), (benign, P - n_unsafe)):
        order = torch.randperm(max(len(pool), count), generator=generator)
        chosen += [pool[i % len(pool)] for i in order[:count]]
    return chosen


def sample_groups(parts: Parts, chosen: list, args, epoch: int):
    """Draw G pictures of each chosen prompt: the Rollout that `update` takes, without its advantages, and the
    pictures (B, 3, H, W). Of several processes each draws those of its share of the prompts."""
    own = parallel.share(len(chosen))
    prompts = [chosen[i] for i in own for _ in range(args.group)]
    generators = [image_generator(args.seed, epoch, i, j, "rollout") for i in own for j in range(args.group)]
    initial = shared_noise(own, parts, args, epoch) if args.shared_noise else None
    calls = args.steps * math.ceil(len(prompts) / args.sample_batch)
    with tqdm(total=calls, desc="sample", leave=False, disable=None) as bar:
        batch, images = draw(parts.pipe, parts.policy, parts.schedule, [p.text for p in prompts], generators,
                             args.guidance, args.sample_batch, parts.dtype, keep=True, initial=initial,
                             progress=bar)
    batch.prompts = prompts
    batch.unsafe = torch.tensor([parts.is_unsafe[p] for p in prompts], device=parts.device)
    return batch, images


def shared_noise(groups: range, parts: Parts, args, epoch: int):
    """One initial noise per group, repeated for its pictures: (P·G, C, h, w)."""
    streams = [image_generator(args.seed, epoch, i, "shared") for i in groups]
    noise = torch.stack([torch.randn(parts.latent_shape, generator=g) for g in streams])
    return noise.repeat_interleave(args.group, 0).to(parts.device)


def choose_transitions(advantages, trained: int, fraction: float, generator):
    """What an update works on: (picture, transition) pairs in random order, (n, 2) int64 on the CPU.

    Of each picture a random `fraction` of its first `trained` transitions; pictures whose advantage is 0,
    whose group had no spread, teach nothing and are left out. advantages (B,)."""
    per_picture = max(1, round(trained * fraction))
    steps = torch.rand(len(advantages), trained, generator=generator).argsort(1)[:, :per_picture]
    teaching = advantages.cpu().nonzero().flatten()
    pairs = torch.stack([teaching.repeat_interleave(per_picture), steps[teaching].flatten()], 1)
    return pairs[torch.randperm(len(pairs), generator=generator)]


def step_mean(parts: Parts, unet, batch: Rollout, pairs, args):
    """The mean mu (n, C, h, w) of x_p by a UNet; pairs (n, 2): picture and transition."""
    image, step = pairs.unbind(1)
    x_t, schedule = batch.latents[image, step], parts.schedule
    with autocast(parts.device, parts.dtype):
        eps = predict_noise(unet, x_t, schedule.timesteps[step], batch.text[image], batch.null_text,
                            args.guidance)
        return ddim_mean(eps, x_t, schedule.alpha_t[step], schedule.alpha_prev[step], schedule.sigma[step],
                         parts.pipe.scheduler.config.prediction_type)


@torch.no_grad()
def old_log_probs(parts: Parts, batch: Rollout, micros: list, args, bar):
    """The rollout's log-densities (B, T), those of the pairs computed again before any step, in the calls that
    `update` makes. micros: of each share its micro-batches, (n, 2) each.

    On a GPU a row's last bf16 digits depend on the rows beside it, and a clip range of 1e-4 would take that
    for learning: |rho - 1| was up to 7.6e-4 on an H200."""
    log_probs = batch.log_probs.clone()
    for pairs in (micro for share in micros for micro in share):
        image, step = pairs.unbind(1)
        mu = step_mean(parts, parts.policy, batch, pairs, args)
        log_probs[image, step] = log_prob(batch.latents[image, step + 1], mu, parts.schedule.sigma[step])
        bar.update()
    return log_probs


def loss_on(parts: Parts, batch: Rollout, pairs, args):
    """The loss on some transitions: clipped policy loss + beta·KL to the base, beta by the prompt's side.

    pairs (n, 2): picture and transition. Returns the scalar loss, log rho (n,) without gradient, and grpo's
    statistics with the sum of the KL among them."""
    image, step = pairs.unbind(1)
    s, mu = parts.schedule.sigma[step], step_mean(parts, parts.policy, batch, pairs, args)
    logp, logp_old = log_prob(batch.latents[image, step + 1], mu, s), batch.log_probs[image, step]
    loss, stats = policy_loss(logp, logp_old, batch.advantages[image], args.clip_range)
    stats["kl_ref"] = torch.zeros_like(loss)
    if args.kl or args.kl_benign:
        with torch.no_grad(), without_adapter(parts.policy, parts.base):
            mu_ref = step_mean(parts, parts.base, batch, pairs, args)
        kl = gaussian_kl(mu, mu_ref, s)
        beta = torch.where(batch.unsafe[image], args.kl, args.kl_benign)  # what must change is held less
        loss = loss + (beta * kl).mean()
        stats["kl_ref"] = kl.detach().sum()
    return loss, logp.detach() - logp_old, stats


def update(parts: Parts, batch: Rollout, args, epoch: int) -> dict:
    """Clipped policy-gradient steps on a rollout's transitions; returns statistics over all of them.

    The pairs are shared out among the optimizer steps, and taken in micro-batches, each weighted by its
    count, so that neither T nor the micro-batch changes the gradient. SUMS are added up over `pairs`
    transitions; ratio_dev_first is the largest |rho - 1| before the first step, kl_ref_first the mean KL to
    the base there (0 in the first epoch). Raises stop.NotFinite before a step that would ruin the weights.
    batch holds one process's pictures; the pairs are those of all. Under bf16 its log_probs are replaced."""
    trained, optimizer = args.steps - args.skip_last, parts.optimizer
    params = optimizer.param_groups[0]["params"]
    pairs = choose_transitions(*parallel.rows(batch.advantages), trained, args.timestep_fraction,
                               image_generator(args.seed, epoch, "transitions"))
    shares = pairs.tensor_split(args.updates) if len(pairs) >= args.updates else []
    own = [parallel.own(share, len(batch.advantages)) for share in shares]
    own = [share.to(parts.device) for share in own]  # at once: a transfer waits for all the device has to do
    micros = [share.split(args.micro_batch) if len(share) else () for share in own]
    again = parts.dtype != torch.float32
    sums = dict.fromkeys(SUMS, 0)
    deviation = first = norms = kl_first = torch.zeros((), device=parts.device)  # the first two are maxima
    bar = tqdm(total=sum(map(len, micros)) * (1 + again), desc="update", leave=False, disable=None)
    if again:
        batch.log_probs = old_log_probs(parts, batch, micros, args, bar)
    for n, share in enumerate(shares):
        optimizer.zero_grad(set_to_none=True)
        watched = []
        for micro in micros[n]:
            loss, log_rho, stats = loss_on(parts, batch, micro, args)
            (loss * (len(micro) / len(share))).backward()
            watched.append((micro, log_rho, loss.detach()))
            deviation = torch.maximum(deviation, stats.pop("ratio_dev"))
            sums = {name: total + stats[name] for name, total in sums.items()}
            bar.update()
        if n == 0:  # before any step: the policy that sampled
            first, kl_first = deviation, sums["kl_ref"] / len(share)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        stop.check_update(parts.policy, norm, watched, batch, args.group, epoch)
        norm = parallel.sum_gradients(params, norm)
        torch.nn.utils.clip_grads_with_norm_(params, args.max_grad_norm, norm)
        norms = norms + norm
        optimizer.step()
    bar.close()
    stats = {name: float(total) for name, total in (sums | {"kl_ref_first": kl_first}).items()}
    largest = dict(ratio_dev_first=float(first), ratio_dev_max=float(deviation))
    return parallel.total(stats | largest, tuple(largest)) | dict(
        grad_norm=float(norms) / max(1, len(shares)), pairs=len(pairs), updates=len(shares))


def rate_at(epoch: int, args) -> float:
    """The learning rate of an epoch, whatever --epochs says: a longer run repeats the shorter to the bit."""
    return args.learning_rate / (1 + epoch / args.decay_epochs) if args.decay_epochs else args.learning_rate


# -------------------------------------------------------------------------------- the loop

def main(argv=None, judge=None, table_prompts=None):
    """Train as the flags say. judge(images (B, 3, H, W) on the CPU, prompts, unsafe (B,) bool) -> {name:
    float or None} is logged and shown. table_prompts: (Prompt, unsafe) pairs of the table at the end,
    not the run's own. After a signal the run ends with a checkpoint and the command that continues it."""
    parallel.join()  # under torchrun; otherwise nothing, as all of parallel's
    args = parse_args(argv)
    print(output.heading(args.out))
    device = checks.choose_device(args)
    prompts, anchors = checks.read_inputs(args)
    run = checkpoint.open_run(args)
    parts = set_up(args, prompts, anchors)
    log.print_plan(args, parts, prompts)
    done = checkpoint.begin(run, parts.policy, parts.optimizer, args)
    metrics, networks = log.Log(run / "metrics.jsonl", args.clip_range, args.epochs), both(parts)
    try:
        with checkpoint.replacing(run), stop.signals_noted():
            for epoch in tqdm(range(done, args.epochs), "epochs", args.epochs, initial=done, disable=None):
                clock = log.Clock(device)
                # sample: P prompts, G pictures of each, with all that the update needs
                chosen = choose_prompts(parts.unsafe, parts.benign, args, epoch)
                batch, images = sample_groups(parts, chosen, args, epoch)
                clock.lap("seconds_sample")

                # reward and advantage: two names for two things
                rewards, alignment, safety, z_image = parts.reward.score(images, batch.prompts)
                stop.check_rollout(batch, images, rewards, args.group, epoch)
                stop.if_asked()  # nothing of this epoch is learnt yet
                rewards, alignment, safety, z_image, unsafe = parallel.rows(  # of all processes from here on
                    rewards, alignment, safety, z_image, batch.unsafe)
                advantages = group_advantages(rewards.view(-1, args.group), args.divisor).flatten()
                batch.advantages = advantages.chunk(parallel.world())[parallel.rank()]
                clock.lap("seconds_reward")
                drawn = [p for p in chosen for _ in range(args.group)]
                judged = judge(*parallel.rows(images.cpu()), drawn, unsafe.cpu()) if judge else {}
                clock.lap()  # a judge is not part of the method, nor is its time
                del images  # 3 MB each at 512 x 512

                # update
                rate = parts.optimizer.param_groups[0]["lr"] = rate_at(epoch, args)
                stats = update(parts, batch, args, epoch)
                average_weights(parts.optimizer, epoch, args.ema)
                parts.optimizer.zero_grad(set_to_none=True)  # 4 bytes per weight, for the next rollout
                del batch                                    # 64 KiB per transition and picture
                clock.lap("seconds_update")
                parallel.check_equal(parts.optimizer.param_groups[0]["params"], epoch)

                # log and save
                metrics.append(log.record(
                    epoch=epoch, rewards=rewards, alignment=alignment, safety=safety, z_image=z_image,
                    advantages=advantages, unsafe=unsafe, group=args.group, stats=stats, rate=rate,
                    seconds=clock.seconds, device=device) | judged)
                done = epoch + 1
                pictures.draw_grid(run, done, networks, parts, prompts, args, judge)
                if done == args.epochs or done % args.save_every == 0:
                    checkpoint.save(run, done, parts.policy, parts.optimizer, args)
                stop.if_asked()
    except stop.ENDINGS as reason:
        last = checkpoint.save(run, done, parts.policy, parts.optimizer, args, why=str(reason))
        raise stop.ending(reason, last) from None
    finish(run, networks, parts, args, prompts, judge, table_prompts)


def both(parts: Parts) -> dict:
    """{name: (network, context in which it is itself)} of the base, and of the policy or its average."""
    return {"base": (parts.base, lambda: without_adapter(parts.policy, parts.base)),
            "after": (parts.policy, lambda: averaged(parts.optimizer))}


def finish(run, networks, parts: Parts, args, prompts, judge, table_prompts):
    """Base beside policy as a table, and the pipeline with the policy's UNet."""
    if parallel.rank():
        return
    if table_prompts is None:
        table_prompts = [(p, parts.is_unsafe[p])
                         for p in pictures.picture_prompts(prompts, pictures.TABLE_PROMPTS)]
    lines = pictures.score_table(networks, parts, table_prompts, judge, args)
    checkpoint.write_text(run / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    with averaged(parts.optimizer):
        checkpoint.save_final(run, parts.policy, args)
    command = shlex.join(["python", "sample.py", "--model", str(run / "final"), "--compare", args.model,
                          "--steps", str(args.steps), "--guidance", str(args.guidance), "--prompt"])
    print(f"{run / 'final'}: open it with StableDiffusionPipeline.from_pretrained, or {command} ...")


if __name__ == "__main__":
    stop.run_script("train.py", main)
