"""Speed and memory of one epoch, against the bare network calls that it cannot do without.

The program runs an epoch (train.py's own functions) while every call of the UNets, the VAE and CLIP's image
tower is recorded: which network, at which batch shape, with or without a gradient. The floor replays exactly
these calls on random numbers, with nothing in between: no text, no schedule, no log-probability, no loss,
no optimizer. Their ratio is what the program costs on top. The arithmetic of the calls is counted too
(convolutions, matrix products, attention), as a share of the rate of one large matrix product on the device.

    python -m bench.speed                       # the shapes world; a CPU will do
    python -m bench.speed --arch sd14           # Stable Diffusion v1.4's shapes with random weights, one GPU
    python -m bench.speed --arch sd14 --table --json bench.json --lora-rank 16 ...  # and any flag of train.py
"""

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import shapes.train
import train
from bench.sd14 import ANCHORS, sd14_pipeline, vit_h14
from grpo import group_advantages
from plumbing import checks, output, stop
from plumbing.texts import read_anchors, read_prompts
from sample import DECODE_BATCH, autocast

PHASES = ("sample", "reward", "update")


# -------------------------------------------------------------------------------- the program

def set_up(args, latents: int, compiled: bool = False) -> train.Parts:
    """All that an epoch needs. latents: 0, or their width with random weights of SD v1.4's shapes in place of
    args.model, args.clip and args.anchors."""
    device, networks = torch.device(args.device), []
    if latents:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        networks = [sd14_pipeline(device, latents), vit_h14(device, dtype)]
    anchors = read_anchors(ANCHORS if latents else args.anchors)
    parts = train.set_up(args, read_prompts(checks.prompt_files(args)), anchors, *networks)
    if compiled:
        parts.policy.compile(), parts.base.compile()
    return parts


def run_epoch(parts: train.Parts, args, epoch: int, phase) -> dict:
    """Sample, reward, update, by train.py's own functions; phase(name) is a context around each of them."""
    with phase("sample"):
        chosen = train.choose_prompts(parts.unsafe, parts.benign, args, epoch)
        batch, images = train.sample_groups(parts, chosen, args, epoch)
    with phase("reward"):
        rewards, *_ = parts.reward.score(images, batch.prompts)
        groups = rewards.view(len(chosen), args.group)
        batch.advantages = group_advantages(groups, args.divisor).flatten()
    del images  # as train.main does
    with phase("update"):
        stats = train.update(parts, batch, args, epoch)
        parts.optimizer.zero_grad(set_to_none=True)
    return stats


# -------------------------------------------------------------------------------- recording and replay

@contextmanager
def recorded(parts, calls: list):
    """While it is open, append every network call to `calls`: (network, shape of its input, gradient)."""
    def watch(owner, name, network):
        original = getattr(owner, name)

        def call(*given, **named):
            shapes = [tuple(x.shape) for x in (*given, *named.values()) if torch.is_tensor(x)]
            with_grad = torch.is_grad_enabled() and network == "unet"
            calls.append((network, shapes[0], with_grad))
            return original(*given, **named)
        setattr(owner, name, call)

    watched = [(parts.policy, "forward", "unet"), (parts.pipe.vae, "decode", "vae"),
               (parts.reward.clip, "get_image_features", "clip")]
    if parts.base is not parts.policy:
        watched.append((parts.base, "forward", "base"))
    for one in watched:
        watch(*one)
    yield
    for owner, name, _ in watched:
        delattr(owner, name)  # the method of the class is behind it


def replay(parts, network: str, shape: tuple, with_grad: bool):
    """One call of a network on random numbers, nothing else."""
    dtype = parts.reward.clip.dtype if network == "clip" else torch.float32
    x = torch.randn(shape, device=parts.device, dtype=dtype)  # on zeros a GPU draws less power and is faster
    if network == "vae":
        parts.pipe.vae.decode(x)
    elif network == "clip":
        parts.reward.clip.get_image_features(pixel_values=x)
    else:
        unet = parts.policy if network == "unet" else parts.base
        length, width = parts.pipe.tokenizer.model_max_length, parts.pipe.unet.config.cross_attention_dim
        text = torch.randn(len(x), length, width, device=parts.device)
        t = torch.ones(len(x), device=parts.device, dtype=torch.long)
        out = unet(x, t, encoder_hidden_states=text)
        if with_grad:
            out.sample.float().mean().backward()


def floor(parts, calls: dict, phase):
    """The recorded calls of each phase, bare."""
    cast = lambda: autocast(parts.device, parts.dtype)
    for name in PHASES:
        with phase(name), cast() if name == "sample" else nullcontext():  # weights are cast once per rollout
            for network, shape, with_grad in calls[name]:
                with cast() if name == "update" else nullcontext(), torch.set_grad_enabled(with_grad):
                    replay(parts, network, shape, with_grad)
    parts.optimizer.zero_grad(set_to_none=True)


def arithmetic(parts, calls: dict) -> dict:
    """{phase: floating-point operations of its calls}. One call of each kind is counted: the counter keeps
    what a call leaves behind alive, until Python's collector runs."""
    counted = {}
    for call in {call for name in PHASES for call in calls[name]}:
        with FlopCounterMode(display=False) as counter, autocast(parts.device, parts.dtype), \
                torch.set_grad_enabled(call[2]):
            replay(parts, *call)
        counted[call] = counter.get_total_flops()
        gc.collect()
    parts.optimizer.zero_grad(set_to_none=True)
    return {name: sum(counted[call] for call in calls[name]) for name in PHASES}


def calls_needed(args, transitions: int, clip_batch: int) -> dict:
    """By arithmetic: network calls of one epoch. transitions: pairs of picture and step that were trained;
    clip_batch: pictures that CLIP takes at once."""
    images = args.prompts_per_rollout * args.group
    shares = torch.arange(transitions).tensor_split(args.updates) if transitions >= args.updates else []
    micro = sum(math.ceil(len(share) / args.micro_batch) for share in shares)
    reference = micro if args.kl or args.kl_benign else 0
    again = micro if args.precision == "bf16" else 0  # the old log-probabilities
    unet = args.steps * math.ceil(images / args.sample_batch) + micro + again
    return {"unet": unet + reference if args.lora_rank else unet, "base": 0 if args.lora_rank else reference,
            "vae": math.ceil(images / DECODE_BATCH), "clip": math.ceil(images / clip_batch)}


# -------------------------------------------------------------------------------- measuring

class Clock:
    """Seconds and peak memory of each phase, over repetitions."""

    def __init__(self, device):
        self.device, self.seconds, self.peak = device, defaultdict(list), defaultdict(float)

    @contextmanager
    def __call__(self, name):
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
            self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated(self.device) / 2**30)
        self.seconds[name].append(time.perf_counter() - start)


def matrix_rate(device, dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten."""
    n, clock = 8192 if device.type == "cuda" else 1024, Clock(device)
    factor = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(10):
        with clock("product"):
            factor @ factor
    return 2 * n**3 / min(clock.seconds["product"])


def measure(args, latents: int, repeats: int, compiled: bool = False) -> dict:
    """One configuration: program and floor in turn, after one epoch of each to warm up."""
    parts = set_up(args, latents, compiled)
    calls, ours, bare = {name: [] for name in PHASES}, Clock(parts.device), Clock(parts.device)
    stats = run_epoch(parts, args, 0, lambda name: recorded(parts, calls[name]))
    needed = calls_needed(args, stats["pairs"], parts.reward.batch_size)
    # the counter cannot look into compiled code
    flops = dict.fromkeys(PHASES, 0) if compiled else arithmetic(parts, calls)
    floor(parts, calls, lambda name: nullcontext())
    for repeat in range(repeats):
        stats = run_epoch(parts, args, 1 + repeat, ours)
        floor(parts, calls, bare)
    for clock in (ours, bare):
        clock.seconds["epoch"] = [sum(times) for times in zip(*clock.seconds.values())]
    flops["epoch"], ours.peak["epoch"] = sum(flops.values()), max(ours.peak.values(), default=0)
    images, rate = args.prompts_per_rollout * args.group, matrix_rate(parts.device, parts.dtype)
    made = {network: sum(call[0] == network for name in PHASES for call in calls[name]) for network in needed}
    result = {"images": images, "calls_made": made, "calls_needed": needed, "matrix_rate": rate,
              "ratio_dev_first": stats["ratio_dev_first"]}
    for name in (*PHASES, "epoch"):
        own, low = ours.seconds[name], bare.seconds[name]
        result[name] = {"seconds": own, "floor_seconds": low, "ratio": [a / b for a, b in zip(own, low)],
                        "images_per_second": images / statistics.median(own), "flops": flops[name],
                        "matrix_share": flops[name] / statistics.median(own) / rate,
                        "peak_memory_gb": ours.peak[name]}
    return result


def spread(values) -> str:
    """Median and range, as 1.04 (1.03 to 1.06)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def peak(gb: float) -> str:
    return f"{gb:.2f}" if gb else "-"  # only a GPU tells it by phase


def print_result(result):
    print("\n| phase | seconds, median (range) | floor | ratio | images/s | of the matrix rate | peak GB |\n"
          + "|---" * 7 + "|")
    for name in (*PHASES, "epoch"):
        r = result[name]
        print(f"| {name} | {spread(r['seconds'])} | {spread(r['floor_seconds'])} | {spread(r['ratio'])} "
              f"| {r['images_per_second']:.3g} | {r['matrix_share']:.0%} | {peak(r['peak_memory_gb'])} |")
    print(f"\nnetwork calls made {result['calls_made']}, needed {result['calls_needed']}; "
          f"ratio_dev_first {result['ratio_dev_first']:.2g}; "
          f"a large matrix product has {result['matrix_rate'] / 1e12:.3g} TFLOP/s")


def variants(args) -> dict:
    """What the table varies, one thing at a time: {name: flags}."""
    micro, batch, off, full = args.micro_batch, args.sample_batch, args.no_checkpointing, not args.lora_rank
    return {f"micro-batch {micro // 2}": dict(micro_batch=micro // 2),
            f"micro-batch {micro * 2}": dict(micro_batch=micro * 2),
            f"sample batch {batch // 2}": dict(sample_batch=batch // 2),
            f"sample batch {batch * 2}": dict(sample_batch=batch * 2),
            f"checkpointing {'on' if off else 'off'}": dict(no_checkpointing=not off),
            "compiled": {},
            "LoRA, rank 16" if full else "full": dict(lora_rank=16 if full else 0),
            f"group {2 * args.group}": dict(group=2 * args.group)}


def print_table(results: dict, args, latents: int, repeats: int):
    """Measure what `variants` varies into results, and print a row for each."""
    print("\n| variant | sample s | update s | epoch s | epoch / floor | images/s | peak GB |\n"
          + "|---" * 7 + "|")
    for label, changes in {"as given": {}, **variants(args)}.items():
        if label not in results:
            changed = argparse.Namespace(**vars(args) | changes)
            results[label] = measure(changed, latents, repeats, label == "compiled")
        r = results[label]
        print(f"| {label} | {spread(r['sample']['seconds'])} | {spread(r['update']['seconds'])} "
              f"| {spread(r['epoch']['seconds'])} | {spread(r['epoch']['ratio'])} "
              f"| {r['epoch']['images_per_second']:.3g} | {peak(r['epoch']['peak_memory_gb'])} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Time an epoch against bare network calls; more flags: train.py's.", allow_abbrev=False)
    add = parser.add_argument
    add("--arch", choices=("sd14",), help="random weights at this size in place of the shapes world")
    add("--latents", type=int, default=64, help="their width with --arch; 8 lets a CPU try it")
    add("--repeats", type=int, default=5, help="epochs measured, program and floor in turn")
    add("--table", action="store_true", help="also vary micro-batch, sampling batch, ... one at a time")
    add("--json", type=Path, metavar="FILE", help="write everything measured there")
    own, rest = parser.parse_known_args(argv)
    if own.latents < 8 or own.latents % 8:
        raise ValueError(f"--latents {own.latents}: must be a multiple of 8, which the UNet halves 3 times")
    latents = own.latents if own.arch else 0
    args = train.parse_args(rest if own.arch else [*shapes.train.FLAGS, *rest])
    print(output.heading(own.json))
    device = checks.choose_device(args)
    name = (torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads")
    print(f"{own.arch or args.model} on {name}, {args.precision}, torch {torch.__version__}; "
          f"{args.prompts_per_rollout} x {args.group} images, {args.steps} steps, guidance {args.guidance}, "
          + (f"latents {latents} wide, " if latents else "") + f"{own.repeats} repetitions")
    results = {"as given": measure(args, latents, own.repeats)}
    print_result(results["as given"])
    if own.table:
        print_table(results, args, latents, own.repeats)
    if own.json:
        told = {"device": name, "torch": torch.__version__, "flags": vars(args), "results": results}
        own.json.write_text(json.dumps(told, indent=1, default=str) + "\n")


if __name__ == "__main__":
    stop.run_script("bench.speed", main)
