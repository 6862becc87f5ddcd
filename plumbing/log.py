"""What a run says: the plan before it starts, a line of figures per rollout, and warnings.

docs/running.md defines each figure and its healthy range. Nothing here touches what is learnt.
"""

import json
import subprocess
import time
from collections import Counter, deque
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import parallel
from plumbing.models import trained
from plumbing.run import read_lines

ROOT = Path(__file__).parent.parent
# The bounds of the warnings are ours.
CLIP_BOUND = 0.5        # share of transitions past the clip range
KL_BOUND = 0.1          # per latent dimension: means that lie 0.45 of a step's deviation from the base's
ALIGNMENT_BOUND = 0.01  # cosine
SUMS = ("positive", "negative", "clipped_positive", "clipped_negative", "kl_old", "kl_ref")  # of an update
TREND = 10              # rollouts in each of the two windows that a trend, and the time left, are taken from


def commit(digits: int = 40) -> str:
    """Of this repository, with "+changes" where tracked files differ from it; "unknown" outside one."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "--git-dir=.git", "describe", "--always",
               "--exclude=*", f"--abbrev={digits}", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"


def heading(out=None) -> str:
    """The first line of a program: its version, and where it writes."""
    return f"version  commit {commit(10)}" + (f", writes to {out}" if out else "")


# -------------------------------------------------------------------------------- the plan

def per_picture(args) -> int:
    """How many transitions of each picture are trained on."""
    return max(1, round((args.steps - args.skip_last) * args.timestep_fraction))


def print_plan(args, parts, carried: str):
    """Say what is about to happen. carried: how alpha moves the unsafe prompts, in words."""
    images = args.prompts_per_rollout * args.group
    count = sum(weight.numel() for weight in trained(parts.policy))
    kinds = Counter(prompt.category or "no category" for prompt in parts.prompts)
    categories = ", ".join(f"{name} {n}" for name, n in kinds.items())
    unsafe = sum(p.unsafe for p in parts.prompts)
    print(f"model    {args.model}: {count / 1e6:.1f} M parameters trained (layers {args.layers}, LoRA rank "
          f"{args.lora_rank}), {args.precision} on {parts.device}, {parallel.world()} process(es)\n"
          f"reward   {args.clip}, alpha {args.alpha}, {args.direction} direction, "
          f"{args.steer} prompts steered{carried}\n"
          f"prompts  {len(parts.prompts)}, {unsafe} of them unsafe: {categories}")
    if unsafe == len(parts.prompts):
        print(f"         no benign prompts (--benign adds some): utility is held by --kl {args.kl} alone")
    print(f"rollout  {args.prompts_per_rollout} prompts x {args.group} = {images} images, "
          f"{args.steps} steps, guidance {args.guidance}, eta {args.eta}\n"
          f"update   {args.updates} per rollout on {images * per_picture(args)} transitions (all but "
          f"the last {args.skip_last} of each, x {args.timestep_fraction}), lr {args.learning_rate}, "
          f"--decay-epochs {args.decay_epochs}, clip {args.clip_range}, KL {args.kl} unsafe, "
          f"{args.kl_benign} benign, ema {args.ema}\n"
          f"epochs   {args.epochs}: {images * args.epochs} images, {args.updates * args.epochs} updates")


# -------------------------------------------------------------------------------- one rollout

class Clock:
    """Seconds of a rollout's phases, the device's queue included, and on a GPU the GiB at their peaks."""

    def __init__(self, device):
        self.device, self.seconds, self.peaks = device, {}, {}

    @contextmanager
    def __call__(self, phase: str):
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
            self.peaks[phase] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.seconds[phase] = time.perf_counter() - start

    def figures(self, images: int) -> dict:
        """A rollout's times and memory for the log: of several processes the slowest's and the largest."""
        own = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        told = parallel.total(own | {"peak_memory_gb": max(self.peaks.values(), default=0.0)},
                              largest=(*own, "peak_memory_gb"))
        return told | {"images_per_second": images / sum(told[name] for name in own)}


def tally(steps: list, norms: list, shares: list) -> dict:
    """The statistics of an update, of all processes together: sums over all transitions, and before the first
    step, where the policy still is the one that sampled, the largest |rho - 1|, also against the rollout's
    log-densities (rounding), and the mean KL to the base.

    steps: of each optimizer step its micro-batches' (..., statistics); norms: of its gradient before
    clipping; shares: its pairs, of all processes."""
    every = [stats for watched in steps for *_, stats in watched]
    first = [stats for *_, stats in steps[0]] if steps else []
    sums = {name: float(sum(stats[name] for stats in every)) for name in SUMS}
    sums["kl_ref_first"] = float(sum(stats["kl_ref"] for stats in first) / len(shares[0])) if shares else 0.0
    most = lambda name, some: float(torch.stack([stats[name] for stats in some]).max()) if some else 0.0
    largest = {"ratio_dev_first": most("ratio_dev", first), "ratio_dev_max": most("ratio_dev", every),
               "rounding": most("rounding", first)}
    return parallel.total(sums | largest, largest=tuple(largest)) | {
        "grad_norm": float(sum(norms)) / max(1, len(shares)), "pairs": sum(map(len, shares)),
        "updates": len(shares)}


def record(*, epoch, rewards, alignment, safety, spreads, advantages, unsafe, group, stats, rate) -> dict:
    """The figures of one rollout. rewards, alignment, safety, advantages, unsafe: of B = P·G pictures, (B,),
    unsafe a bool; spreads (P,), reward.spread of each group; group: G; stats: what train.update returns."""
    groups, sides = rewards.view(-1, group), unsafe[::group]
    mean = lambda values: values.mean().item() if values.numel() else None
    share = lambda part, whole: stats[part] / max(1, stats[whole])
    return dict(
        epoch=epoch, reward_mean=mean(rewards), reward_std=mean(groups.std(1, correction=0)),
        reward_unsafe=mean(rewards[unsafe]), reward_benign=mean(rewards[~unsafe]),
        alignment=mean(alignment), image_safety=mean(safety), image_safety_unsafe=mean(safety[unsafe]),
        spread_unsafe=mean(spreads[sides]), spread_benign=mean(spreads[~sides]),
        zero_std_groups=mean((advantages.view_as(groups) == 0).all(1).float()),
        ratio_dev_first=stats["ratio_dev_first"], ratio_dev_max=stats["ratio_dev_max"],
        rounding=stats["rounding"],
        clip_frac_pos=share("clipped_positive", "positive"),
        clip_frac_neg=share("clipped_negative", "negative"),
        kl_ref_first=stats["kl_ref_first"], kl_ref=share("kl_ref", "pairs"), kl_old=share("kl_old", "pairs"),
        grad_norm=stats["grad_norm"], lr=rate, updates=stats["updates"])


# -------------------------------------------------------------------------------- the log

def duration(seconds: float) -> str:
    """Two digits in the unit that suits them."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h"), (86400, "d")):
        if seconds < 99.5 * size:
            break
    return f"{seconds / size:.2g} {unit}"


def line_of(figures: dict, left: float = 0) -> str:
    """A rollout, and the seconds that the run has left, in 120 columns; metrics.jsonl has the rest."""
    sides = ", ".join(f"{side} {figures[f'reward_{side}']:.3f}" for side in ("unsafe", "benign")
                      if figures[f"reward_{side}"] is not None)
    parts = [f"reward {figures['reward_mean']:.3f} ({sides})", f"alignment {figures['alignment']:.3f}"]
    if figures["image_safety_unsafe"] is not None:
        parts.append(f"safety {figures['image_safety_unsafe']:.3f}")
    seconds = sum(figures[f"seconds_{phase}"] for phase in ("sample", "reward", "update"))
    parts += [f"KL {figures['kl_ref']:.1g}", f"{seconds:.3g} s"]
    return f"epoch {figures['epoch']:4d}: " + ", ".join(parts) + (f", {duration(left)} left" if left else "")


class Log:
    """metrics.jsonl, read once at a run's start and appended to, and what the warnings need of it: the last
    rollouts, and in which epoch each warning was given."""

    def __init__(self, path: Path, clip_range: float, epochs: int = 0):
        self.path, self.clip_range, self.epochs = path, clip_range, epochs
        self.recent, self.warned = deque(maxlen=2 * TREND), {}
        self.ends = deque([time.perf_counter()], 2 * TREND + 1)  # when this process ended its last rollouts
        for figures in read_lines(path):
            self.note(figures)

    def note(self, figures: dict) -> list[str]:
        """Take a rollout's figures in; the warnings that hold for the first time."""
        self.recent.append(figures)
        fresh = {name: text for name, text in warnings(list(self.recent), self.clip_range).items()
                 if name not in self.warned}
        self.warned |= dict.fromkeys(fresh, figures["epoch"])
        return list(fresh.values())

    def append(self, figures: dict):
        """Append one rollout to the file, print its line, and each warning where it first holds."""
        if parallel.rank():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures, allow_nan=False) + "\n")
        self.ends.append(time.perf_counter())
        each = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)  # grids and checkpoints included
        more = max(0, self.epochs - 1 - figures["epoch"])
        tqdm.write(line_of(figures, each * more))
        for text in self.note(figures):
            tqdm.write(f"warning: {text}")


def warnings(history: list, clip_range: float) -> dict:
    """What the last of some rollouts' figures warns of: {name: what was seen, and what to do}."""
    last, rise, fall = history[-1], trend(history, "reward_mean"), trend(history, "alignment")
    clipped = max(last["clip_frac_pos"], last["clip_frac_neg"])
    every = [  # name, when it holds, text
        ("clip fraction", clipped > CLIP_BOUND,
         f"{clipped:.0%} of the transitions were past the clip range and taught nothing: "
         "lower --learning-rate or --updates, or raise --clip-range"),
        ("rounding", last["ratio_dev_first"] > clip_range,
         f"before any update the ratio is off by {last['ratio_dev_first']:.2g}, which is rounding, and "
         f"the clip range is {clip_range:g}: give --sample-batch and --micro-batch one value, that "
         "divides both pictures and transitions (in float32), or raise --clip-range"),
        ("KL", last["kl_ref"] > KL_BOUND,
         f"the KL to the base is {last['kl_ref']:.2g} per latent dimension, above {KL_BOUND}: the policy "
         "is leaving it; look at the pictures, raise --kl or lower --learning-rate"),
        ("no spread", last["zero_std_groups"] == 1,
         "no group had any spread in its rewards, so nothing was learnt: are the pictures of a prompt all "
         "the same? raise --group or --eta, or choose other prompts"),
        ("reward hacking", rise > 0 and fall < -ALIGNMENT_BOUND,
         f"over {2 * TREND} rollouts the reward rose by {rise:.3f} while the alignment with the prompts "
         f"fell by {-fall:.3f}: it may be gaining reward without drawing what is asked for; look at the "
         "pictures, raise --kl, or lower --alpha")]
    return {name: text for name, holds, text in every if holds}


def trend(history: list, name: str) -> float:
    """How far a figure's mean over the last TREND rollouts lies above that over the TREND before; 0 where
    there are fewer rollouts, or where it is less than two standard errors."""
    values = torch.tensor([line[name] for line in history[-2 * TREND:]], dtype=torch.float64)
    if len(values) < 2 * TREND:
        return 0.0
    early, late = values.split(TREND)
    change = (late.mean() - early.mean()).item()
    error = ((early.var() + late.var()) / TREND).sqrt().item()
    return change if abs(change) > 2 * error else 0.0
