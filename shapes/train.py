"""Make the shapes world safe: train.py with this world's networks, prompts and flags, and an exact judge.

    python -m shapes.train                     # minutes on a laptop; any flag of train.py may follow
    python -m shapes.train --epochs 2 --out runs/try

The judge's figures, exact_unsafe and exact_correct, are logged and shown; the reward never sees them.
"""

import os
import sys
from pathlib import Path

import torch
from torch.distributions import Categorical

import train
from plumbing import checks, stop
from plumbing.texts import read_prompts
from reward import Prompt
from shapes import GUIDANCE, STEPS, WEIGHTS, pixels
from shapes.scenes import TASKS, evaluation_prompts, read_caption

HERE = Path(__file__).parent
TABLE_CAPTIONS = 24                  # of each category, in the table at the end
COLORLESS = TASKS[:2]                # single objects and pairs, whose colours are the painter's choice
HARMLESS_CATEGORIES = (*TASKS, "calm")  # of that table: benign ones, by their own names


def here(path: Path) -> str:
    """As one would write it in the current folder."""
    return os.path.relpath(path)


# Where this world differs from Stable Diffusion.
FLAGS = [
    "--model", here(WEIGHTS), "--clip", here(WEIGHTS / "text_encoder"),
    "--anchors", here(HERE / "anchors.txt"),
    "--prompts", here(HERE / "prompts.txt"), "--benign", "",  # whose [benign] section holds utility
    "--out", "runs/shapes",
    # A CLIP in which explicit captions lie up to 0.58 on the unsafe side: 0.5 would leave some targets there.
    "--alpha", "1.0",
    "--epochs", "60", "--prompts-per-rollout", "8", "--group", "8", "--unsafe-fraction", "0.25",
    "--steps", str(STEPS), "--guidance", str(GUIDANCE),
    # D = 256 instead of 16,384: a mean over it moves 8 times as far from noise alone.
    "--clip-range", "5e-3", "--kl", "0.01", "--kl-benign", "0.2",
    # A network small enough for a larger rate.
    "--learning-rate", "3e-4", "--decay-epochs", "6", "--updates", "4", "--ema", "0.9",
    # Equal, so that rollout and update call the network at one shape: the first ratio is 1 to the last bit.
    "--sample-batch", "32", "--micro-batch", "32",
    # Small enough, too, for float32 on a GPU, so that a run is the same wherever it is.
    "--precision", "float32",
    "--no-checkpointing", "--show-unsafe", "--save-every", "20", "--picture-every", "10"]


def judge(images, prompts: list[Prompt], unsafe) -> dict:
    """What the pixels say: share of the unsafe prompts' pictures that show red, of the benign prompts' that
    show what the caption says, and the effective number of colours on benign captions that name no colour;
    None where there is no such picture. unsafe (B,) bool."""
    found, red = pixels.detect(images), pixels.is_unsafe(images.cpu()).float()
    benign = [(read_caption(p.text), p.text, objects)
              for p, objects, hidden in zip(prompts, found, unsafe.tolist()) if not hidden]
    correct = [pixels.is_correct(text, objects) for _, text, objects in benign]
    colors = [pixels.color_counts(objects) for scene, _, objects in benign if scene.task in COLORLESS]
    counts = torch.tensor(colors).sum(0).float()
    return {"exact_unsafe": red[unsafe].mean().item() if unsafe.any() else None,
            "exact_correct": sum(correct) / len(correct) if correct else None,
            "exact_variety": Categorical(counts).entropy().exp().item() if colors and counts.any() else None}


def parse(argv: list):
    """This world's flags, with those of argv in their place."""
    return train.parse_args([*FLAGS, *argv])


def main(argv=None):
    words = [*FLAGS, *(sys.argv[1:] if argv is None else argv)]
    for prompt in read_prompts(checks.prompt_files(train.parse_args(words))):
        read_caption(prompt.text)  # refused here, before anything is loaded, and not by the judge
    table = [Prompt(*pair) for pair in evaluation_prompts(TABLE_CAPTIONS)]
    train.main(words, judge, [(p, p.category not in HARMLESS_CATEGORIES) for p in table])


if __name__ == "__main__":
    stop.run_script("shapes.train", main)
