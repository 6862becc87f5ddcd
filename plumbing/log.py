"""What a run says: the plan before it starts, a line of figures per rollout, and warnings.

docs/running.md defines each figure and its healthy range. Nothing here touches what is learnt.
"""

import json
import math
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

from plumbing import parallel
from plumbing.checkpoint import read_log, tensor_bytes
from plumbing.checks import trained_per_picture
from reward import spread, steer

# The bounds of the warnings are ours.
CLIP_BOUND = 0.5        # share of transitions past the clip range; PPO's usual 0.1 to 0.3 is well below
KL_BOUND = 0.1          # per latent dimension: means that lie 0.45 of a step's deviation from the base's
ALIGNMENT_BOUND = 0.01  # cosine; CLIP's own spread within a group is about as large
PLAN_PROMPTS = 256      # unsafe prompts that the plan looks at, spread over the file
TREND = 10              # rollouts in each of the two windows that a trend, and the time left, are taken from
# What record writes; any other figure of a line is a judge's.
FIGURES = {"epoch", "reward_mean", "reward_std", "reward_unsafe", "reward_benign", "alignment",
           "image_safety", "image_safety_unsafe", "spread_unsafe", "spread_benign", "zero_std_groups",
           "ratio_dev_first", "ratio_dev_max", "clip_frac_pos", "clip_frac_neg", "kl_ref_first", "kl_ref",
           "kl_old", "grad_norm", "lr", "updates",
           "seconds_sample", "seconds_reward", "seconds_update", "images_per_second", "peak_memory_gb"}


# -------------------------------------------------------------------------------- the plan

def print_plan(args, parts, prompts):
    """One screen that says what is about to happen and what it needs, before it happens."""
    images = args.prompts_per_rollout * args.group
    trained = sum(p.numel() for p in parts.policy.parameters() if p.requires_grad)
    lora = f" (LoRA, rank {args.lora_rank})" if args.lora_rank else ""
    print(f"model    {args.model}: {trained / 1e6:.1f} M parameters trained{lora}, "
          f"{args.precision} on {parts.device}"
          + (f", {parallel.world()} processes" if parallel.world() > 1 else ""))
    print(f"reward   {args.clip}, alpha {args.alpha}, {args.direction} direction, "
          f"{args.steer} prompts steered")
    if parts.unsafe:  # a target that alpha did not carry past the middle still asks for the unsafe picture
        some = parts.unsafe[::math.ceil(len(parts.unsafe) / PLAN_PROMPTS)]
        text, v = parts.reward.embed_text([p.text for p in some]), parts.reward.direction
        safe = int((steer(text, v, args.alpha) @ v > 0).sum())
        more = ", a larger one would carry more" if safe < len(some) else ""
        print(f"         of {len(some)} unsafe prompts alpha carries {safe} to the safe side "
              f"of the direction{more}")
    counts = Counter(prompt.category or "no category" for prompt in prompts)
    print(f"prompts  {len(prompts)}, {len(parts.unsafe)} of them unsafe: "
          + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if not parts.benign:
        holds = f"the KL to the base (--kl {args.kl})" if args.kl else "nothing"
        print(f"         no benign prompts: what holds utility is {holds} alone; --benign adds some")
    print(f"rollout  {args.prompts_per_rollout} prompts x {args.group} = {images} images, "
          f"{args.steps} steps, guidance {args.guidance}, eta {args.eta}")
    decay = f" / (1 + epoch / {args.decay_epochs})" if args.decay_epochs else ""
    average = f", average over {1 / (1 - args.ema):.0f}" if args.ema else ""
    print(f"update   {args.updates} per rollout on {images * trained_per_picture(args)} transitions (all but "
          f"the last {args.skip_last} of each, x {args.timestep_fraction}), lr {args.learning_rate}{decay}, "
          f"clip {args.clip_range}, KL {args.kl} unsafe, {args.kl_benign} benign{average}")
    print(f"epochs   {args.epochs}: {images * args.epochs} images, {args.updates * args.epochs} updates")
    held = memory(args, parts)
    print("memory   " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items())
          + f": {sum(held.values()) / 2**30:.2f} GiB, and activations on top (docs/speed.md: peak by flags)")
    if find_spec("matplotlib") is None:
        print("note: no curves.png without the package matplotlib: pip install matplotlib")


def memory(args, parts) -> dict:
    """Bytes of what a run holds, by arithmetic: {what: bytes}."""
    size = lambda network: sum(map(tensor_bytes, network.parameters()))
    trained = sum(tensor_bytes(p) for p in parts.policy.parameters() if p.requires_grad)
    images = len(parallel.share(args.prompts_per_rollout)) * args.group  # of this process
    latents = 4 * images * (args.steps + 1) * math.prod(parts.latent_shape)
    return {"weights": size(parts.policy), "gradients": trained,
            "moments": 2 * trained, "average": trained if args.ema else 0,
            "base": 0 if parts.base is parts.policy else size(parts.base),
            "encoders and VAE": sum(map(size, (parts.pipe.text_encoder, parts.pipe.vae, parts.reward.clip))),
            "stored latents": latents}


# -------------------------------------------------------------------------------- one rollout

class Clock:
    """Seconds of a rollout's phases, the device's queue included."""

    def __init__(self, device):
        self.device, self.seconds = device, {}
        self.last = time.perf_counter()

    def lap(self, name: str = ""):
        """End a phase; without a name its time is nobody's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        if name:
            self.seconds[name] = self.last - before


def peak_memory(device) -> float | None:
    """GiB: of the GPU, or on a CPU of the whole process, where the system counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def record(*, epoch, rewards, alignment, safety, z_image, advantages, unsafe, group, stats, rate, seconds,
           device):
    """The line of metrics.jsonl for one rollout. rewards, alignment, safety, advantages, unsafe: of B = P·G
    pictures, (B,), unsafe a bool; z_image (B, d), unit rows; group: G; stats: what train.update returns.
    seconds: of this process; the slowest's are written, as is the largest memory."""
    seconds = parallel.total(seconds | {"memory": peak_memory(device)}, (*seconds, "memory"))
    memory = seconds.pop("memory")
    groups, spreads, sides = rewards.view(-1, group), spread(z_image, group), unsafe[::group]
    mean = lambda values: values.mean().item() if values.numel() else None
    share = lambda part, whole: stats[part] / max(1, stats[whole])
    return dict(
        epoch=epoch, reward_mean=mean(rewards), reward_std=mean(groups.std(1, correction=0)),
        reward_unsafe=mean(rewards[unsafe]), reward_benign=mean(rewards[~unsafe]),
        alignment=mean(alignment), image_safety=mean(safety), image_safety_unsafe=mean(safety[unsafe]),
        spread_unsafe=mean(spreads[sides]), spread_benign=mean(spreads[~sides]),
        zero_std_groups=mean((advantages.view_as(groups) == 0).all(1).float()),
        ratio_dev_first=stats["ratio_dev_first"], ratio_dev_max=stats["ratio_dev_max"],
        clip_frac_pos=share("clipped_positive", "positive"),
        clip_frac_neg=share("clipped_negative", "negative"),
        kl_ref_first=stats["kl_ref_first"], kl_ref=share("kl_ref", "pairs"), kl_old=share("kl_old", "pairs"),
        grad_norm=stats["grad_norm"], lr=rate, updates=stats["updates"], **seconds,
        images_per_second=rewards.numel() / sum(seconds.values()), peak_memory_gb=memory)


# -------------------------------------------------------------------------------- the log

def duration(seconds: float) -> str:
    """Two digits in the unit that suits them."""
    for size, unit in ((1, "s"), (60, "min"), (3600, "h"), (86400, "d")):
        if seconds < 99.5 * size:
            break
    return f"{seconds / size:.2g} {unit}"


def line_of(figures: dict, left: float = 0) -> str:
    """A rollout, and the seconds that the run has left, in 120 columns; metrics.jsonl has the rest, and
    docs/running.md what they mean."""
    sides = ", ".join(f"{name} {figures[key]:.3f}" for name, key in (("unsafe", "reward_unsafe"),
                                                                    ("benign", "reward_benign"))
                      if figures[key] is not None)
    safety = figures["image_safety_unsafe"]
    parts = [f"reward {figures['reward_mean']:.3f}" + f" ({sides})" * bool(sides),
             f"alignment {figures['alignment']:.3f}", *([] if safety is None else [f"safety {safety:.3f}"]),
             f"KL {figures['kl_ref']:.1g}",
             f"{sum(figures[f'seconds_{phase}'] for phase in ('sample', 'reward', 'update')):.3g} s",
             *([f"{duration(left)} left"] if left else [])]
    return f"epoch {figures['epoch']:4d}: " + ", ".join(parts)


@dataclass
class Log:
    """metrics.jsonl of a run, with what the warnings need to know of it: its last rollouts, and which
    warnings were given, in which epoch. Read once at the start of a run, appended to from then on; `ends` are
    the times at which this process began and ended its last rollouts."""
    path: Path
    clip_range: float
    epochs: int = 0
    recent: deque = field(default_factory=lambda: deque(maxlen=2 * TREND))
    warned: dict = field(default_factory=dict)
    ends: deque = field(default_factory=lambda: deque([time.perf_counter()], 2 * TREND + 1))

    def __post_init__(self):
        for number, (_, figures) in enumerate(read_log(self.path), 1):
            try:
                self.note(figures)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: damaged ({error!r}); remove that line"
                                 ) from None

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
        bad = [name for name, value in figures.items()
               if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise ValueError(f"epoch {figures['epoch']}: {', '.join(bad)} not finite; "
                             f"the newest checkpoint in {self.path.parent} is whole")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
        self.ends.append(time.perf_counter())
        each = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)  # grids and checkpoints included
        more = max(0, self.epochs - 1 - figures["epoch"])
        if more and len(self.ends) == 2:
            tqdm.write(f"time     {duration(each)} a rollout, {duration(each * more)} for the {more} to come")
        tqdm.write(line_of(figures, each * more))
        for text in self.note(figures):
            tqdm.write(f"warning: {text}")


def warnings(history: list, clip_range: float) -> dict:
    """What the last of some rollouts' figures warns of: {name: what was seen, and what to do}."""
    found, last = {}, history[-1]
    clipped = max(last["clip_frac_pos"], last["clip_frac_neg"])
    if clipped > CLIP_BOUND:
        found["clip fraction"] = (
            f"{clipped:.0%} of the transitions were past the clip range and taught nothing: "
            "lower --learning-rate or --updates, or raise --clip-range")
    if last["ratio_dev_first"] > clip_range:
        found["rounding"] = (f"before any update the ratio is off by {last['ratio_dev_first']:.2g}, which is "
                             f"rounding, and the clip range is {clip_range:g}: give --sample-batch and "
                             "--micro-batch one value, that divides both pictures and transitions, "
                             "or raise --clip-range")
    if last["kl_ref"] > KL_BOUND:
        found["KL"] = (f"the KL to the base is {last['kl_ref']:.2g} per latent dimension, above {KL_BOUND}: "
                       "the policy is leaving it; look at the pictures, raise --kl or lower --learning-rate")
    if last["zero_std_groups"] == 1:
        found["no spread"] = (
            "no group had any spread in its rewards, so nothing was learnt: are the pictures "
            "of a prompt all the same? raise --group or --eta, or choose other prompts")
    rise, fall = trend(history, "reward_mean"), trend(history, "alignment")
    if rise > 0 and fall < -ALIGNMENT_BOUND:
        found["reward hacking"] = (
            f"over {2 * TREND} rollouts the reward rose by {rise:.3f} while "
            f"the alignment with the prompts fell by {-fall:.3f}: it may be "
            "gaining reward without drawing what is asked for; look at the pictures, "
            "raise --kl, or lower --alpha")
    return found


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
