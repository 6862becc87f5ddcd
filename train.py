"""SafeDiffusion-R1: post-train a text-to-image diffusion model online with GRPO and a CLIP steering reward.

One epoch: draw P prompts, sample G pictures of each (sample.py), score them (reward.py), turn scores into
advantages within each group, take clipped steps on the recorded transitions (grpo.py), log, save.

Departures from the project page and the released code of arXiv 2605.18719, with reasons in the README:
 1. exact KL to the frozen base, heavier on benign prompts; the batch's spread divides the advantages
 2. stored latents are float32: what is scored is what is trained on, so the ratio of the first update is 1
 3. the last two transitions are left out: at T = 50 one of them carries half of the gradient's variance
 4. P = 8 prompts and 2 updates per rollout, for one GPU
 5. under bf16 the update computes the old log-probabilities in its own batches, as others round otherwise

    python train.py --prompts prompts/i2p.txt --out runs/sd14      # SD v1.4, on one GPU
    python -m shapes.train                                         # the shapes world, minutes on a laptop
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from grpo import gaussian_kl, group_advantages, policy_loss
from plumbing import log, parallel, run, stop
from plumbing.flags import Parser, folded, real, whole
from plumbing.models import (LAYERS, check_model, choose_device, load_clip, load_pipeline, make_average,
                             make_policy, note_long, to_compute_type, trained, without_adapter)
from plumbing.prompts import BENIGN, read_anchors, read_prompts
from reward import SteeringReward, spread
from sample import (Rollout, autocast, ddim_mean, ddim_schedule, draw, image_generator, latent_shape,
                    log_prob, predict_noise)
from views.direction import carried
from views.estimate import show_estimate
from views.grid import is_due, show_run
from views.table import judge_sides, show_table


def make_parser(argv) -> Parser:
    """All flags; those of reward, rollout, update and compute are shown by --help-all."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    files, more = Path(__file__).parent / "prompts", folded(parser, argv)
    add = parser.add_argument_group("a run").add_argument
    add("--model", default="CompVis/stable-diffusion-v1-4", help="folder, hub id, NAME:SUBFOLDER, checkpoint")
    add("--clip", default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", help="what HPSv2.1 was tuned from")
    add("--anchors", default=str(files / "anchors.txt"), help="25 safe + 20 unsafe, as many as the authors'")
    add("--prompts", nargs="+", default=[str(files / "i2p.txt")], help="one a line, under [category] lines")
    add("--benign", default=str(files / "benign.txt"), help='benign prompts, which hold utility; "" for none')
    add("--out", default="runs/sd14", help="run folder: metrics.jsonl, curves, pictures, checkpoints, final/")
    add("--epochs", type=whole(1, 999_999), default=300,
        help="rollouts; 300 are 38,400 pictures and 600 optimizer steps (authors': 153,600 and 4,800)")
    add("--seed", type=int, default=0)
    add("--lora-rank", type=whole(0), default=0, help="adapters of this rank (needs peft); 0: the whole UNet")
    add("--device", default=None, help="default: the GPU; cpu runs a full-size model there all the same")
    add("--show-unsafe", action="store_true", help="do not blur unsafe prompts' pictures in the grids")
    add("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--dry-run", action="store_true", help="load everything, say what it will take, and stop")
    add = more("reward")
    add("--alpha", type=real("[0, inf]"), default=0.5, help="how far the text is moved (page: 0.5)")
    add("--direction", choices=("unit", "raw"), default="unit", help="v of length 1, or not (code's README)")
    add("--steer", choices=("unsafe", "all"), default="unsafe", help="as the project page, or the code")
    add = more("rollout")
    add("--prompts-per-rollout", type=whole(1), default=8, metavar="P", help="released code: 32")
    add("--group", type=whole(2), default=16, metavar="G", help="pictures per prompt (code: 16)")
    add("--unsafe-fraction", type=real("[0, 1]"), default=0.5, help="of a rollout, if there are both")
    add("--steps", type=whole(1, 1000), default=50, metavar="T", help="denoising steps (code: 50)")
    add("--guidance", type=real("(0, inf]"), default=5.0, help="in rollout and update (code: 5)")
    add("--eta", type=real("(0, 1]"), default=1.0, help="noise of the policy, above 0 to have a density")
    add("--shared-noise", action="store_true", help="one initial noise per group")
    add("--sample-batch", type=whole(1), default=4, help="pictures at once")
    add = more("update")
    add("--updates", type=whole(1), default=2, help="optimizer steps per rollout (released code: 16)")
    add("--micro-batch", type=whole(1), default=4, help="transitions at once; changes no gradient")
    add("--timestep-fraction", type=real("(0, 1]"), default=1.0, help="random share of each trajectory")
    add("--skip-last", type=whole(0), default=2, help="last transitions left out (README: why two)")
    add("--divisor", choices=("batch", "group"), default="batch", help="whose spread divides (code: group)")
    add("--layers", choices=LAYERS, default="all", help="what learns (code: all)")
    add("--learning-rate", "--lr", type=real("(0, inf]"), default=1e-5, help="code: 1e-5")
    add("--decay-epochs", type=whole(0), default=0, metavar="N", help="rate / (1 + epoch / N); 0: constant")
    add("--weight-decay", type=real("[0, inf]"), default=1e-4, help="code: 1e-4")
    add("--clip-range", type=real("(0, 1)"), default=1e-4, help="of the ratio per dimension")
    add("--kl", type=real("[0, inf]"), default=0.01, help="its weight on unsafe prompts")
    add("--kl-benign", type=real("[0, inf]"), default=0.05, help="its weight on benign ones")
    add("--max-grad-norm", type=real("(0, inf]"), default=1.0)
    add("--ema", type=real("[0, 1)"), default=0.0, help="decay of the policy's average; 0: none")
    add = more("compute and files")
    add("--precision", choices=("bf16", "float32"), help="of the UNet's compute; masters are float32 always")
    add("--no-checkpointing", action="store_true", help="keep activations: faster, 1.4 times the memory")
    add("--picture-every", type=whole(1), default=20, metavar="N", help="rollouts between grids of pictures")
    add("--save-every", type=whole(1), default=20, metavar="N", help="rollouts between checkpoints")
    add("--keep", type=whole(1), default=2, help="checkpoints kept")
    return parser


def parse_args(argv=None):
    parser = make_parser(argv)
    args = parser.parse_args(argv)
    W, transitions = parallel.world(), args.prompts_per_rollout * args.group * log.per_picture(args)
    for wrong, why in (
            (args.resume and args.overwrite, "--resume continues a run, --overwrite replaces it: give one"),
            (args.prompts_per_rollout % W, f"--prompts-per-rollout: no multiple of the {W} processes"),
            (args.skip_last >= args.steps, f"--skip-last {args.skip_last}: --steps {args.steps} are no more"),
            (args.updates > transitions, f"--updates {args.updates}: {transitions} transitions a rollout")):
        if wrong:
            parser.error(why)
    return args


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
    average: torch.nn.Module | None # the policy's AveragedModel under --ema
    optimizer: torch.optim.Optimizer
    prompts: list                   # each with its side
    latent_shape: tuple             # (C, h, w)

    @property
    def learnt(self):
        """The UNet that is drawn and saved: the policy's average, if there is one, or the policy."""
        return self.average.module if self.average else self.policy


def set_up(args, prompts, anchors, schedule=None, pipe=None, clip=None) -> Parts:
    """Load what the flags name. pipe, clip: what load_pipeline and load_clip would return, in their place."""
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # where float32 remains
    clip = clip or load_clip(args.clip, torch.float16 if device.type == "cuda" else torch.float32)
    reward = SteeringReward(clip, anchors, args.alpha, args.direction == "unit", args.steer, device)
    prompts = reward.decide(prompts)
    pipe = pipe or load_pipeline(args.model, device)
    schedule = schedule or ddim_schedule(pipe.scheduler, args.steps, args.eta)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    to_compute_type(pipe.vae, dtype)
    policy, base = make_policy(pipe.unet, args, device)
    optimizer = torch.optim.AdamW(trained(policy), lr=args.learning_rate, weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    return Parts(device, dtype, reward, pipe, schedule.to(device), policy, base,
                 make_average(policy, args.ema), optimizer, prompts, latent_shape(pipe.unet))


def make_schedule(args):
    """The schedule of --model, before any weights are read. A step without noise has no density to train."""
    schedule = ddim_schedule(check_model("--model", args.model), args.steps, args.eta)
    noisy = int((schedule.sigma > 0).cumprod(0).sum())
    if args.steps - noisy > args.skip_last:
        raise ValueError(f"--skip-last {args.skip_last}: step {noisy + 1} of {args.steps} has sigma 0, so no "
                         "density to train (timestep_spacing or set_alpha_to_one in scheduler_config.json); "
                         f"give --skip-last {args.steps - noisy}, and more --steps if those are all")
    return schedule


# -------------------------------------------------------------------------------- one epoch, in parts

def choose_prompts(prompts: list, args, epoch: int) -> list:
    """P prompts, equal for every resumed run: unsafe_fraction of them unsafe, if there are both; none twice
    unless there are too few."""
    unsafe, benign = [p for p in prompts if p.unsafe], [p for p in prompts if not p.unsafe]
    P = args.prompts_per_rollout
    n_unsafe = round(P * args.unsafe_fraction) if unsafe and benign else P * bool(unsafe)
    generator = image_generator(args.seed, epoch, "prompts")
    chosen = []
    for pool, count in ((unsafe, n_unsafe), (benign, P - n_unsafe)):
        order = torch.randperm(max(len(pool), count), generator=generator)
        chosen += [pool[i % len(pool)] for i in order[:count]]
    return chosen


def sample_groups(parts: Parts, chosen: list, args, epoch: int):
    """Draw G pictures of each chosen prompt. Of several processes each draws those of its share of the
    prompts. Returns its prompts, one for each picture, the Rollout and the pictures (B, 3, H, W)."""
    own = parallel.share(len(chosen))
    prompts = [chosen[i] for i in own for _ in range(args.group)]
    generators = [image_generator(args.seed, epoch, i, j, "rollout") for i in own for j in range(args.group)]
    names = [f"epoch {epoch}, prompt {chosen[i].text!r}, image {j}" for i in own for j in range(args.group)]
    initial = None
    if args.shared_noise:  # one for each group
        streams = [image_generator(args.seed, epoch, i, "shared") for i in own]
        noise = torch.stack([torch.randn(parts.latent_shape, generator=g) for g in streams])
        initial = noise.repeat_interleave(args.group, 0).to(parts.device)  # (P·G, C, h, w)
    calls = args.steps * math.ceil(len(prompts) / args.sample_batch)
    with tqdm(total=calls, desc="sample", leave=False, disable=None) as bar:
        batch, images = draw(parts.pipe, parts.policy, parts.schedule, [p.text for p in prompts], generators,
                             args.guidance, args.sample_batch, parts.dtype, names, initial=initial,
                             progress=bar)
    return prompts, batch, images


def choose_transitions(advantages, first: int, fraction: float, generator):
    """What an update works on: (picture, transition) pairs in random order, (n, 2) int64 on the CPU.

    Of each picture a random `fraction` of its first `first` transitions; pictures whose advantage is 0,
    whose group had no spread, teach nothing and are left out. advantages (B,)."""
    count = max(1, round(first * fraction))
    steps = torch.rand(len(advantages), first, generator=generator).argsort(1)[:, :count]
    teaching = advantages.cpu().nonzero().flatten()
    pairs = torch.stack([teaching.repeat_interleave(count), steps[teaching].flatten()], 1)
    return pairs[torch.randperm(len(pairs), generator=generator)]


def step_mean(parts: Parts, unet, batch: Rollout, pairs, args):
    """The mean mu (n, C, h, w) of x_p by a UNet; pairs (n, 2): picture and transition."""
    image, step = pairs.unbind(1)
    x_t, at, kind = batch.latents[image, step], parts.schedule, parts.pipe.scheduler.config.prediction_type
    with autocast(parts.device, parts.dtype):
        eps = predict_noise(unet, x_t, at.timesteps[step], batch.text[image], batch.null_text, args.guidance)
        return ddim_mean(eps, x_t, at.alpha_t[step], at.alpha_prev[step], at.sigma[step], kind)


@torch.no_grad()
def old_log_probs(parts: Parts, batch: Rollout, again: list, args, bar):
    """The rollout's log-densities (B, T); of the micro-batches `again` by the calls that `update` makes.

    On a GPU a row's last bf16 digits depend on the rows beside it, and a clip range of 1e-4 would take that
    for learning: |rho - 1| was up to 7.6e-4 on an H200."""
    log_probs = batch.log_probs.clone()
    for pairs in again:
        image, step = pairs.unbind(1)
        mu = step_mean(parts, parts.policy, batch, pairs, args)
        log_probs[image, step] = log_prob(batch.latents[image, step + 1], mu, parts.schedule.sigma[step])
        bar.update()
    return log_probs


def loss_on(parts: Parts, batch: Rollout, pairs, old, advantages, unsafe, args):
    """The loss on some transitions: clipped policy loss + beta·KL to the base, beta by the prompt's side.

    pairs (n, 2): picture and transition; old (B, T): the log-densities of the policy that sampled, or None
    where this still is that one; advantages (B,), unsafe (B,) bool. Returns the scalar loss, log rho (n,)
    without gradient, and grpo's statistics, the sum of the KL, and |rho - 1| against the rollout's own."""
    image, step = pairs.unbind(1)
    s, mu = parts.schedule.sigma[step], step_mean(parts, parts.policy, batch, pairs, args)
    logp = log_prob(batch.latents[image, step + 1], mu, s)
    logp_old = logp.detach() if old is None else old[image, step]
    loss, stats = policy_loss(logp, logp_old, advantages[image], args.clip_range)
    stats["rounding"] = ((logp.detach() - batch.log_probs[image, step]).exp() - 1).abs().max()
    stats["kl_ref"] = torch.zeros_like(loss)
    if args.kl or args.kl_benign:
        with torch.no_grad(), without_adapter(parts.policy, parts.base):
            mu_ref = step_mean(parts, parts.base, batch, pairs, args)
        kl = gaussian_kl(mu, mu_ref, s)
        beta = torch.where(unsafe[image], args.kl, args.kl_benign)  # what must change is held less
        loss = loss + (beta * kl).mean()
        stats["kl_ref"] = kl.detach().sum()
    return loss, logp.detach() - logp_old, stats


def update(parts: Parts, batch: Rollout, advantages, unsafe, args, epoch: int) -> dict:
    """Clipped policy-gradient steps on a rollout's transitions; returns statistics over all of them.

    The pairs are shared out among the optimizer steps, and taken in micro-batches, each weighted by its
    count, so that neither T nor the micro-batch changes the gradient. advantages, unsafe (B,): as batch's, of
    this process's pictures; the pairs are those of all. Raises stop.NotFinite before a ruinous step."""
    generator = image_generator(args.seed, epoch, "transitions")
    pairs = choose_transitions(*parallel.rows(advantages), args.steps - args.skip_last,
                               args.timestep_fraction, generator)
    shares = pairs.tensor_split(args.updates) if len(pairs) >= args.updates else []
    # at once: a transfer waits for all that the device has to do
    own = [parallel.own(share, len(advantages)).to(parts.device).split(args.micro_batch) for share in shares]
    own = [[micro for micro in mine if len(micro)] for mine in own]
    # the first share's own forward gives logp_old; its first micro-batch is computed again to test the rest
    again = own[0][:1] + sum(own[1:], []) if own and parts.dtype != torch.float32 else []
    steps, norms = [], []  # of each optimizer step: its micro-batches, and its gradient's norm
    with tqdm(total=len(again) + sum(map(len, own)), desc="update", leave=False, disable=None) as bar:
        old = old_log_probs(parts, batch, again, args, bar)
        for number, (share, mine) in enumerate(zip(shares, own)):
            parts.optimizer.zero_grad(set_to_none=True)
            watched = []
            for micro in mine:
                known = old if number or not again or micro is mine[0] else None
                loss, log_rho, stats = loss_on(parts, batch, micro, known, advantages, unsafe, args)
                (loss * (len(micro) / len(share))).backward()
                watched.append((micro, log_rho, loss.detach(), stats))
                bar.update()
            steps.append(watched)
            norms.append(take_step(parts, watched, batch.names, args))
    return log.tally(steps, norms, shares)


def take_step(parts: Parts, watched: list, names: list, args):
    """One optimizer step on the gradient that lies in the weights, summed over the processes and clipped;
    returns its norm before clipping."""
    params = parts.optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    stop.check_update(parts.policy, norm, watched, names)
    norm = parallel.sum_gradients(params, norm)
    torch.nn.utils.clip_grads_with_norm_(params, args.max_grad_norm, norm)
    parts.optimizer.step()
    return norm


def one_epoch(parts: Parts, args, epoch: int, phase, judge=None) -> tuple[dict, dict]:
    """A rollout and its updates; returns the figures of the log, and the judge's. phase(name): a context
    around "sample", "reward" and "update". Raises stop.NotFinite, and stop.Asked before it learns."""
    with stop.together():
        with phase("sample"):  # P prompts, G pictures of each, with all that the update needs
            chosen = choose_prompts(parts.prompts, args, epoch)
            prompts, batch, images = sample_groups(parts, chosen, args, epoch)
        with phase("reward"):
            scores = parts.reward.score(images, prompts)
            stop.check_finite("reward", scores[0][:, None], batch.names)
    stop.if_asked()
    # reward and advantage: two names for two things; from here on of all processes' pictures
    unsafe = torch.tensor([p.unsafe for p in prompts], device=parts.device)
    rewards, alignment, safety, z_image, sides = parallel.rows(*scores, unsafe)
    advantages = group_advantages(rewards.view(-1, args.group), args.divisor).flatten()
    # not part of the method, nor is its time
    judged = judge_sides(judge, images, chosen, args.group) if judge else {}
    del images  # 3 MB each at 512 x 512
    with phase("update"):
        # whatever --epochs says: a longer run repeats the shorter to the bit
        rate = args.learning_rate / (1 + (epoch / args.decay_epochs if args.decay_epochs else 0))
        parts.optimizer.param_groups[0]["lr"] = rate
        own = advantages.chunk(parallel.world())[parallel.rank()]
        stats = update(parts, batch, own, unsafe, args, epoch)
        if parts.average:
            parts.average.update_parameters(parts.policy)
        parts.optimizer.zero_grad(set_to_none=True)  # 4 bytes per weight, for the next rollout
    return log.record(epoch=epoch, rewards=rewards, alignment=alignment, safety=safety,
                      spreads=spread(z_image, args.group), advantages=advantages, unsafe=sides,
                      group=args.group, stats=stats, rate=rate), judged


# -------------------------------------------------------------------------------- the loop

def main(argv=None, judge=None, table_prompts=None):
    """Train as the flags say. judge(images (B, 3, H, W) on the CPU, prompts) -> {name: float or None} over
    the pictures given, of which there may be none, is logged and shown. table_prompts: those of the grids and
    the table. After a signal the run ends with a checkpoint and the command that continues it."""
    parallel.join()  # under torchrun; otherwise nothing, as all of parallel's
    args = parse_args(argv)
    print(log.heading(args.out))
    choose_device(args)
    prompts, hashes = read_prompts(args.prompts)
    more, more_hashes = read_prompts([args.benign] if args.benign else [], BENIGN)
    anchors, anchors_hash = read_anchors(args.anchors)
    schedule = make_schedule(args)
    note_long(args.clip, prompts + more)
    files = dict(prompts=hashes, benign=more_hashes, anchors=[anchors_hash])
    with run.opened(args, files) as this:
        parts = set_up(args, prompts + more, anchors, schedule)
        log.print_plan(args, parts, carried(parts.reward, parts.prompts))
        show_estimate(args, parts, loss_on)
        if args.dry_run:
            return
        loop(this, parts, args, judge, table_prompts)
        if not parallel.rank():
            show_table(this.folder, parts, table_prompts, judge, args)
            run.save_final(this, args)


def loop(this: run.Run, parts: Parts, args, judge, table_prompts):
    """All epochs that are left. A signal, or a number that is not finite, ends them with a checkpoint."""
    done = run.begin(this, parts, args)
    metrics = log.Log(this.folder / "metrics.jsonl", args.clip_range, args.epochs)
    try:
        with stop.signals_noted():
            for epoch in tqdm(range(done, args.epochs), "epochs", args.epochs, initial=done, disable=None):
                clock = log.Clock(parts.device)
                figures, judged = one_epoch(parts, args, epoch, clock, judge)
                metrics.append(figures | clock.figures(args.prompts_per_rollout * args.group) | judged)
                done = epoch + 1
                run.save_where_due(this, done, parts, args)
                if is_due(done, args):
                    show_run(this.folder, done, parts, args, judge, judged, table_prompts)
                stop.if_asked()
    except (stop.NotFinite, stop.Asked) as reason:
        last = run.save(this, done, parts, args, why=str(reason))
        raise stop.ending(reason, last) from None


if __name__ == "__main__":
    stop.run_script("train.py", main)
