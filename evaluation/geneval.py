"""GenEval (arXiv 2310.11513): compositional accuracy of text-to-image models by object detection.

Re-implemented from the rules of djghosh13/geneval (commit af4902f24d3c: evaluation/evaluate_images.py) on the
raw logits of a Mask2Former from transformers. It is **a port, not the official detector**: the official one
is mmdet's retraining of the same architecture, with about the same AP but other weights, so its confidences
are calibrated differently. The task most exposed to that is counting, which cuts at 0.9; the others cut at
0.3.

What is kept: score = class probability x mean mask probability, at most 100 (query, class) pairs, at most 16
objects of a class, no suppression of overlaps (the official IoU limit is 1.0), the decision rules, the colour
classifier and its grey. Class names are mapped by COCO index, never by the checkpoint's label strings.

Guidance 9 and seed 42 for every prompt are the defaults of its generation/diffusers_generate.py; what the
published rows were drawn with is not known.
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerModel, Mask2FormerPreTrainedModel

from evaluation import published
from evaluation.judges import fetch, loading, sha256
from evaluation.rows import Row, finish, one_guidance
from evaluation.statistics import Table
from evaluation.tables import categories_of, safety_tables, utility_table
from plumbing import texts
from plumbing.models import load_network

SETTINGS = dict(sampler="ddim", steps=50, eta=0.0, guidance=9.0, samples=4, judges="geneval", batch=8)
HARMLESS = True

URL = "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3c/prompts/evaluation_metadata.jsonl"
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}",
             "a photo of a {color} object")
CUT = 0.3             # objects count above this score ...
COUNTING_CUT = 0.9    # ... and in the counting task above this one
MAX_OBJECTS = 16      # of one class
MAX_PAIRS = 100       # (query, class) pairs of one picture, as in COCO's evaluation
SHRINK = 0.1          # of the two objects' sizes: how far apart counts as beside each other
GREY = 153            # "#999", painted over everything outside the object before its colour is read
# mmdet's configs/mask2former test transform: into 1333 x 800 with the aspect kept, ImageNet statistics,
# padded to 32.
SHORT, LONG, DIVISOR = 800, 1333, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# GenEval's own names, in COCO's order (three differ from COCO's: "computer mouse", "tv remote", "computer
# keyboard").
NAMES = tuple("""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant,
bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave,
oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
""".replace("\n", " ").strip().split(", "))


@dataclass
class Instance:
    """One detected object: class name, score, box (left, top, right, bottom) in pixels, mask (H, W)."""
    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: torch.Tensor | None = None


# -------------------------------------------------------------------------------- prompts

def read_metadata(path: str | Path) -> list[dict]:
    """GenEval's JSONL: one prompt a line with its `tag`, `prompt`, `include` and, for counting, `exclude`."""
    rows = []
    for number, row in texts.read_table(path) or [(1, {})]:
        missing = [k for k in ("tag", "prompt", "include") if k not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing)}; expected GenEval's metadata")
        clauses = [row["include"], row.get("exclude", [])]
        if not all(isinstance(part, list) and all(isinstance(c, dict) and "class" in c for c in part)
                   for part in clauses):
            raise ValueError(f"{path}, line {number}: include and exclude have to be lists of objects with a "
                             "class")
        unknown = [c["class"] for part in clauses for c in part if c["class"] not in NAMES]
        unknown += [row["tag"]] * (row["tag"] not in TASKS)
        if unknown:
            raise ValueError(f"{path}, line {number}: {unknown[0]!r} is not a class or task of GenEval")
        rows.append(row)
    return rows


def rows(args) -> tuple[list[Row], dict, list[str]]:
    """One row for each of its lines; the pictures of a prompt continue one stream of noise."""
    guidance, notes = one_guidance(args), []
    paths = args.prompts or [fetch(URL, SHA256, None, "--prompts", args.cache)]
    everything = [facts for path in paths for facts in read_metadata(path)]
    made = [Row(case, 0, facts["prompt"], (facts["tag"],), args.seed, guidance, facts=facts)
            for case, facts in enumerate(everything)]
    source = {Path(path).name if len(paths) == 1 else str(path): sha256(path) for path in paths}
    return finish(made, args, notes, paths[0]), {"prompts": source}, notes


# -------------------------------------------------------------------------------- detector

class Detector(Mask2FormerPreTrainedModel):
    """Mask2Former's checkpoints without its training loss, whose constructor would need scipy."""
    _keys_to_ignore_on_load_unexpected = [r"criterion"]

    def __init__(self, config):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)  # the last is "nothing"
        self.post_init()

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> class logits (B, Q, 81), mask logits (B, Q, H/4, W/4) of the last layer."""
        out = self.model(pixel_values=pixels, output_hidden_states=True)
        queries = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)  # (Q, B, d) -> (B, Q, d)
        return self.class_predictor(queries), out.masks_queries_logits[-1]


def detector_input(images):
    """Resize as OpenCV does, normalise, pad. (B, 3, H, W) in 0 .. 255 -> padded, (height, width) without."""
    height, width = images.shape[-2:]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    x = F.interpolate(images, size, mode="bilinear", align_corners=False)
    x = (x - x.new_tensor(MEAN).view(1, 3, 1, 1)) / x.new_tensor(STD).view(1, 3, 1, 1)
    return F.pad(x, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR)), size


def instances(class_logits, mask_logits, padded, inner, size, cut: float = CUT) -> list[Instance]:
    """One picture's objects above `cut`, best first (mmdet maskformer_fusion_head.instance_postprocess).

    class_logits (Q, K+1), mask_logits (Q, h, w); `padded`, `inner` and `size` are (height, width) of the
    network's input with and without padding and of the picture. score = p(class) * mean over the mask of
    sigmoid(mask logit). Overlapping objects keep their pixels both: no exclusive map, no smallest size.
    """
    probs = class_logits.float().softmax(-1)[:, :-1]
    best, order = probs.flatten().topk(min(MAX_PAIRS, probs.numel()))
    keep = best > cut  # the mean mask probability is at most 1: no pair below can come back above
    best, query, label = best[keep], order[keep] // probs.shape[1], order[keep] % probs.shape[1]
    if not len(best):
        return []
    masks = F.interpolate(mask_logits[query][:, None].float(), padded, mode="bilinear", align_corners=False)
    masks = F.interpolate(masks[..., :inner[0], :inner[1]], size, mode="bilinear", align_corners=False)[:, 0]
    inside = masks > 0
    scores = best * (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    found = []
    for k in scores.argsort(descending=True).tolist():
        if scores[k] > cut:  # an empty mask has score 0
            ys, xs = (inside[k].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            box = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)  # right and bottom just outside
            found.append(Instance(NAMES[label[k]], float(scores[k]), box, inside[k].cpu()))
    return found


# -------------------------------------------------------------------------------- rules

def relations(a, b) -> set[str]:
    """How box a stands to box b, each (left, top, right, bottom), y downwards.

    The centre offset a - b, shrunk on each axis by SHRINK times the sum of both sizes, is divided by the
    length of the offset before shrinking; more than one half along an axis is that relation. None where
    nothing is left of the offset.
    """
    a, b = np.asarray(a, dtype=float).reshape(2, 2), np.asarray(b, dtype=float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    rest = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * sizes, 0)
    if (np.abs(rest) < 1e-3).all():
        return set()
    dx, dy = rest / np.linalg.norm(offset)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


def decide(found: list[Instance], metadata: dict, color_of) -> tuple[bool, str]:
    """Whether a picture's objects satisfy its prompt, and the reasons why not.

    For each clause the `count` most confident objects of the class have to be there, have its colour and
    stand in its relation to every object of the clause referred to; further objects harm only through
    `exclude`. A clause that failed cannot be referred to. color_of(instances, name) -> one colour each.
    """
    cut = COUNTING_CUT if metadata["tag"] == "counting" else CUT
    objects = {}
    for one in sorted(found, key=lambda one: -one.score):
        group = objects.setdefault(one.name, [])
        if one.score > cut and len(group) < MAX_OBJECTS:
            group.append(one)
    groups, reasons = [], []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        chosen, failure = objects.get(name, [])[:count], ""
        if len(chosen) < count:
            failure = f"expected {name} >= {count}, found {len(chosen)}"
        elif "color" in clause:
            colors = color_of(chosen, name)
            if colors.count(clause["color"]) < count:
                failure = f"expected {clause['color']} {name} >= {count}, found {', '.join(colors)}"
        if "position" in clause and not failure:
            relation, target = clause["position"]
            if groups[target] is None:
                failure = f"no target for {name} to be {relation}"
            elif not all(relation in relations(a.box, b.box) for a in chosen for b in groups[target]):
                failure = f"expected {name} {relation} target"
        groups.append(None if failure else chosen)
        reasons += [failure] * bool(failure)
    for clause in metadata.get("exclude", []):
        number = len(objects.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']} < {clause['count']}, found {number}")
    return not reasons, "; ".join(reasons)


# -------------------------------------------------------------------------------- colours

def color_crop(image: Image.Image, one: Instance) -> Image.Image:
    """The object in its box, everything outside its mask painted flat grey."""
    pixels = np.where(one.mask.numpy()[:, :, None], np.asarray(image), np.uint8(GREY))
    return Image.fromarray(pixels).crop(one.box)


def color_weights(name: str, embed_texts):
    """A class's zero-shot colours (10, d): unit text embeddings, averaged over templates, made unit again."""
    rows = [embed_texts([t.format(color=c, name=name) for t in TEMPLATES]).mean(0) for c in COLORS]
    return F.normalize(torch.stack(rows), dim=-1)


def judge_with(detector, embed_images, embed_texts, device="cpu", batch_size: int = 4):
    """judge(images, rows) -> {"geneval": {correct, reason, objects}} for each picture.

    images: PIL, all of one size; row.facts: a line of GenEval's metadata.
    embed_images(list of PIL) and embed_texts(list of str) give unit rows (N, d) of CLIP ViT-L/14.
    """
    classifier = cache(lambda name: color_weights(name, embed_texts))

    def colors_of(image, chosen, name):
        cosine = embed_images([color_crop(image, one) for one in chosen]) @ classifier(name).T
        return [COLORS[i] for i in cosine.argmax(1).tolist()]

    @torch.no_grad()
    def judge(images: list, rows: list) -> list[dict]:
        results = []
        for i in range(0, len(images), batch_size):
            chunk = images[i:i + batch_size]
            pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in chunk])
            x, inner = detector_input(pixels.to(device).float())
            class_logits, mask_logits = detector(x)
            for k, image in enumerate(chunk):
                found = instances(class_logits[k], mask_logits[k], x.shape[-2:], inner, pixels.shape[-2:])
                correct, reason = decide(found, rows[i + k].facts, partial(colors_of, image))
                objects = [[one.name, round(one.score, 4), list(one.box)] for one in found]
                results.append({"geneval": {"correct": correct, "reason": reason, "objects": objects}})
        return results

    return judge


def make_judge(args, clip, files: dict):
    """judge_with under the flags, and what it is."""
    with loading(args.detector, "pass the folder with --detector"):
        detector = load_network(Detector, args.detector)
    judge = judge_with(detector.to(args.device).eval(), *clip("--q16-clip"), args.device)
    return judge, {"detector": args.detector, "colours": args.q16_clip, "cut": CUT,
                   "counting_cut": COUNTING_CUT, "official_detector": False}


# -------------------------------------------------------------------------------- table

def tables(rows: dict, raw: dict, clip: str, fid: float | None) -> list[Table]:
    made = safety_tables(rows, raw, categories_of(rows))
    if "geneval" in next(iter(raw.values())):
        columns = {t: {k: int(r["geneval"]["correct"]) for k, r in raw.items() if t in rows[k].groups}
                   for t in TASKS}
        note = ("Port of the detector to transformers, not the official mmdet detector. Overall: the "
                "unweighted mean of the six tasks. Guidance 9 and seed 42 are the defaults of GenEval's own "
                "script; which ones the published rows were drawn with is not known.")
        made.append(Table("GenEval accuracy, %", "rate", note, {"transformers port": columns},
                          macro="overall", published=published.GENEVAL))
    return made + utility_table(raw, clip, fid)
