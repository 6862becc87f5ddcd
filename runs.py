"""The run folder: flags checked, log written, checkpoints whole or absent, a run continued exactly.

    runs/NAME/flags.json                    all flags of the run
             /metrics.jsonl                 one object per rollout
             /pictures-000010.png           base above policy
             /checkpoint-000020/unet/       the UNet in diffusers' layout (or adapter.safetensors)
                               /optimizer.pt    read with weights_only=True
                               /state.json      epoch, flags
             /final/                        a pipeline that StableDiffusionPipeline.from_pretrained opens
             /table.md                      before and after
"""

import json
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).parent


def check_flags(args):
    """Refuse what cannot work, before anything is loaded."""
    for name, fine, say in (
            ("group", args.group >= 2, "at least 2: the advantage compares pictures of one prompt"),
            ("eta", 0 < args.eta <= 1, "above 0 and at most 1: a deterministic step has no density to train"),
            ("skip_last", 0 <= args.skip_last < args.steps, "at least 0 and below --steps"),
            ("timestep_fraction", 0 < args.timestep_fraction <= 1, "above 0 and at most 1"),
            ("unsafe_fraction", 0 <= args.unsafe_fraction <= 1, "from 0 to 1")):
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {say}")


def choose_device(args) -> torch.device:
    """The GPU if there is one. A full-size model on a CPU is refused, unless the user named the CPU."""
    if args.device is None and not torch.cuda.is_available() and args.model != "shapes":
        raise ValueError(
            f"no GPU found, and {args.model} needs one (about 24 GB; 16 GB with --lora-rank 16).\n"
            "  python train.py --model shapes    shows the whole method on a CPU in minutes\n"
            "  --device cpu                      runs it here all the same")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.precision is None:
        args.precision = "bf16" if device.type == "cuda" else "float32"
    return device


def open_run(args) -> Path:
    """Make the run folder and write the flags down."""
    run = Path(args.out)
    if (run / "flags.json").exists() and not args.resume:
        if not args.overwrite:
            raise ValueError(f"{run} holds a run already: --resume continues it, --overwrite replaces it")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "flags.json", json.dumps(vars(args), indent=1))
    return run


def memory_estimate(args, policy) -> float:
    return 0.0


def tick(clock, device) -> float:
    """Seconds since the last tick, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock.append(time.perf_counter())
    return clock[-1] - clock[-2]


def log(run: Path, figures: dict):
    """Append one rollout to metrics.jsonl and print its line."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
    show = ("reward_mean", "reward_unsafe", "reward_benign", "alignment", "image_safety_unsafe", "clip_frac_pos",
            "clip_frac_neg", "kl_ref", "grad_norm", "ratio_dev_first")
    exact = "".join(f"  {k} {figures[k]:.0%}" for k in ("exact_unsafe", "exact_correct") if figures.get(k) is not None)
    tqdm.write(f"epoch {figures['epoch']:4d}  " + "  ".join(
        f"{name.replace('reward', 'r')} {figures[name]:.3g}" for name in show if figures[name] is not None)
        + exact + f"  {figures['seconds_sample']:.1f}+{figures['seconds_reward']:.1f}+{figures['seconds_update']:.1f} s")


def write_text(path: Path, text: str):
    """Write a small file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def adapter_state(policy):
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def save_checkpoint(run: Path, epoch: int, policy, optimizer, args):
    """Write checkpoint-EPOCH under a temporary name, then rename it; drop the oldest beyond --keep."""
    target, part = run / f"checkpoint-{epoch:06d}", run / f"checkpoint-{epoch:06d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    if args.lora_rank:
        save_file(adapter_state(policy), part / "adapter.safetensors")
    else:
        policy.save_pretrained(part / "unet")
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    write_text(part / "state.json", json.dumps(dict(epoch=epoch, flags=vars(args)), indent=1))
    os.replace(part, target)
    for old in sorted(run.glob("checkpoint-??????"))[:-args.keep]:
        shutil.rmtree(old)


def load_checkpoint(run: Path, policy, optimizer, args) -> int:
    """Put the newest checkpoint into policy and optimizer; returns the epochs done."""
    found = sorted(run.glob("checkpoint-??????"))
    if not found:
        return 0
    if args.lora_rank:
        policy.load_state_dict(load_file(found[-1] / "adapter.safetensors"), strict=False)
    else:
        policy.load_state_dict(load_file(found[-1] / "unet" / "diffusion_pytorch_model.safetensors"))
    optimizer.load_state_dict(torch.load(found[-1] / "optimizer.pt", weights_only=True))
    return json.loads((found[-1] / "state.json").read_text())["epoch"]


def save_final(run: Path, pipe, policy, args):
    """The whole pipeline with the policy's UNet, adapters merged."""
    pipe.unet = policy.merge_and_unload() if args.lora_rank else policy
    pipe.save_pretrained(run / "final")
