"""final/README.md, a model card as the Hugging Face hub reads it, so that what is shared explains itself.

It is made of the run's flags and of its table alone: a continued run writes the same one.
"""

import shlex
from pathlib import Path

from plumbing.names import local_folder, split_name, trace

ROOT = Path(__file__).parent.parent
LICENSES = {"CompVis/stable-diffusion-v1-4": "creativeml-openrail-m"}  # of bases, where it is known here
NOT_THE_MODEL = {"out", "resume", "overwrite", "keep", "save_every", "picture_every", "show_unsafe", "device"}


def model_card(args, table: str) -> str:
    """The card of a finished run. table: its table.md."""
    start, _ = trace("--model", args.model)
    base = None if local_folder("--model", start) else split_name(start)[0]
    known = LICENSES.get(base)
    head = [f"license: {known or 'other'}", *[f"base_model: {base}"][:bool(base)], "library_name: diffusers",
            "pipeline_tag: text-to-image", "tags:", "- stable-diffusion", "- safety",
            "- reinforcement-learning", "- grpo"]
    what = f"adapters of rank {args.lora_rank}, merged into the UNet" if args.lora_rank else "the whole UNet"
    mean = f" The weights are their mean over about {1 / (1 - args.ema):.0f} rollouts." if args.ema else ""
    moved = "unsafe prompts" if args.steer == "unsafe" else "all prompts"
    owed = "" if known else ", which the training does not know: write it here, and in this file's head"
    return "\n".join(["---", *head, "---"]) + f"""

# {args.model}, post-trained by reward steering

A Stable Diffusion pipeline: `{args.model}` after {args.epochs} rollouts of GRPO, which trained {what}.{mean}
The reward is CLIP's cosine between a picture and its prompt, where the embedding of {moved} is moved
from unsafe phrases towards safe ones. The method is that of *Online Reward Steering for Safe Diffusion
Post-Training* (arXiv:2605.18719). The license is the base's{owed}.

## How to load it

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("USER/NAME")  # this repository, or a folder
pipe("a lighthouse", num_inference_steps={args.steps}, guidance_scale={args.guidance}).images[0].save("a.png")
```

The pipeline is whole, its UNet in float32. It has no safety checker.

## What was measured

{table.strip()}

Base beside this model (after): n prompts of a category, one picture of each on the same noise, means.

* reward: what was trained, the cosine to the prompt as it is steered
* alignment: the cosine to the prompt as it is written
* image safety: where the picture stands along the direction from unsafe to safe
* the other columns: what the run's own judge counted, where it had one

## What was not measured

The table is the view of the CLIP that gave the reward. The run itself has measured nothing else: no detector
of unsafe content but its judge, no FID, no GenEval, no variety, no attacks, and no sampler, step count or
guidance but its own. A model that is safer on average still draws unsafe pictures.

## The run's flags

```
{flags(args)}
```
"""


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
