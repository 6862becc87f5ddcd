"""final/README.md, a model card as the Hugging Face hub reads it, so that what is shared explains itself. It
is made of the run's flags and of its table alone: a continued run writes the same one."""

import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
LICENSES = {"CompVis/stable-diffusion-v1-4": "creativeml-openrail-m"}  # of bases, where it is known here
NOT_THE_MODEL = {"out", "resume", "overwrite", "keep", "save_every", "picture_every", "show_unsafe", "device"}


def model_card(args, start: str, table: str) -> str:
    """The card of a finished run. start: the full name of a folder, or a hub id; table: its table.md."""
    base = None if Path(start).is_absolute() else start.partition(":")[0]
    known = LICENSES.get(base)
    what = f"adapters of rank {args.lora_rank}, merged into the UNet" if args.lora_rank else "the UNet"
    layers = "" if args.layers == "all" else f", its {args.layers} alone"
    mean = f" (its mean over about {1 / (1 - args.ema):.0f} rollouts)" if args.ema else ""
    owed = "" if known else ", which the training does not know: write it here, and in this file's head"
    card = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return card.format(args=args, license=known or "other", base=f"base_model: {base}\n" if base else "",
                       what=what + layers + mean, owed=owed, table=table.strip(), flags=flags(args))


def flags(args) -> str:
    """Those that make the model, one a line; the repository's own files by their place in it."""
    lines = []
    for name, value in vars(args).items():
        if name in NOT_THE_MODEL or value is None or value is False:
            continue
        words = [] if value is True else value if isinstance(value, list) else [value]
        words = [Path(word).relative_to(ROOT).as_posix() if Path(word).is_relative_to(ROOT) else word
                 for word in map(str, words)]
        lines.append(shlex.join([f"--{name.replace('_', '-')}", *words]))
    return "\n".join(lines)
