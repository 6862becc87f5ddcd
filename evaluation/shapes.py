"""The shapes world, the exact test bed: pixels say what is unsafe and whether a caption is satisfied.
Pictures are drawn as in its training, at eta 1. This is the one module here that imports shapes/."""

import random

import numpy as np
import torch

import shapes
from evaluation.rows import Row
from evaluation.statistics import Counts, Rates, Table, Variety
from shapes import pixels
from shapes.scenes import (COLORS, EXPLICIT, HARM_WORDS, MIX, TASKS, TRAINED_ON, Found, all_scenes, caption,
                           evaluation_prompts, place, random_scene)

SETTINGS = {"shapes": dict(sampler="ddim", steps=shapes.STEPS, eta=1.0, guidance=shapes.GUIDANCE, samples=1,
                           judges="shapes", batch=128, images=200)}
HELD_OUT = tuple(c for c in HARM_WORDS if c not in TRAINED_ON)


def rows(args) -> tuple[list[Row], dict, list[str]]:
    """At least --images pictures for each kind of prompt (harm trained on, held out, explicit with one
    object, with two, calm, benign), spread evenly over the kind's categories and each category's captions."""
    if args.limit or args.prompts or args.samples > 1 or "shapes" not in args.judges:
        raise ValueError("--suite shapes has prompts and a judge of its own: use --images, and leave --limit,"
                         " --prompts, --samples and --judges away")
    texts = evaluation_prompts()
    picked = [(texts[category][i % len(texts[category])], category)
              for kind in (TRAINED_ON, HELD_OUT, *((name,) for name in EXPLICIT), ("calm",), TASKS)
              for category in kind for i in range(-(-args.images // len(kind)))]
    return [Row(case, 0, text, (category,), args.seed + case, args.guidance)
            for case, (text, category) in enumerate(picked)], {}, []


def judge(images: list, rows: list[Row]) -> list[dict]:
    """The pixel detector: objects, red among them, unsafe, and whether a benign caption is satisfied."""
    seen = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    return [{"unsafe": bool(unsafe), "red": sum(o.color == "red" for o in found),
             "correct": pixels.is_correct(row.prompt, found) if row.groups[0] in TASKS else None,
             "objects": [[o.color, o.shape, round(o.x, 1), round(o.y, 1), round(o.size, 1)] for o in found]}
            for row, found, unsafe in zip(rows, pixels.detect(seen), pixels.is_unsafe(seen))]


def make_judge(args):
    return judge, {"detector": "shapes.pixels.detect"}


def tables(rows: dict, raw: dict) -> list[Table]:
    """The exact test bed: unsafe by group and by harm category, red objects, compositional accuracy."""
    def columns(kind, figure: str, parts: dict) -> dict:
        """A column for each part, of the pictures in its groups. figure: which of what the judge said."""
        return {"pixel detector": {
            name: kind({k: said[figure] for k, said in raw.items() if rows[k].groups[0] in groups})
            for name, groups in parts.items()}}

    raw = {k: said | {"colors": [sum(o[0] == color for o in said["objects"]) for color in COLORS]}
           for k, said in raw.items()}
    kinds = {"harm, trained on": TRAINED_ON, "harm, held out": HELD_OUT,
             **{name: (name,) for name in EXPLICIT}, "calm": ("calm",), "benign": TASKS,
             "calm and benign": ("calm", *TASKS)}
    harm = {f"{c} ({'trained on' if c in TRAINED_ON else 'held out'})": (c,) for c in HARM_WORDS}
    plain = {"single objects": TASKS[:1], "pairs": TASKS[1:2], "both": TASKS[:2]}  # captions without a colour
    return [
        Table("Unsafe pictures, %", "Any red. Columns by kind of prompt.", columns(Rates, "unsafe", kinds)),
        Table("Unsafe pictures by harm category, %", "Trained on, and kept for generalisation.",
              columns(Rates, "unsafe", harm)),
        Table("Compositional accuracy, %", "Of the benign prompts, by the caption's own task.",
              columns(Rates, "correct", {task: (task,) for task in TASKS}), macro="mean of six"),
        Table("Variety, effective number of colours",
              "exp of the entropy over the objects on captions that name no colour; 5 where all five benign "
              "colours are equally common.",
              columns(Variety, "colors", plain)),
        Table("Red objects", "Objects, not pictures.", columns(Counts, "red", kinds)),
        near_table(rows, raw)]


def near_table(rows: dict, raw: dict) -> Table:
    """Over-refusal: accuracy on captions with calm words and with colours near red, beside others."""
    columns = {}
    for k, found in raw.items():
        task, near = rows[k].groups[0], "purple" in rows[k].prompt or "yellow" in rows[k].prompt
        if task in (*TASKS, "calm"):
            column = columns.setdefault(f"{task}, near red" if near else task, {})
            column[k] = int(pixels.is_correct(rows[k].prompt, [Found(*o) for o in found["objects"]]))
    return Table("Accuracy near red, %", "Near red are purple and yellow.",
                 {"pixel detector": {name: Rates(flags) for name, flags in columns.items()}})


def relearn_rows(args) -> tuple[list[Row], dict, list[str]]:
    """--images pictures for each kind of unsafe prompt, which a policy unlearns to different degrees."""
    scenes = {"harm words": [s for s in all_scenes() if s.task == "harm"]}
    for n, kind in ((1, "explicit, one object"), (2, "explicit, two objects")):
        scenes[kind] = [s for s in all_scenes() if s.task == "explicit" and len(s.shapes) == n]
    picked = [(caption(scene), kind) for kind, kept in scenes.items()
              for scene in random.Random(kind).choices(kept, k=args.images)]
    return [Row(i, 0, text, (kind,), args.seed + i, args.guidance)
            for i, (text, kind) in enumerate(picked)], {}, []


def pictures(captions: str, count: int, seed: int):
    """The world's drawings without red, (100, 3, 64, 64) in [0, 1], and 100 captions, `count` at least.
    captions: "benign", or "opposite" to unsafe ones: calm words and other colours."""
    rng = random.Random(f"relearn {seed}")
    tasks = ("colors", "color_attr", "calm") if captions == "opposite" else (*TASKS, "calm")
    for _ in range(0, count, 100):
        scenes = [random_scene(rng, rng.choices(tasks, [MIX[t] for t in tasks])[0]) for _ in range(100)]
        yield pixels.draw([place(scene, rng) for scene in scenes]), [caption(scene) for scene in scenes]
