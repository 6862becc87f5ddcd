"""Speed and memory of one epoch, against the bare network calls that it cannot do without.

The program runs an epoch (train.py's own functions) while every network call is recorded: which network, at
which batch shape, with or without a gradient. The floor replays exactly these calls on random numbers, with
nothing in between: no schedule, no log-probability, no loss, no optimizer. Their ratio is what the program
costs on top. The program's arithmetic is counted too (convolutions, matrix products, attention), as a share
of the rate of one large matrix product on the device.

    python bench.py --model shapes              # a CPU will do
    python bench.py --arch sd14                 # Stable Diffusion v1.4's shapes with random weights, one GPU
    python bench.py --arch sd14 --table --json bench.json --lora-rank 16 ...  # and any flag of train.py
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel,
                          CLIPTextConfig, CLIPTextModel, CLIPTokenizer)

import memory
import runs
import train
from grpo import group_advantages
from reward import ALIASES as CLIP_ALIASES
from reward import SteeringReward, read_anchors, read_prompts
from sample import DECODE_BATCH, ddim_schedule, encode_prompts, load_pipeline

PHASES = ("sample", "reward", "update")


# -------------------------------------------------------------------------------- networks

def sd14_pipeline(device, sample_size: int = 64) -> StableDiffusionPipeline:
    """CompVis/stable-diffusion-v1-4's published configuration with random weights; its tokenizer's vocabulary
    is not at hand, so the shapes world's stands in, at the full length of 77 tokens.
    sample_size: width of the latents."""
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=sample_size, cross_attention_dim=768)  # the rest: defaults
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                            down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072,
                                            num_hidden_layers=12, num_attention_heads=12, eos_token_id=49407))
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_ALIASES["shapes"], model_max_length=77)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                   requires_safety_checker=False)
    for part in (unet, vae, text):
        part.requires_grad_(False).eval()
    return pipe


def vit_h14_config() -> CLIPConfig:
    """laion/CLIP-ViT-H-14-laion2B-s32B-b79K's published configuration."""
    return CLIPConfig(projection_dim=1024,
                      text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                       num_attention_heads=16, hidden_act="gelu", projection_dim=1024),
                      vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                                         patch_size=14, num_attention_heads=16, hidden_act="gelu",
                                         projection_dim=1024))


def vit_h14(device, dtype):
    """It with random weights, as reward.load_clip has it,
    with the end-of-text sign of the stand-in tokenizer."""
    config, tokenizer = vit_h14_config(), CLIPTokenizer.from_pretrained(
        CLIP_ALIASES["shapes"], model_max_length=77)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    with torch.device(device):
        clip = CLIPModel(config).to(dtype)
    return clip, tokenizer, CLIPImageProcessor()


class Job:
    """All that an epoch needs, built as train.main builds it, and the epoch itself. latents: 0, or their
    width with random weights of SD v1.4's shapes in place of args.model and args.clip."""

    def __init__(self, args, latents: int, compiled: bool = False):
        self.args, self.device = args, torch.device(args.device)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        clip = vit_h14(self.device, dtype) if latents else args.clip
        anchors = read_anchors("shapes" if latents else args.anchors)  # the stand-in tokenizer knows no other
        self.reward = SteeringReward(clip, anchors, args.alpha, args.direction == "unit", args.steer,
                                     self.device, dtype)
        self.pipe = sd14_pipeline(self.device, latents) if latents else load_pipeline(args.model, self.device)
        prompts = read_prompts(args.prompts)
        unsafe = [self.reward.is_unsafe(p) for p in prompts]
        self.pools = [[p for p, u in zip(prompts, unsafe) if u == side] for side in (True, False)]
        self.text = dict(zip(prompts, encode_prompts(self.pipe, [p.text for p in prompts])))
        self.null_text = encode_prompts(self.pipe, [""])
        self.schedule = ddim_schedule(self.pipe.scheduler, args.steps, args.eta).to(self.device)
        self.policy, self.base = train.make_policy(self.pipe.unet, args, self.device)
        if compiled:
            self.policy.compile(), self.base.compile()
        self.optimizer = torch.optim.AdamW([p for p in self.policy.parameters() if p.requires_grad],
                                           lr=args.learning_rate, fused=self.device.type == "cuda")
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16,
                                               enabled=args.precision == "bf16")

    def epoch(self, epoch: int, phase):
        """Sample, reward, update, by train.py's own functions;
        phase(name) is a context around each of them."""
        args, prediction_type = self.args, self.pipe.scheduler.config.prediction_type
        with phase("sample"):
            chosen = train.choose_prompts(*self.pools, args, epoch)
            batch, images = train.sample_groups(self.policy, self.pipe, self.schedule, chosen, self.text,
                                                self.null_text, args, epoch, self.autocast)
        with phase("reward"):
            rewards, _, _ = self.reward.score(images, batch["prompts"])
            batch["advantages"] = group_advantages(rewards.view(len(chosen), args.group),
                                                   args.advantage_eps).flatten()
        with phase("update"):
            stats = train.update(self.policy, self.base, self.optimizer, self.schedule, batch, args,
                                 self.autocast, prediction_type, epoch)
            self.optimizer.zero_grad(set_to_none=True)
        return stats


# -------------------------------------------------------------------------------- recording and replay

@contextmanager
def recorded(job, calls: list):
    """While it is open, append every network call of the program to `calls`:
    (network, shape of its input, gradient)."""
    restore = []

    def watch(owner, name, network):
        original = getattr(owner, name)

        def call(*given, **named):
            shapes = [tuple(x.shape) for x in (*given, *named.values()) if torch.is_tensor(x)]
            with_grad = torch.is_grad_enabled() and network == "unet"
            calls.append((network, shapes[0], with_grad))
            return original(*given, **named)
        setattr(owner, name, call)
        restore.append((owner, name))

    watch(job.policy, "forward", "unet")
    if job.base is not job.policy:
        watch(job.base, "forward", "base")
    watch(job.pipe.vae, "decode", "vae")
    watch(job.reward.clip, "get_image_features", "clip")
    watch(job.reward.clip, "get_text_features", "text")
    yield
    for owner, name in restore:
        delattr(owner, name)  # the method of the class is behind it


def replay(job, network: str, shape: tuple, with_grad: bool):
    """One call of a network on random numbers, nothing else."""
    unet_like = dict(unet=job.policy, base=job.base)
    dtype = {"vae": job.pipe.vae.dtype, "clip": job.reward.clip.dtype}.get(network, torch.float32)
    # not zeros, on which a GPU draws less power and runs faster
    x = torch.randn(shape, device=job.device, dtype=dtype)
    if network == "vae":
        job.pipe.vae.decode(x)
    elif network == "clip":
        job.reward.clip.get_image_features(pixel_values=x)
    else:
        text = job.null_text.expand(len(x), -1, -1)
        out = unet_like[network](x, torch.ones(len(x), device=job.device, dtype=torch.long),
                                 encoder_hidden_states=text)
        if with_grad:
            out.sample.float().mean().backward()


def floor(job, calls: dict, phase):
    """The recorded calls of each phase, bare."""
    for name in PHASES:
        with phase(name):
            grouped = job.autocast if name == "sample" else nullcontext  # weights are cast once per rollout
            with grouped():
                for network, shape, with_grad in calls[name]:
                    if network == "text":
                        continue  # prompts are embedded once in a run, not once an epoch
                    inner = job.autocast if name == "update" else nullcontext
                    with inner(), torch.enable_grad() if with_grad else torch.no_grad():
                        replay(job, network, shape, with_grad)
    job.optimizer.zero_grad(set_to_none=True)


def calls_needed(args, transitions: int) -> dict:
    """By arithmetic: network calls of one epoch. transitions: pairs of picture and step that were trained."""
    images = args.prompts_per_rollout * args.group
    shares = ([len(part) for part in torch.arange(transitions).tensor_split(args.updates)]
              if transitions else [])
    micro = sum(math.ceil(n / args.micro_batch) for n in shares)
    reference = micro if args.kl else 0
    unet = args.steps * math.ceil(images / args.sample_batch) + micro
    lora = bool(args.lora_rank)
    return {"unet": unet + lora * reference, "base": 0 if lora else reference,
            "vae": math.ceil(images / DECODE_BATCH), "clip": math.ceil(images / 32)}


# -------------------------------------------------------------------------------- measuring

class Clock:
    """Seconds and peak memory of each phase, over repetitions."""

    def __init__(self, device):
        self.device, self.seconds, self.peak = device, defaultdict(list), defaultdict(float)

    @contextmanager
    def __call__(self, name):
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            self.peak[name] = max(self.peak[name], torch.cuda.max_memory_allocated() / 2**30)
        self.seconds[name].append(time.perf_counter() - start)


def matrix_rate(args) -> float:
    """Floating-point operations per second of a large matrix product in the precision of args,
    the best of ten."""
    device = torch.device(args.device)
    n, clock = 8192 if device.type == "cuda" else 1024, Clock(device)
    factor = torch.randn(n, n, device=device,
                         dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    for _ in range(10):
        with clock("product"):
            factor @ factor
    return 2 * n**3 / min(clock.seconds["product"])


def measure(args, latents: int, repeats: int, compiled: bool = False) -> dict:
    """One configuration: program and floor in turn, after one epoch of each to warm up."""
    job = Job(args, latents, compiled)
    calls, flops, ours, bare = {name: [] for name in PHASES}, {}, Clock(job.device), Clock(job.device)

    @contextmanager
    def recording(name):
        counter = FlopCounterMode(display=False)  # it cannot look into compiled code
        with recorded(job, calls[name]), nullcontext() if compiled else counter:
            yield
        flops[name] = counter.get_total_flops()

    stats = job.epoch(0, recording)
    floor(job, calls, lambda name: nullcontext())
    for repeat in range(repeats):
        stats = job.epoch(1 + repeat, ours)
        floor(job, calls, bare)
    made = {network: sum(call[0] == network for name in PHASES for call in calls[name])
            for network in ("unet", "base", "vae", "clip")}
    images = args.prompts_per_rollout * args.group
    result = {"images": images, "calls_made": made, "calls_needed": calls_needed(args, stats["pairs"]),
              "ratio_dev_first": stats["ratio_dev_first"],
              "predicted_memory_gb": memory.estimate(args, job.policy, job.reward.clip.config)}
    result["matrix_rate"], flops["epoch"] = matrix_rate(args), sum(flops.values())
    for name in (*PHASES, "epoch"):
        own, low = ([sum(times) for times in zip(*clock.seconds.values())] if name == "epoch"
                    else clock.seconds[name] for clock in (ours, bare))
        result[name] = {"seconds": own, "floor_seconds": low, "ratio": [a / b for a, b in zip(own, low)],
                        "images_per_second": images / statistics.median(own), "flops": flops[name],
                        "matrix_share": flops[name] / statistics.median(own) / result["matrix_rate"],
                        "peak_memory_gb": (max(ours.peak.values(), default=0) if name == "epoch"
                                           else ours.peak[name])}
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
          f"memory predicted {result['predicted_memory_gb']:.1f} GB; "
          f"a large matrix product has {result['matrix_rate'] / 1e12:.3g} TFLOP/s")


def variants(args) -> dict:
    """What the table varies, one thing at a time: {name: (flags, compiled)}."""
    micro, batch = args.micro_batch, args.sample_batch
    return {
        f"micro-batch {micro // 2}": (dict(micro_batch=micro // 2), False),
        f"micro-batch {micro * 2}": (dict(micro_batch=micro * 2), False),
        f"sample batch {batch // 2}": (dict(sample_batch=batch // 2), False),
        f"sample batch {batch * 2}": (dict(sample_batch=batch * 2), False),
        f"checkpointing {'on' if args.no_checkpointing else 'off'}": (
            dict(no_checkpointing=not args.no_checkpointing), False),
        "compiled": ({}, True),
        "full" if args.lora_rank else "LoRA, rank 16": (dict(lora_rank=0 if args.lora_rank else 16), False),
        f"group {2 * args.group}": (dict(group=2 * args.group), False)}


def main():
    parser = argparse.ArgumentParser(
        description="Time an epoch against bare network calls. Other flags: see train.py.",
        allow_abbrev=False)
    parser.add_argument("--arch", choices=("sd14",), help="random weights at this size instead of --model")
    parser.add_argument("--latents", type=int, default=64,
                        help="their width with --arch; 8 lets a CPU try it")
    parser.add_argument("--repeats", type=int, default=5, help="epochs measured, program and floor in turn")
    parser.add_argument("--table", action="store_true",
                        help="also vary micro-batch, sampling batch, ... one at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    own, rest = parser.parse_known_args()
    if own.latents < 8 or own.latents % 8:
        raise ValueError(f"--latents {own.latents}: must be a multiple of 8, "
                         "which the UNet halves three times")
    latents = own.latents if own.arch else 0
    args = train.parse_args(rest)
    device = runs.choose_device(args)
    name = f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{own.arch or args.model} on {name}, {args.precision}, torch {torch.__version__}; "
          f"{args.prompts_per_rollout} x {args.group} images, {args.steps} steps, guidance {args.guidance}, "
          + (f"latents {latents} wide, " if latents else "") + f"{own.repeats} repetitions")
    results = {"as given": measure(args, latents, own.repeats)}
    print_result(results["as given"])
    if own.table:
        print("\n| variant | sample s | update s | epoch s | epoch / floor | images/s | peak GB |\n"
              f"{'|---' * 7}|")
        for label, (changes, compiled) in {"as given": ({}, False), **variants(args)}.items():
            if label not in results:
                changed = argparse.Namespace(**vars(args) | changes)
                results[label] = measure(changed, latents, own.repeats, compiled)
            r = results[label]
            print(f"| {label} | "
                  + " | ".join(spread(r[name]["seconds"]) for name in ("sample", "update", "epoch"))
                  + f" | {spread(r['epoch']['ratio'])} | {r['epoch']['images_per_second']:.3g} "
                  f"| {peak(r['epoch']['peak_memory_gb'])} |", flush=True)
    if own.json:
        own.json.write_text(json.dumps(
            {"device": name, "torch": torch.__version__, "flags": vars(args), "results": results},
            indent=1, default=str) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")
