"""What a run will take: a call of each kind is timed before the first rollout, and all are counted. A card
that is too small shows itself here, not after an hour. No weight moves. --dry-run ends after this."""

import math
import shutil
from pathlib import Path

import torch

from plumbing import log, parallel
from plumbing.models import tensor_bytes, trained
from plumbing.prompts import Prompt
from sample import DECODE_BATCH, Rollout, autocast, encode_prompts, image_generator, predict_noise

SLOW = 1     # seconds of a CPU's call on one row, from which on those of a batch are computed from it
SCORED = 32  # pictures that the reward gives to CLIP at once
DAY, GIB = 86400, 2**30
# GiB at the peak of Stable Diffusion 1.x and 2.x, by bench.memory; CUDA itself takes up to 1 more
LINES = ((7.4, "--lora-rank 16"), (11.0, "--layers cross-attention"), (20.6, "the default flags"),
         (25.9, "--micro-batch 16 --sample-batch 16"))


def time_calls(args, parts, loss_on) -> log.Clock:
    """Seconds of a call of each kind: made on one row, then on a batch, which counts. loss_on: train's."""
    rows, vae = max(args.sample_batch, args.micro_batch, DECODE_BATCH), parts.pipe.vae
    x = torch.randn(rows, 2, *parts.latent_shape, generator=image_generator("estimate")).to(parts.device)
    text, null = encode_prompts(parts.pipe, ["estimate", ""]).split(1)
    batch = Rollout(x, x.new_zeros(rows, 1), text.expand(rows, -1, -1), null, [])
    pairs, ones, t = torch.zeros(rows, 2).long().to(x.device), x.new_ones(rows), parts.schedule.timesteps[0]
    picture = x.new_zeros(1, 3, *(parts.pipe.vae_scale_factor * side for side in parts.latent_shape[1:]))
    own, clock = Prompt("estimate", unsafe=False), log.Clock(parts.device)
    for kind, size, call in (
            ("sample", args.sample_batch, lambda n: predict_noise(
                parts.policy, x[:n, 0], t, batch.text[:n], null, args.guidance)),
            ("decode", DECODE_BATCH, lambda n: vae.decode(x[:n, 0].to(vae.dtype))),
            ("score", SCORED, lambda n: parts.reward.score(picture.expand(n, -1, -1, -1), [own] * n)),
            ("update", args.micro_batch, lambda n: loss_on(
                parts, batch, pairs[:n], None, ones, ones > 0, args)[0].backward())):
        dtype = parts.dtype if kind in ("sample", "decode") else torch.float32  # loss_on has its own
        row = clock.seconds.get("sample", 0) / args.sample_batch
        if kind == "update" and parts.device.type == "cpu" and row > SLOW:  # a backward pass takes two calls
            passes = 3 + (not args.no_checkpointing) + bool(args.kl or args.kl_benign)
            clock.seconds[kind] = passes * row * size
            continue
        for n in (1, size):
            with clock(kind), torch.set_grad_enabled(kind == "update"), autocast(parts.device, dtype):
                call(n)
            if parts.device.type == "cpu" and clock.seconds[kind] > SLOW:
                clock.seconds[kind] *= size / n
                break
    parts.optimizer.zero_grad(set_to_none=True)
    clock.seconds["again"] = clock.seconds["sample"] * args.micro_batch / args.sample_batch
    return clock


def count_calls(args) -> dict:
    """{kind: calls in a rollout and its update}, of one process; "again": those of train.old_log_probs."""
    U, pictures = args.updates, args.prompts_per_rollout // parallel.world() * args.group
    share = math.ceil(math.ceil(pictures * log.per_picture(args) / U) / args.micro_batch)
    return {"sample": args.steps * math.ceil(pictures / args.sample_batch),
            "decode": math.ceil(pictures / DECODE_BATCH), "score": math.ceil(pictures / SCORED),
            "update": U * share, "again": (args.precision == "bf16") * ((U - 1) * share + 1)}


def show_estimate(args, parts, loss_on):
    """Print a rollout's and the run's time, what takes less where that is over a day, the disk, and what
    fits the card. Raises torch.OutOfMemoryError where a call does not."""
    clock, calls = time_calls(args, parts, loss_on), count_calls(args)
    took = {kind: n * clock.seconds[kind] for kind, n in calls.items()}
    whole, update = (args.epochs * sum(map(took.get, kinds)) for kinds in (took, ("update", "again")))
    print(f"time     {log.duration(whole / args.epochs)} a rollout, {log.duration(whole)} in all, no grids: "
          + ", ".join(f"{kind} {n} x {clock.seconds[kind]:.3g} s" for kind, n in calls.items() if n))
    if whole > DAY:
        print(f"         half of --timestep-fraction {log.duration(whole - update / 2)}, half of --steps or "
              f"--epochs {log.duration(whole / 2)}; what they cost in learning is not measured")
    count = lambda *networks: 4 * sum(weight.numel() for one in networks for weight in one.parameters())
    base, unet = count(parts.pipe.vae, parts.pipe.text_encoder), count(parts.pipe.unet)
    learnt = tensor_bytes(trained(parts.policy))
    moments = 2 * learnt
    each = moments + learnt * bool(args.ema) + (learnt if args.lora_rank else unet + base)
    there = next(path for path in (Path(args.out), *Path(args.out).absolute().parents) if path.exists())
    needed, free = base + args.keep * each + max(each, base + unet), shutil.disk_usage(there).free
    print(f"disk     {needed / GIB:.1f} GiB: {args.keep} checkpoints, base/, and one more or final/; "
          f"free {free / GIB:.1f}" + "\nwarning: make room, or lower --keep" * (
              free < needed and not args.resume and not args.overwrite))  # which have a part of it already
    room = math.inf
    if parts.device.type == "cuda":
        room = (torch.cuda.mem_get_info(parts.device)[0] + torch.cuda.memory_reserved(parts.device)) / GIB
        pictures = args.prompts_per_rollout // parallel.world() * args.group
        latents = 4 * pictures * (args.steps + 1) * math.prod(parts.latent_shape)
        peak = max(clock.peaks.values()) + (latents + moments) / GIB  # yet to come
        print(f"card     {torch.cuda.get_device_name(parts.device)}: {peak:.1f} of {room:.1f} GiB are needed"
              + "\nwarning: these flags do not fit: smaller batches, or what is named next" * (peak > room))
    if 8.5e8 < unet / 4 < 9e8:
        print("GPU fits " + (", ".join(f"{flags} ({gib} GiB)" for gib, flags in LINES if gib <= room)
                             or "nothing in docs/speed.md"))
