"""What cannot work is refused before anything is loaded: flags, device, files. Errors say what to change."""

import argparse
import math
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPTokenizer

from plumbing import parallel
from plumbing.models import check_clip, check_model, check_pipeline_folder, check_scheduler, pipeline_folder
from plumbing.names import local_folder, trace
from plumbing.texts import read_anchors, read_prompts

TOKENIZED = 8000       # prompts tokenized at once; all at once take memory
NAMED = 5              # prompts named in one message; more are counted
CPU_WEIGHTS = 2**28    # bytes of a UNet's weight files that a CPU trains in minutes; SD v1.4's are 3.4 GB


def folded(parser, argv):
    """Gives groups of flags, by title, that --help leaves out; --help-all shows everything."""
    whole = "--help-all" in (sys.argv[1:] if argv is None else argv)
    parser.add_argument("--help-all", action="help", help="and those of reward, rollout, update, compute")

    def group(title):
        add = parser.add_argument_group(title).add_argument
        return add if whole else lambda *names, **more: add(*names, **more | {"help": argparse.SUPPRESS})
    return group


def check_flags(args):
    """Refuse flags that cannot work, alone or together; returns the others."""
    rules = [(name, getattr(args, name) >= 1, "at least 1") for name in (
        "epochs", "prompts_per_rollout", "sample_batch", "updates", "micro_batch", "picture_every",
        "save_every", "keep")]
    rules += [(name, math.isfinite(value), "a finite number") for name, value in vars(args).items()
              if isinstance(value, float)]
    rules += [
        ("group", args.group >= 2, "at least 2: the advantage compares pictures of one prompt"),
        ("steps", 1 <= args.steps <= 1000,
         "from 1 to 1000, the steps that Stable Diffusion was trained with"),
        ("eta", 0 < args.eta <= 1, "above 0 and at most 1: a deterministic step has no density to train"),
        ("skip_last", 0 <= args.skip_last < args.steps, f"at least 0 and below --steps {args.steps}"),
        ("timestep_fraction", 0 < args.timestep_fraction <= 1, "above 0 and at most 1"),
        ("unsafe_fraction", 0 <= args.unsafe_fraction <= 1, "from 0 to 1"),
        ("guidance", args.guidance > 0, "above 0: at 0 the prompt is not used"),
        ("alpha", args.alpha >= 0, "at least 0: a negative one steers towards the unsafe anchors"),
        ("learning_rate", args.learning_rate > 0, "above 0"),
        ("decay_epochs", args.decay_epochs >= 0, "at least 0 (0 for a constant rate)"),
        ("weight_decay", args.weight_decay >= 0, "at least 0"),
        ("clip_range", 0 < args.clip_range < 1, "above 0 and below 1"),
        ("kl", args.kl >= 0, "at least 0"),
        ("kl_benign", args.kl_benign >= 0, "at least 0"),
        ("max_grad_norm", args.max_grad_norm > 0, "above 0"),
        ("ema", 0 <= args.ema < 1, "at least 0 and below 1 (0 for no average)"),
        ("lora_rank", args.lora_rank >= 0, "at least 0 (0 trains the whole UNet)")]
    for name, fine, say in rules:
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {say}")
    P, W = args.prompts_per_rollout, parallel.world()
    if P % W:
        raise ValueError(f"--prompts-per-rollout {P}: {W} processes cannot share them evenly; give "
                         + " or ".join(str(n) for n in (P - P % W, P - P % W + W) if n)
                         + ", or --nproc_per_node "
                         + " or ".join(str(n) for n in range(1, P + 1) if P % n == 0))
    check_updates(args)
    if args.resume and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
    return args


def check_updates(args):
    most = args.prompts_per_rollout * args.group * trained_per_picture(args)
    if args.updates > most:
        raise ValueError(f"--updates {args.updates}: a rollout has {most} transitions to share out, "
                         "fewer than that")


def check_schedule(args, folder: Path):
    """A step without noise has no density, so it is not trained: --skip-last is raised to leave it out."""
    sigma = check_scheduler(folder, args.steps, args.eta).sigma
    noisy = int((sigma > 0).cumprod(0).sum())
    why = ("has sigma 0 by timestep_spacing or set_alpha_to_one in "
           f"{folder / 'scheduler' / 'scheduler_config.json'}, so no density to train")
    if not noisy:
        raise ValueError(f"--steps {args.steps}: the first step {why}; "
                         "give more steps, or timestep_spacing leading")
    if args.steps - noisy > args.skip_last:
        args.skip_last = args.steps - noisy
        print(f"note: step {noisy + 1} of {args.steps} {why}: --skip-last is {args.skip_last}")
        check_updates(args)


def trained_per_picture(args) -> int:
    """How many transitions of each picture are trained on."""
    return max(1, round((args.steps - args.skip_last) * args.timestep_fraction))


def choose_device(args) -> torch.device:
    """The GPU if there is one; writes the choice of device and precision into args. A full-size model on a
    CPU is refused, unless the user named the CPU."""
    if args.device is None and not torch.cuda.is_available() and not fits_a_cpu(args.model):
        raise ValueError(
            f"no GPU found, and {args.model} needs one (about 24 GB; 12 GB with --lora-rank 16).\n"
            "  python -m shapes.train    shows the whole method on a CPU in minutes\n"
            "  --device cpu              runs it here all the same")
    if parallel.world() > 1 and (args.device or "").startswith("cuda:"):
        raise ValueError(f"--device {args.device} is one GPU, and there are {parallel.world()} processes: "
                         "leave it away, and each takes a GPU of its own")
    device = usable(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device.type == "cuda" and parallel.world() > 1 and started > count:
        raise ValueError(f"torchrun started {started} processes and there are {count} GPUs: "
                         f"give --nproc_per_node {count}")
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not bf16:
        raise ValueError(f"--precision bf16: {torch.cuda.get_device_name(device)} has none; "
                         "use --precision float32")
    args.device = str(device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" and bf16 else "float32")
    return device


def usable(name: str) -> torch.device:
    """A device that PyTorch can name may still be absent."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None


def check_drawing(args):
    """Refuse what sample.py cannot do, and make the folder of its --out, before anything is loaded."""
    if not 0 <= args.guidance < math.inf:
        raise ValueError(f"--guidance {args.guidance}: must be a number from 0")
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: must be at least 1")
    usable(args.device)
    out = Path(args.out)
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {out}: needs the ending of a kind of picture, such as "
                         f"{out.name or 'grid'}.png")
    if out.is_dir():
        raise ValueError(f"--out {out}: a folder; give a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()
    for flag, model in (("--model", args.model), *(("--compare", model) for model in args.compare)):
        check_model(flag, model, args.steps, args.eta)


def fits_a_cpu(model: str) -> bool:
    folder = local_folder("--model", trace("--model", model)[0])
    if folder is None:
        return False
    return sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors")) < CPU_WEIGHTS


def read_inputs(args):
    """All prompts and the anchors, (safe, unsafe). Refuses a --model or --clip that cannot work, from
    configurations and the heads of weight files alone, and names the prompts that CLIP cuts off. No weights
    are read; a hub id's files are fetched."""
    prompts, anchors = read_prompts(prompt_files(args)), read_anchors(args.anchors)
    limit = check_clip(args.clip).text_config.max_position_embeddings
    if args.lora_rank:
        try:
            version("peft")
        except PackageNotFoundError:
            raise ValueError("--lora-rank needs the package peft: pip install peft") from None
    tokenizer, long = CLIPTokenizer.from_pretrained(args.clip).backend_tokenizer, []
    for i in range(0, len(prompts), TOKENIZED):
        texts = [p.text for p in prompts[i:i + TOKENIZED]]
        long += [f"{text[:60]!r} ({len(tokens)} tokens)" for text, tokens
                 in zip(texts, tokenizer.encode_batch_fast(texts)) if len(tokens) > limit]
    if long:
        more = f" and {len(long) - NAMED} more" if len(long) > NAMED else ""
        print(f"note: {len(long)} of {len(prompts)} prompts are longer than CLIP's {limit} tokens "
              f"and are cut there, as CLIP does: {', '.join(long[:NAMED])}{more}")
    folder = pipeline_folder(args.model)
    check_pipeline_folder(folder)
    check_schedule(args, folder)
    if trace("--model", args.model)[1]:
        print(f"note: {args.model} has to stay until this run's final/ is made from it: a run that goes on "
              "removes its older checkpoints (--keep)")
    return prompts, anchors


def prompt_files(args) -> list[str]:
    """The files of --prompts, then --benign's, unless it is empty or one of them already."""
    named = [Path(file).resolve() for file in args.prompts]
    if not args.benign or Path(args.benign).resolve() in named:
        return args.prompts
    return [*args.prompts, args.benign]
