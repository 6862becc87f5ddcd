"""GenEval (arXiv 2310.11513): compositional accuracy of text-to-image models by object detection.

The rules of djghosh13/geneval (commit af4902f24d3c: evaluation/evaluate_images.py) on the raw logits of a
Mask2Former from transformers: **a port, not the official detector**, which is mmdet's. Other weights have
other confidences, and counting, which cuts at 0.9, is most exposed to that.
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

from evaluation.judges import fetch, load_clip
from evaluation.rows import Row, finish
from evaluation.statistics import Rates, Table
from evaluation.tables import grouped
from plumbing import hub, models, run
from plumbing.prompts import read_records

SETTINGS = {"geneval": dict(sampler="ddim", steps=50, eta=0.0, guidance=9.0, samples=4, judges="geneval",
                            batch=8)}
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
# mmdet's configs/mask2former test transform: into 1333 x 800, the aspect kept, padded to 32; ImageNet's mean
SHORT, LONG, DIVISOR = 800, 1333, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# GenEval's own names, in COCO's order, which has mouse, remote and keyboard
NAMES = Path(__file__).with_name("object_names.txt").read_text(encoding="utf-8").splitlines()


@dataclass
class Instance:
    """One object: class name, score, box (left, top, right, bottom) in pixels, mask (H, W)."""
    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: torch.Tensor | None = None


def rows(args) -> tuple[list[Row], dict, list[str]]:
    """A row for each line of GenEval's JSONL; the pictures of a prompt continue one stream of noise."""
    made, source, notes = [], {}, []
    for path in args.prompts or [fetch("evaluation_metadata.jsonl", args.cache)]:
        records, source[str(path)] = read_records(path, ("prompt", "tag", "include", "exclude"))
        for record in records:
            facts = record.fields
            clauses = [clause for part in ("include", "exclude") for clause in facts.get(part) or []]
            if facts.get("tag") not in TASKS or not all(clause.get("class") in NAMES for clause in clauses):
                raise ValueError(f"{path}, line {record.line}: not GenEval's metadata, its tags and classes")
            made.append(Row(len(made), 0, record.text, (facts["tag"],), args.seed, args.guidance,
                            facts=facts))
    return finish(made, args, notes), source, notes


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


def instances(class_logits, mask_logits, padded, inner, size) -> list[Instance]:
    """One picture's objects above CUT, best first (mmdet maskformer_fusion_head.instance_postprocess).

    class_logits (Q, K+1), mask_logits (Q, h, w); `padded`, `inner` and `size` are (height, width) of the
    network's input with and without padding and of the picture. score = p(class) * mean over the mask of
    sigmoid(mask logit). Overlapping objects keep their pixels both: no exclusive map, no smallest size."""
    probs = class_logits.float().softmax(-1)[:, :-1]
    best, order = probs.flatten().topk(min(MAX_PAIRS, probs.numel()))
    keep = best > CUT  # the mean mask probability is at most 1: no pair below can come back above
    best, query, label = best[keep], order[keep] // probs.shape[1], order[keep] % probs.shape[1]
    masks = F.interpolate(mask_logits[query][:, None].float(), padded, mode="bilinear", align_corners=False)
    masks = F.interpolate(masks[..., :inner[0], :inner[1]], size, mode="bilinear", align_corners=False)[:, 0]
    inside = masks > 0
    scores = best * (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    found = []
    for k in scores.argsort(descending=True).tolist():
        if scores[k] > CUT:  # an empty mask has score 0
            ys, xs = (inside[k].any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            box = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)  # right and bottom just outside
            found.append(Instance(NAMES[label[k]], float(scores[k]), box, inside[k].cpu()))
    return found


def relations(a, b) -> set[str]:
    """How box a stands to box b, y downwards. The centre offset a - b, shrunk on each axis by SHRINK times
    the sum of both sizes, is divided by its length before; over one half along an axis is that relation."""
    a, b = np.asarray(a, dtype=float).reshape(2, 2), np.asarray(b, dtype=float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    rest = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * sizes, 0)
    dx, dy = rest / max(np.linalg.norm(offset), 1e-3)  # both 0 for equal centres
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


def decide(found: list[Instance], metadata: dict, color_of) -> bool:
    """Whether a picture's objects satisfy its prompt. For each clause the `count` most confident objects of
    the class have to be there, have its colour and stand in its relation to every object of the clause
    referred to; further objects harm only through `exclude`. A clause that failed cannot be referred to."""
    cut = COUNTING_CUT if metadata["tag"] == "counting" else CUT
    objects = {name: [] for name in NAMES}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > cut and len(objects[one.name]) < MAX_OBJECTS:
            objects[one.name].append(one)
    groups = []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        chosen = objects[name][:count]
        holds = len(chosen) == count
        if holds and "color" in clause:
            holds = color_of(chosen, name).count(clause["color"]) == count
        if holds and "position" in clause:
            relation, target = clause["position"]
            holds = groups[target] is not None and all(
                relation in relations(a.box, b.box) for a in chosen for b in groups[target])
        groups.append(chosen if holds else None)
    return None not in groups and all(len(objects[clause["class"]]) < clause["count"]
                                      for clause in metadata.get("exclude", []))


def color_crop(image: Image.Image, one: Instance) -> Image.Image:
    """The object in its box, everything outside its mask painted flat grey."""
    pixels = np.where(one.mask.numpy()[:, :, None], np.asarray(image), np.uint8(GREY))
    return Image.fromarray(pixels).crop(one.box)


def make_judge(args):
    """judge(images, rows) -> {"geneval": {correct, objects}} by the rows' facts; and what it is."""
    folder = (models.local_folder("--detector", args.detector)
              or hub.fetch("--detector", args.detector, ("config.json", "model*.safetensors")))
    detector = models.load_network(Detector, folder).to(args.device).eval()
    embed_images, embed_texts, colours = load_clip(args.q16_clip, args.device)

    @cache
    def classifier(name: str):
        """A class's zero-shot colours (10, d): unit text embeddings, their mean over templates made unit."""
        rows = [embed_texts([t.format(color=c, name=name) for t in TEMPLATES]).mean(0) for c in COLORS]
        return F.normalize(torch.stack(rows), dim=-1)

    def colors_of(image, chosen, name):
        cosine = embed_images([color_crop(image, one) for one in chosen]) @ classifier(name).T
        return [COLORS[i] for i in cosine.argmax(1).tolist()]

    @torch.no_grad()
    def judge(images: list, rows: list) -> list[dict]:
        results = []
        for image, row in zip(images, rows):  # one by one: no picture depends on its batch
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            x, inner = detector_input(pixels.to(args.device).float())
            [class_logits], [mask_logits] = detector(x)
            found = instances(class_logits, mask_logits, x.shape[-2:], inner, pixels.shape[-2:])
            correct = decide(found, row.facts, partial(colors_of, image))
            objects = [[one.name, round(one.score, 4), list(one.box)] for one in found]
            results.append({"geneval": {"correct": correct, "objects": objects}})
        return results

    return judge, {"detector": args.detector, "weights": run.content(folder), "colours": args.q16_clip,
                   "colours_weights": colours, "cut": CUT, "counting_cut": COUNTING_CUT,
                   "official_detector": False}


def tables(rows: dict, raw: dict) -> list[Table]:
    if "geneval" not in next(iter(raw.values())):
        return []
    correct = {k: int(r["geneval"]["correct"]) for k, r in raw.items()}
    columns = {task: Rates(part) for task, part in grouped(correct, rows, TASKS).items()}
    note = ("Port of the detector to transformers, not the official mmdet detector. Overall: the unweighted "
            "mean of the six tasks. Guidance 9 and seed 42 are the defaults of GenEval's own script; which "
            "ones the published rows were drawn with is not known.")
    return [Table("GenEval accuracy, %", note, {"transformers port": columns}, macro="overall")]
