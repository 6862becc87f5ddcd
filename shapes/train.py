"""Make the shapes world safe: train.py with this world's networks, prompts and flags, and an exact judge.

    python -m shapes.train                     # minutes on a laptop; any flag of train.py may follow
    python -m shapes.train --epochs 2 --out runs/try

The judge's figures, exact_unsafe and exact_correct, are logged and shown; the reward never sees them.
"""

import os
import shlex
import sys
from pathlib import Path

import torch
from torch.distributions import Categorical

import train
from plumbing import stop
from plumbing.prompts import Prompt, read_prompts
from shapes import GUIDANCE, STEPS, WEIGHTS, pixels
from shapes.scenes import COLORS, TASKS, evaluation_prompts, read_caption

HERE = Path(__file__).parent
TABLE_CAPTIONS = 24    # of each category, in the table at the end; none with one red object is trained on

# Where this world differs from Stable Diffusion.
FLAGS = ["--model", os.path.relpath(WEIGHTS), "--clip", os.path.relpath(WEIGHTS / "text_encoder"),
         "--anchors", os.path.relpath(HERE / "anchors.txt"),
         "--prompts", os.path.relpath(HERE / "prompts.txt"), *shlex.split(f"""
    --benign ""  # prompts.txt has a section [benign], which holds utility
    --out runs/shapes
    # Explicit captions lie up to 0.58 on this CLIP's unsafe side: 0.5 would leave some targets there.
    --alpha 1.0
    --epochs 60 --prompts-per-rollout 8 --group 8 --unsafe-fraction 0.25 --steps {STEPS} --guidance {GUIDANCE}
    # D = 256 instead of 16,384: a mean over it moves 8 times as far from noise alone.
    --clip-range 5e-3 --kl 0.01 --kl-benign 0.2
    # What reads the prompt learns alone: what is unlearnt on pairs holds for single objects, too
    # (docs/shapes.md). So few weights bear a larger rate.
    --layers cross-attention --learning-rate 3e-3 --decay-epochs 6 --updates 4 --ema 0.9
    # Equal, so that rollout and update call the network at one shape: the first ratio is 1 to the last bit.
    --sample-batch 32 --micro-batch 32
    --precision float32  # this world is small enough for it on a GPU, too
    --no-checkpointing --show-unsafe --save-every 20 --picture-every 10""", comments=True)]


def judge(images, prompts: list[Prompt]) -> dict:
    """What the pixels say of some pictures, None where it does not apply: share that shows red, share that
    shows what the caption says, effective number of colours on captions that name none. train.py takes the
    first from unsafe prompts and the others from benign ones. images (B, 3, 64, 64) on the CPU."""
    if not prompts:
        return dict.fromkeys(("exact_unsafe", "exact_correct", "exact_variety"))
    found = pixels.detect(images)
    correct = [pixels.is_correct(p.text, objects) for p, objects in zip(prompts, found)]
    free = [o.color for p, objects in zip(prompts, found) for o in objects
            if read_caption(p.text).task in TASKS[:2]]  # whose captions name no colour
    counts = torch.tensor([free.count(color) for color in COLORS]).float()
    return {"exact_unsafe": pixels.is_unsafe(images).float().mean().item(),
            "exact_correct": sum(correct) / len(correct),
            "exact_variety": Categorical(counts).entropy().exp().item() if counts.any() else None}


def parse(argv: list):
    """This world's flags, with those of argv in their place."""
    return train.parse_args([*FLAGS, *argv])


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = parse(words)
    prompts, _ = read_prompts([*args.prompts, *([args.benign] if args.benign else [])])
    for prompt in prompts:
        read_caption(prompt.text)  # refused here, before anything is loaded, and not by the judge
    table = [Prompt(text, category, unsafe=category not in (*TASKS, "calm"))
             for category, texts in evaluation_prompts(TABLE_CAPTIONS).items() for text in texts]
    train.main([*FLAGS, *words], judge, table if args.prompts == parse([]).prompts else None)


if __name__ == "__main__":
    stop.run_script("shapes.train", main)
