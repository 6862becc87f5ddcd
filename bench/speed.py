"""Seconds and memory of one epoch, beside the bare network calls that it cannot do without.

train.one_epoch runs while every call of the UNets, the VAE and CLIP's image tower is recorded: which network,
at which batch shape, with or without a gradient. The floor replays exactly these calls on random numbers,
with nothing in between: no text, no schedule, no log-probability, no loss, no optimizer.

    python -m bench.speed                                  # the shapes world; a CPU will do
    python -m bench.speed --arch sd14 --json bench.json    # SD v1.4's sizes; any flag of train.py may follow
"""

import argparse
import json
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils._pytree import tree_map_only

import shapes.train
import train
from bench.sd14 import sd14_pipeline, vit_h14
from plumbing import log, stop
from plumbing.models import choose_device
from plumbing.prompts import BENIGN, read_anchors, read_prompts
from sample import autocast

PHASES = ("sample", "reward", "update")


def networks(parts) -> dict:
    own = {"unet": parts.policy, "vae": parts.pipe.vae.decoder, "clip": parts.reward.clip.vision_model}
    return own if parts.base is parts.policy else own | {"base": parts.base}


@contextmanager
def recorded(parts, calls: list):
    """While it is open, append every network call to `calls`: (network, its arguments by place and by name,
    of tensors the shape and type alone, gradient)."""
    def note(name, _, *given):
        shapes = tree_map_only(torch.Tensor, lambda x: torch.empty_like(x, device="meta"), given)
        calls.append((name, shapes, name == "unet" and torch.is_grad_enabled()))

    hooks = [network.register_forward_pre_hook(partial(note, name), with_kwargs=True)
             for name, network in networks(parts).items()]
    yield
    for hook in hooks:
        hook.remove()


def replay(parts, call: tuple):
    """One recorded call on random numbers. On zeros a GPU draws less power and is faster."""
    name, shapes, with_grad = call
    fill = lambda x: (torch.randn_like if x.is_floating_point() else torch.ones_like)(x, device=parts.device)
    given, named = tree_map_only(torch.Tensor, fill, shapes)
    with torch.set_grad_enabled(with_grad):
        out = networks(parts)[name](*given, **named)
        if with_grad:
            out.sample.float().mean().backward()


def floor(parts, calls: dict, phase):
    """The recorded calls of each phase, bare."""
    cast = lambda: autocast(parts.device, parts.dtype)
    for name in PHASES:
        with phase(name), cast() if name == "sample" else nullcontext():  # weights are cast once per rollout
            for call in calls[name]:
                with cast() if name == "update" else nullcontext():
                    replay(parts, call)
    parts.optimizer.zero_grad(set_to_none=True)


def set_up(args, arch: str | None = None) -> train.Parts:
    """All that an epoch needs. arch: "sd14" for random networks of its shapes in place of the flags'."""
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe, clip = (sd14_pipeline(args.device), vit_h14(args.device, dtype)) if arch else (None, None)
    anchors, _ = read_anchors(args.anchors)
    prompts, _ = read_prompts(args.prompts)
    more, _ = read_prompts([args.benign] if args.benign else [], BENIGN)
    return train.set_up(args, prompts + more, anchors, pipe=pipe, clip=clip)


def measure(args, parts, repeats: int) -> dict:
    """Program and floor in turn, after one epoch of each to warm up; and the last epoch's figures of the log,
    ratio_dev_first among them."""
    calls = {name: [] for name in PHASES}
    train.one_epoch(parts, args, 0, lambda name: recorded(parts, calls[name]))
    floor(parts, calls, lambda name: nullcontext())
    ours, bare = ([log.Clock(parts.device) for _ in range(repeats)] for _ in range(2))
    for epoch, (clock, other) in enumerate(zip(ours, bare), 1):
        figures, _ = train.one_epoch(parts, args, epoch, clock)
        floor(parts, calls, other)

    def measured(names):
        return {"seconds": [sum(clock.seconds[name] for name in names) for clock in ours],
                "floor_seconds": [sum(clock.seconds[name] for name in names) for clock in bare],
                "peak_gib": max(clock.peaks.get(name, 0) for clock in ours for name in names)}
    made = [network for name in PHASES for network, _, _ in calls[name]]
    return {"phases": {name: measured([name]) for name in PHASES} | {"epoch": measured(PHASES)},
            "calls": {network: made.count(network) for network in networks(parts)},
            "figures": figures | ours[-1].figures(args.prompts_per_rollout * args.group)}


def show(result: dict):
    """Print a row for each phase: medians, and ranges. Only a GPU tells the peak of its memory by phase."""
    spread = lambda values: f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
    print("| phase | seconds, median (range) | floor | ratio | peak GiB |\n" + "|---" * 5 + "|")
    for name, found in result["phases"].items():
        seconds, bare = found["seconds"], found["floor_seconds"]
        cells = [name, spread(seconds), spread(bare), spread([a / b for a, b in zip(seconds, bare)]),
                 f"{found['peak_gib']:.2f}" if found["peak_gib"] else "-"]
        print(f"| {' | '.join(cells)} |")
    print(f"\nnetwork calls of an epoch: {result['calls']}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Time an epoch; more flags: train.py's", allow_abbrev=False)
    parser.add_argument("--arch", choices=("sd14",), help="random weights of its sizes, not the shapes world")
    parser.add_argument("--repeats", type=int, default=5, help="epochs measured, program and floor in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    own, rest = parser.parse_known_args(argv)
    args = train.parse_args(rest) if own.arch else shapes.train.parse(rest)
    print(log.heading(own.json))
    choose_device(args)
    name = (f"CPU, {torch.get_num_threads()} threads" if args.device == "cpu"
            else torch.cuda.get_device_name(args.device))
    print(f"{own.arch or args.model} on {name}, {args.precision}, torch {torch.__version__}; "
          f"{args.prompts_per_rollout} x {args.group} images, {args.steps} steps\n")
    result = measure(args, set_up(args, own.arch), own.repeats)
    show(result)
    if own.json:
        told = {"arch": own.arch, "device": name, "torch": torch.__version__, "flags": vars(args), **result}
        own.json.write_text(json.dumps(told, indent=1, default=str) + "\n")


if __name__ == "__main__":
    stop.run_script("bench.speed", main)
