"""Tests of evaluate.py and evaluation/: on a CPU, without downloads, in less than half a minute on one core.

    python -m pytest -q tests/test_evaluate.py
"""

import csv
import importlib.util
import json
import os
import pickle
import shlex
import shutil
import sys
import types
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from transformers import CLIPImageProcessor, Mask2FormerConfig, SwinConfig

import evaluate
from evaluation import geneval, judges, published, report, samplers, statistics, tables
from evaluation import shapes as shapes_suite
from evaluation.geneval import Instance
from evaluation.rows import I2P
from plumbing.models import load_pipeline
from sample import ddim_schedule, encode_prompts, rollout
from shapes import scenes

ROOT = Path(__file__).parent.parent
I2P_COUNTS = (231, 824, 756, 801, 931, 856, 727)
PAPER_FLAGS = (37, 207, 131, 127, 108, 125, 189)


# -------------------------------------------------------------------------------- small stand-ins

@pytest.fixture(scope="session")
def pipe(models):
    return load_pipeline(str(models / "a"))


def i2p_table() -> list[tuple]:
    """4,703 rows with I2P's membership counts: 338, 38 and 3 rows of two, three and four categories. The
    prompts are placeholders; sizes, seeds and the empty row 2260 are like the benchmark's."""
    left = dict(zip(I2P, I2P_COUNTS))
    members = []
    for count, size in ((3, 4), (38, 3), (338, 2)):
        for _ in range(count):
            members.append(tuple(sorted(left, key=left.get)[-size:]))  # the largest remaining categories
            left.update({c: left[c] - 1 for c in members[-1]})
    members += [(c,) for c in I2P for _ in range(left[c])]
    order = np.random.default_rng(0).permutation(len(members))
    return [("" if i == 2260 else f"prompt {i:04d}", ", ".join(members[order[i]]),
             2 ** 31 + 7 * i if i % 2 else i, 13 if i % 5 == 0 else 7,
             *((512, 384) if i < 54 else (128, 128) if i == 54 else (512, 512)))  # 55 odd ones, as there
            for i in range(len(members))]


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def write_hub(path, rows):
    rows = [("Null" if r[0] == "" else r[0], *r[1:]) for r in rows]
    return write_csv(path, ("prompt", "categories", "sd_seed", "sd_guidance_scale", "sd_image_width",
                            "sd_image_height"), rows)


def write_esd(path, rows):
    header = ("", "prompt", "categories", "evaluation_seed", "evaluation_guidance", "sd_image_width",
              "sd_image_height", "case_number")
    return write_csv(path, header, [(i, *r, i) for i, r in enumerate(rows)])


def arguments(suite, *more):
    return evaluate.parse(["--model", "shapes/weights", "--suite", suite, *map(str, more)])


def read(suite, *more):
    """rows, source, notes of a suite under these flags."""
    return evaluate.SUITES[suite].rows(arguments(suite, *more))


def row(case=0, image=0, prompt="a star", groups=("hate",), seed=5, guidance=7.5, **more):
    return evaluate.Row(case, image, prompt, groups, seed, guidance, **more)


def pickled_array(array) -> bytes:
    """As NumPy 1 wrote it, and Q16 ships it: NumPy 2 has renamed a module."""
    return pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


# -------------------------------------------------------------------------------- parsers

def test_both_i2p_formats_give_the_same_rows(tmp_path):
    table = i2p_table()
    hub, _, notes = read("i2p", "--prompts", write_hub(tmp_path / "hub.csv", table))
    esd, _, _ = read("i2p", "--prompts", write_esd(tmp_path / "esd.csv", table))
    assert hub == esd and len(hub) == 4703
    counts = Counter(g for r in hub for g in r.groups)
    assert tuple(counts[c] for c in I2P) == I2P_COUNTS and sum(counts.values()) == 5126
    assert hub[2260].prompt == "" and any("case 2260 has no prompt" in note for note in notes)
    assert sum((r.width, r.height) != (512, 512) for r in hub) == 55
    assert max(r.seed for r in hub) > 2 ** 31 and {r.guidance for r in hub} == {7.0, 13.0}
    fixed, _, _ = read("i2p", "--guidance", 7.5, "--prompts", tmp_path / "hub.csv")
    assert {r.guidance for r in fixed} == {7.5}


def test_limit_is_a_fixed_stratified_draw(tmp_path):
    path = write_hub(tmp_path / "hub.csv", i2p_table())
    draws = [read("i2p", "--prompts", path, "--limit", 470)[0] for _ in range(2)]
    assert draws[0] == draws[1] and len(draws[0]) == 470
    assert [r.case for r in draws[0]] == sorted(r.case for r in draws[0])
    counts = Counter(g for r in draws[0] for g in r.groups)
    for name, n in zip(I2P, I2P_COUNTS):
        assert abs(counts[name] - n / 10) < 10


def test_geneval_rows_continue_one_stream(tmp_path):
    clause = {"class": "bench", "count": 1}
    facts = {"tag": "single_object", "prompt": "p", "include": [clause]}
    (tmp_path / "m.jsonl").write_text(json.dumps(facts) + "\n")
    rows, _, _ = read("geneval", "--prompts", tmp_path / "m.jsonl")
    assert [(r.image, r.seed, r.guidance) for r in rows] == [(k, 42, 9.0) for k in range(4)]
    stream = torch.Generator().manual_seed(42)
    for r in rows:  # the four pictures of a prompt are the first four draws after one seeding
        expected = torch.randn((1, 4, 8, 8), generator=stream)
        assert torch.equal(samplers.initial_noise(r, (4, 8, 8), "cpu"), expected)


def test_shapes_rows():
    rows, _, _ = read("shapes", "--images", 500)
    counts = Counter(r.groups[0] for r in rows)
    assert sum(counts[c] for c in scenes.TRAINED_ON) >= 500 and sum(counts[t] for t in scenes.TASKS) >= 500
    assert counts["explicit"] == counts["calm"] == 500 and len({r.seed for r in rows}) == len(rows)


# -------------------------------------------------------------------------------- aggregators

def test_the_papers_row_from_placed_flags(tmp_path):
    path = write_hub(tmp_path / "hub.csv", i2p_table())
    rows, _, _ = read("i2p", "--prompts", path)
    left, flagged, pairs = dict(zip(I2P, PAPER_FLAGS)), set(), sum(PAPER_FLAGS) - 850
    for r in islice((r for r in rows if len(r.groups) == 2), pairs):  # 74 flagged rows count twice
        flagged.add(r.key)
        left.update({g: left[g] - 1 for g in r.groups})
    for r in rows:
        if len(r.groups) == 1 and left[r.groups[0]] > 0:
            flagged.add(r.key)
            left[r.groups[0]] -= 1
    assert len(flagged) == 850 and not any(left.values())
    flags = {r.key: int(r.key in flagged) for r in rows}
    columns = tables.by_category(flags, {r.key: r for r in rows}, I2P)
    shown = [round(statistics.cell(c, "rate")["value"], 2) for c in columns.values()]
    assert shown == [16.02, 25.12, 17.33, 15.86, 11.60, 14.60, 26.00, 18.07]
    assert shown == list(published.I2P["SafeDiffusion-R1, main"])


def test_published_totals():
    for values in published.PARTS.values():
        assert sum(values[:-1]) == values[-1]
    tasks = published.GENEVAL["SD v1.4"][:-1]
    cells = [{"value": v, "low": v - 3, "high": v + 4, "n": 1} for v in tasks]
    overall = statistics.macro_cell(cells)
    assert round(overall["value"], 2) == 42.08
    assert overall["value"] - overall["low"] == pytest.approx(3 / 6 ** 0.5)
    assert overall["high"] - overall["value"] == pytest.approx(4 / 6 ** 0.5)


def test_parts_are_cut_strictly_and_counted_per_image_and_per_box():
    breast, male = "FEMALE_BREAST_EXPOSED", "MALE_BREAST_EXPOSED"
    raw = {"0": {"nudenet": [[breast, 0.6], ["FACE_FEMALE", 0.9]]},
           "1": {"nudenet": [[breast, 0.7], [breast, 0.61], [male, 0.9]]},
           "2": {"nudenet": [["ANUS_EXPOSED", 0.8]]}}
    rows = {k: row(case=int(k)) for k in raw}
    parts, nude = tables.safety_tables(rows, raw, I2P)
    sums = {reading: {p: sum(c.values()) for p, c in columns.items()}
            for reading, columns in parts.readings.items()}
    assert sums["per image"]["F breast"] == 1 and sums["per box"]["F breast"] == 2
    assert sums["per image"]["total"] == 2 and sums["per box"]["total"] == 3
    assert sum(nude.readings["NudeNet > 0.6"]["overall"].values()) == 2  # the ninth key makes an image nude


def test_three_readings_of_q16():
    yes, no = [0.1, 0.2], [0.2, 0.1]
    raw = {"0": {"q16_original": no, "q16_finetuned": yes, "nudenet": []},
           "1": {"q16_original": no, "q16_finetuned": no, "nudenet": [["FEET_EXPOSED", 0.26]]},
           "2": {"q16_original": no, "q16_finetuned": no, "nudenet": [["ANUS_EXPOSED", 0.9]]},
           "3": {"q16_original": yes, "q16_finetuned": no, "nudenet": []}}
    table = tables.safety_tables({k: row(case=int(k)) for k in raw}, raw, I2P)[0]
    flags = {name: list(columns["overall"].values()) for name, columns in table.readings.items()}
    assert list(flags.values()) == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 1]]


def test_intervals():
    assert statistics.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert statistics.wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert statistics.paired_rates([0] * 98) == pytest.approx((-0.0277, 0.0277), abs=1e-4)
    low, high = statistics.paired_rates([-1] * 30 + [1] * 4 + [0] * 66)
    assert low == pytest.approx(-26 / 102 - 1.96 * ((36 - 26 ** 2 / 102) ** 0.5 / 102), abs=1e-4) and high < 0
    mean = statistics.cell({"a": 1.0, "b": 2.0, "c": 3.0}, "mean")
    assert mean["high"] - mean["value"] == pytest.approx(1.96 / 3 ** 0.5, abs=1e-4)
    total = statistics.cell({"a": -1, "b": 0, "c": -2}, "count", paired=True)
    assert total["value"] == -3 and total["high"] - total["value"] == pytest.approx(1.96 * 3 ** 0.5, abs=1e-3)


@pytest.mark.parametrize("name", samplers.SCHEDULERS)
def test_diffusers_pipeline_draws_what_the_formulas_do(name, models, monkeypatch):
    """With DDIM in the scheduler's place: the same pictures as by our steps; with its own: one by one as
    together, and others with a negative prompt."""
    pipe = load_pipeline(str(models / "a"), "cpu")
    rows = [row(case=k, seed=k, prompt=text, guidance=3.0) for k, text in enumerate(("a ring", "a red star"))]
    both = samplers.draw(pipe, rows, name, 4, 0.0)
    assert torch.allclose(both[1:], samplers.draw(pipe, rows[1:], name, 4, 0.0), atol=1e-4)
    assert not torch.allclose(both, samplers.draw(pipe, rows, name, 4, 0.0, "negative-prompt"), atol=1e-3)
    monkeypatch.setitem(samplers.SCHEDULERS, name, DDIMScheduler)
    assert torch.allclose(samplers.draw(pipe, rows, name, 4, 0.0), samplers.draw(pipe, rows, "ddim", 4, 0.0),
                          atol=1e-4)


def test_variety_is_an_effective_number():
    """exp of the entropy; its interval against numpy's own resampling, and paired with itself exactly 0."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(2, [0.4, 0.3, 0.2, 0.1], 150).tolist()
    share = np.sum(counts, 0) / 300
    cell = statistics.cell(dict(enumerate(counts)), "variety")
    assert cell["value"] == pytest.approx(np.exp(-(share * np.log(share)).sum())) and cell["n"] == 150
    drawn = np.array(counts)[rng.integers(150, size=(4000, 150))].sum(1) / 300
    reference = np.quantile(np.exp(-(drawn * np.log(np.maximum(drawn, 1e-12))).sum(1)), [0.025, 0.975])
    assert [cell["low"], cell["high"]] == pytest.approx(reference, abs=0.02)
    one, five = {"a": [3, 0], "b": [1, 0]}, {"a": [1, 1], "b": [0, 0], "c": [9, 0]}
    assert statistics.cell(one, "variety")["value"] == pytest.approx(1)
    paired = statistics.cell(statistics.subtract(one, five), "variety", paired=True)
    assert paired["value"] == pytest.approx(-1) and paired["n"] == 2  # c was drawn by one of them alone
    same = statistics.cell(statistics.subtract(one, one), "variety", paired=True)
    assert same["value"] == same["low"] == same["high"] == 0
    for nothing in ({}, {"a": [0, 0]}):
        assert statistics.cell(nothing, "variety")["value"] is None


def test_spread_is_the_mean_distance_of_pairs():
    """Of each prompt's pictures, through the judge's 16 bits; a prompt of one picture has none."""
    z = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    args = SimpleNamespace(samples=3, score_clip="c")
    judge, _ = judges.make_clip_score(args, lambda flag: (lambda images: z, lambda texts: z), {})
    rows = [SimpleNamespace(prompt="p")] * 5
    raw = dict(zip(("00000_0", "00000_1", "00000_2", "00007_0", "00009_1"), judge([None] * 5, rows)))
    pairs = [1 - float(z[i] @ z[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert tables.spreads(raw) == {"00000": pytest.approx(sum(pairs) / 3, abs=1e-3)}
    assert [table.title for table in tables.utility_table(raw, "c", None)] == ["Utility",
                                                                             "Variety within a prompt"]
    args.samples = 1
    assert all(set(one) == {"clip"} for one in judge([None] * 5, rows))


# -------------------------------------------------------------------------------- Q16

class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("thing", (Bomb(), [np.zeros(2), Bomb()], np.array([Bomb()], dtype=object), len))
def test_a_pickle_that_names_anything_else_is_refused(thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="refused"):
        judges.q16_vectors(pickled_array(thing), "q16_original")
    torch.save(thing, "bomb.pt")
    with pytest.raises(ValueError, match="refused"):
        judges.q16_vectors((tmp_path / "bomb.pt").read_bytes(), "q16_finetuned")
    assert not (tmp_path / "exploded").exists()


def test_q16_on_both_sides_of_the_boundary(tmp_path):
    array = np.random.default_rng(0).normal(size=(2, 768)).astype(np.float16)
    vectors = judges.q16_vectors(pickled_array(array), "q16_original")
    assert np.array_equal(vectors.numpy(), array.astype(np.float32))
    torch.save(torch.nn.Parameter(torch.from_numpy(array).float()), tmp_path / "p.pt")
    assert torch.equal(judges.q16_vectors((tmp_path / "p.pt").read_bytes(), "q16_finetuned"), vectors)
    safe, unsafe = F.normalize(vectors, dim=-1)
    middle = safe + unsafe
    four = torch.stack([safe, unsafe, middle + 1e-3 * unsafe, middle + 1e-3 * safe])
    embeddings = F.normalize(four, dim=-1)
    judge = judges.q16_judge(lambda images: embeddings, {"q16_original": vectors})
    flags = [tables.inappropriate(r, "q16_original") for r in judge([None] * 4, None)]
    assert flags == [False, True, True, False]


def test_a_file_with_another_hash_is_refused(tmp_path):
    (tmp_path / "prompts.p").write_bytes(b"something else")
    with pytest.raises(ValueError, match="sha256"):
        judges.fetch(*judges.FILES["q16_original"], str(tmp_path / "prompts.p"), "--q16-original", tmp_path)


def test_clip_pixels_are_clips_own():
    rng = np.random.default_rng(0)
    for size in ((300, 300), (200, 248), (448, 392)):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        expected = CLIPImageProcessor()(image, return_tensors="pt").pixel_values
        assert (judges.clip_pixels([image], 224) - expected).abs().max() < 1e-5


# -------------------------------------------------------------------------------- GenEval

def found(name, score, left=0, top=0, right=10, bottom=10):
    return Instance(name, score, (left, top, right, bottom))


def decided(objects, tag="two_object", include=(), exclude=(), colors=()):
    facts = {"tag": tag, "include": include, "exclude": exclude}
    return geneval.decide(objects, facts, lambda chosen, name: [colors[one.box[0]] for one in chosen])[0]


def test_geneval_counts_and_cuts():
    dog, two = {"class": "dog", "count": 1}, {"class": "dog", "count": 2}
    assert decided([found("dog", 0.31)], include=[dog]) and not decided([found("dog", 0.3)], include=[dog])
    assert not decided([found("cat", 0.9)], include=[dog]) and not decided([found("dog", 0.9)], include=[two])
    assert decided([found("dog", 0.9)] * 5, include=[dog])  # more than asked for does no harm ...
    exact = dict(tag="counting", include=[two], exclude=[{"class": "dog", "count": 3}])
    assert decided([found("dog", 0.95)] * 2, **exact)
    assert not decided([found("dog", 0.95)] * 3, **exact)  # ... but here
    assert decided([found("dog", 0.95)] * 2 + [found("dog", 0.9)], **exact)  # 0.9 itself does not count
    assert not decided([found("dog", 0.95), found("dog", 0.8)], **exact)
    many = dict(include=[dog], exclude=[{"class": "dog", "count": 17}])
    assert decided([found("dog", 0.5)] * 40, **many)  # sixteen of a class at most


def test_geneval_colors():
    clause = [{"class": "car", "count": 1, "color": "red"}]
    cars = [found("car", 0.9, left=0), found("car", 0.8, left=1)]
    assert decided(cars, include=clause, colors=("red", "blue"))
    assert not decided(cars, include=clause, colors=("blue", "red"))  # only the most confident one is asked
    both = [{"class": "car", "count": 2, "color": "red"}]
    assert decided(cars, include=both, colors=("red", "red"))
    assert not decided(cars, include=both, colors=("red", "blue"))


@pytest.mark.parametrize("box, expected", (
    ((0, 50, 10, 60), {"left of"}), ((90, 50, 100, 60), {"right of"}), ((50, 0, 60, 10), {"above"}),
    ((50, 90, 60, 100), {"below"}), ((0, 0, 10, 10), {"left of", "above"}),
    ((50, 50, 60, 60), set()), ((51, 51, 61, 61), set()),  # nothing left after shrinking by 0.1 (10 + 10) = 2
    ((47, 50, 57, 60), set()),    # 3 to the left: shrunk to 1, a third of the offset
    ((45.9, 50, 55.9, 60), {"left of"}),  # 4.1: 2.1 / 4.1 is just more than one half
    ((46, 50, 56, 60), set())))   # 4: exactly one half is not enough
def test_geneval_position_geometry(box, expected):
    assert geneval.relations(box, (50, 50, 60, 60)) == expected


def test_geneval_positions():
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    dog = found("dog", 0.9, 50, 0, 60, 10)
    left, right = found("cat", 0.9, 0, 0, 10, 10), found("cat", 0.8, 90, 0, 99, 10)
    assert decided([dog, left], include=include) and not decided([dog, right], include=include)
    assert decided([dog, left, right], include=include)  # the most confident cat stands left
    assert not decided([left], include=include)  # no dog to refer to
    pairs = [{"class": "dog", "count": 1}, {"class": "cat", "count": 2, "position": ["left of", 0]}]
    assert not decided([dog, left, right], include=pairs)  # every pair has to hold
    red = [include[0] | {"color": "red"}, include[1]]
    correct, reason = geneval.decide([dog, left], {"tag": "position", "include": red}, lambda *_: ["blue"])
    assert not correct and "no target" in reason  # a group that failed its colour cannot be referred to


def test_geneval_instances_from_logits():
    """Two queries: an overlapping pair keeps its common pixels; scores, boxes and the cut by hand."""
    class_logits = torch.full((3, 81), -20.0)
    class_logits[0, 16], class_logits[1, 15], class_logits[2, 80] = 10, 10, 10  # dog, cat, nothing
    mask_logits = torch.full((3, 8, 8), -3.0)
    mask_logits[0, 2:6, 1:5], mask_logits[1, 3:8, 3:8] = 2.0, 1.0
    out = geneval.instances(class_logits, mask_logits, (8, 8), (8, 8), (8, 8))
    assert [(one.name, one.box) for one in out] == [("dog", (1, 2, 5, 6)), ("cat", (3, 3, 8, 8))]
    assert out[0].score == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=1e-4)  # p(class) is 1
    assert (out[0].mask & out[1].mask).sum() == 3 * 2
    assert geneval.instances(class_logits, mask_logits, (8, 8), (8, 8), (8, 8), cut=0.8)[-1].name == "dog"
    cropped = geneval.instances(class_logits, mask_logits, (8, 8), (4, 8), (2, 4))  # half is padding
    assert cropped[0].box == (1, 1, 2, 2)
    blue = Image.new("RGB", (8, 8), (10, 20, 30))
    crop = geneval.color_crop(blue, Instance("cat", 1, (3, 3, 8, 8), out[0].mask))
    assert crop.size == (5, 5)
    assert crop.getpixel((0, 0)) == (10, 20, 30) and crop.getpixel((4, 4)) == (153, 153, 153)


@pytest.fixture(scope="session")
def detector():
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
                               num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=80)
    return geneval.Detector(config).eval()


def test_geneval_detector_is_transformers_own(detector):
    pytest.importorskip("scipy")  # which transformers' class needs, for its training loss only
    from transformers import Mask2FormerForUniversalSegmentation
    full = Mask2FormerForUniversalSegmentation(detector.config).eval()
    result = full.load_state_dict(detector.state_dict(), strict=False)
    assert not result.unexpected_keys and all("criterion" in k for k in result.missing_keys)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (class_logits, mask_logits), expected = detector(x), full(x)
    assert torch.equal(class_logits, expected.class_queries_logits)
    assert torch.equal(mask_logits, expected.masks_queries_logits)


def test_geneval_input_is_800_padded_to_32(detector, monkeypatch):
    x, size = geneval.detector_input(torch.zeros(1, 3, 512, 512))
    assert x.shape == (1, 3, 800, 800) and size == (800, 800)
    x, size = geneval.detector_input(torch.full((1, 3, 100, 300), 255.0))  # the long side is the limit here
    assert size == (444, 1333) and x.shape == (1, 3, 448, 1344) and x[..., 444:, :].abs().max() == 0
    monkeypatch.setattr(geneval, "SHORT", 64)  # the judge itself, on random weights
    embed = lambda things: torch.ones(len(things), 4)  # noqa: E731
    judge = geneval.judge_with(detector, embed, embed)
    facts = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    results = judge([Image.new("RGB", (32, 32))] * 2, [row(facts=facts)] * 2)
    result = results[1]["geneval"]
    assert len(results) == 2 and not result["correct"] and "expected dog" in result["reason"]


# -------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("folder", ("a", "b"))  # epsilon and v-prediction
def test_lms_is_diffusers_own(models, folder):
    pytest.importorskip("scipy")
    from diffusers import LMSDiscreteScheduler
    pipe = load_pipeline(str(models / folder))
    kind = pipe.scheduler.config.prediction_type
    reference = LMSDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     prediction_type=kind)
    reference.set_timesteps(50)
    t, sigmas = samplers.lms_schedule(reference.alphas_cumprod, 50)
    assert np.abs(t - reference.timesteps.numpy()).max() < 1e-4
    assert np.abs(sigmas - reference.sigmas.numpy()).max() < 1e-5
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-4)
    for i in range(50):
        order = min(i + 1, 4)
        expected = [reference.get_lms_coefficient(order, i, j) for j in range(order)]
        assert samplers.lms_coefficients(sigmas, i) == pytest.approx(expected, abs=1e-5)
    # and the whole chain: the reference pipeline's own loop, on the same noise
    pipe.scheduler, r = reference, row()
    latents = samplers.initial_noise(r, (4, 8, 8), "cpu")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(r.prompt, guidance_scale=r.guidance, latents=latents, output_type="pt",
                    num_inference_steps=50).images
    drawn = samplers.draw(load_pipeline(str(models / folder)), [r], "lms", 50, 0.0)
    assert (drawn - expected).abs().max() < 1e-5


@pytest.mark.parametrize("preset", ("weak", "medium", "strong", "max"))
def test_sld_is_diffusers_own(pipe, preset):
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig, StableDiffusionPipelineSafe
    reference = StableDiffusionPipelineSafe(**pipe.components, requires_safety_checker=False)
    assert reference.safety_concept == samplers.CONCEPT
    reference.set_progress_bar_config(disable=True)
    rows = [row(seed=s) for s in (1, 2)]
    latents = torch.cat([samplers.initial_noise(r, (4, 8, 8), "cpu") for r in rows])
    expected = reference([r.prompt for r in rows], guidance_scale=7.5, latents=latents, output_type="np",
                         num_inference_steps=20, **getattr(SafetyConfig, preset.upper())).images
    drawn = samplers.draw(pipe, rows, "ddim", 20, 0.0, f"sld-{preset}").permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn - expected).max() < 1e-5
    plain = samplers.draw(pipe, rows, "ddim", 20, 0.0).permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn - plain).max() > 1e-4  # and it does something


def test_negative_prompt_is_diffusers_own(pipe):
    r = row(guidance=5.0)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(r.prompt, negative_prompt=samplers.CONCEPT, guidance_scale=5.0, num_inference_steps=10,
                    output_type="pt", latents=samplers.initial_noise(r, (4, 8, 8), "cpu")).images
    drawn = samplers.draw(pipe, [r], "ddim", 10, 0.0, "negative-prompt")
    assert (drawn - expected).abs().max() < 1e-5


def test_draw_is_the_trained_chain_and_does_not_depend_on_the_batch(pipe):
    rows = [row(seed=s, image=k, guidance=3.0) for s in (1, 2) for k in (0, 1)]
    drawn = samplers.draw(pipe, rows, "ddim", 5, 0.0)
    latents = torch.cat([samplers.initial_noise(r, (4, 8, 8), "cpu") for r in rows])
    text, null_text = encode_prompts(pipe, [r.prompt for r in rows]), encode_prompts(pipe, [""])
    chain = rollout(pipe.unet, ddim_schedule(pipe.scheduler, 5, 0.0), text, null_text, 3.0,
                    [torch.Generator() for _ in rows], (4, 8, 8), initial=latents)
    assert torch.equal(drawn, samplers.decode(pipe.vae, chain.latents[:, -1]))
    noisy = samplers.draw(pipe, rows, "ddim", 5, 1.0)
    assert (noisy - drawn).abs().max() > 1e-3
    for k in range(4):
        assert (samplers.draw(pipe, rows[k:k + 1], "ddim", 5, 1.0) - noisy[k:k + 1]).abs().max() < 1e-5
    wide = samplers.draw(pipe, [row(width=128, height=64)], "lms", 3, 0.0)
    assert wide.shape == (1, 3, 64, 128)


# -------------------------------------------------------------------------------- FID

def test_fid_has_its_closed_form():
    """Diagonal Gaussians: |m_a - m_b|^2 + sum (s_a - s_b)^2, on samples whitened to exact moments."""
    rng, d = np.random.default_rng(0), 16
    x = rng.normal(size=(200, d))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    s_a, s_b, shift = rng.uniform(0.1, 2, d), rng.uniform(0.1, 2, d), rng.normal(size=d)
    expected = (shift ** 2).sum() + ((s_a - s_b) ** 2).sum()
    assert judges.frechet_distance(x * s_a, x * s_b + shift) == pytest.approx(expected, abs=1e-9)
    few = rng.normal(size=(5, d))  # fewer pictures than dimensions: singular covariances
    assert judges.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


class Layers(torch.nn.Module):
    """Stands in for the Inception: the mean of each colour, twice."""
    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299) and x.min() >= -1 and x.max() <= 1
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


class Inception(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(x)


# -------------------------------------------------------------------------------- the program, end to end

def run(models, *flags):
    evaluate.main([str(f) for f in ("--model", models / "a", "--device", "cpu", *flags)])


@pytest.fixture
def small_report(monkeypatch):
    """Without bars and with three pictures in the grid; the i2p test makes both in full."""
    monkeypatch.setattr(report, "bar_pictures", lambda *_: None)
    monkeypatch.setattr(report, "GRID", 3)


def test_interrupted_and_started_again_gives_the_identical_report(models, tmp_path, monkeypatch,
                                                                  small_report):
    flags = ("--base", models / "b", "--suite", "shapes", "--images", 1, "--steps", 2, "--batch", 5)
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(models, *flags, "--out", whole)
    judge, calls = shapes_suite.judge, []

    def interrupted(images, rows):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(images, rows)
    monkeypatch.setattr(shapes_suite, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(models, *flags, "--out", again)
    file = again / evaluate.slug(str(models / "a")) / "rows.jsonl"
    assert len(file.read_text().splitlines()) == 1 + 2 * 5
    file.write_bytes(file.read_bytes()[:-40])  # the power went while a line was being written
    run(models, *flags, "--out", again)
    assert len(calls) > 3
    for name in ("report.md", "report.json", "grid.png"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    keys = [json.loads(line)["key"] for line in file.read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys))
    before = len(calls)
    run(models, *flags, "--out", again)
    assert len(calls) == before  # everything was there
    with pytest.raises(SystemExit):
        run(models, *flags, "--steps", 3, "--out", again)  # other settings never mix


def test_rescoring_saved_pictures_gives_the_same_report(models, tmp_path, small_report):
    flags = ("--suite", "shapes", "--images", 4, "--steps", 2, "--out", tmp_path)
    run(models, *flags, "--save-images")
    before = (tmp_path / "report.md").read_bytes()
    evaluate.main(["--model", str(models / "a"), "--rescore", *map(str, flags)])
    assert (tmp_path / "report.md").read_bytes() == before


@pytest.fixture
def judge_files(models, tmp_path, monkeypatch):
    """Random prompt vectors whose hashes pass, and a nudenet that sees a foot everywhere. -> flags"""
    array = np.random.default_rng(1).normal(size=(2, 768)).astype(np.float16)
    (tmp_path / "prompts.p").write_bytes(pickled_array(array))
    torch.save(torch.nn.Parameter(torch.from_numpy(array).float()), tmp_path / "prompts.pt")
    known = {"q16_original": tmp_path / "prompts.p", "q16_finetuned": tmp_path / "prompts.pt"}
    monkeypatch.setattr(judges, "FILES", judges.FILES | {k: ("", judges.sha256(v)) for k, v in known.items()})
    fake = types.ModuleType("nudenet")
    fake.__file__ = str(tmp_path / "__init__.py")
    (tmp_path / "best.onnx").write_bytes(b"weights")

    def detect(self, path):
        assert Image.open(path).size in ((64, 64), (128, 64))
        return [{"class": "FEET_EXPOSED", "score": 0.7, "box": [0, 0, 1, 1]}]
    fake.NudeDetector = type("NudeDetector", (), {"detect": detect})
    monkeypatch.setitem(sys.modules, "nudenet", fake)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setattr(judges, "check_nudenet", lambda: "")
    version = evaluate.metadata.version
    monkeypatch.setattr(evaluate.metadata, "version",
                        lambda name: judges.NUDENET if name == "nudenet" else version(name))
    return ("--q16-original", known["q16_original"], "--q16-finetuned", known["q16_finetuned"], "--q16-clip",
            models / "clip", "--score-clip", models / "clip")


def test_i2p_end_to_end(models, tmp_path, judge_files):
    table = [(f"prompt {i}", I2P[i % 7], i, 7 + i % 2, 128 if i == 3 else 64, 64) for i in range(9)]
    run(models, "--base", models / "b", "--also", "negative-prompt", "--also", "sld-medium", "--suite", "i2p",
        "--prompts", write_hub(tmp_path / "i2p.csv", table), "--steps", 2, "--batch", 4,
        "--out", tmp_path / "out", *judge_files)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    inappropriate, parts, nude = report["tables"]
    assert len(inappropriate["rows"]) == 3 * (4 + 1)  # readings x (models and the difference)
    assert list(inappropriate["rows"][0]["cells"]) == [*I2P, "overall"]
    assert inappropriate["rows"][0]["cells"]["hate"]["n"] == 2  # cases 0 and 7
    assert [c["value"] for c in inappropriate["rows"][-2]["cells"].values()] == [100.0] * 8  # or NudeNet
    assert [parts["rows"][0]["cells"][c]["value"] for c in ("feet", "belly", "total")] == [9, 0, 9]
    assert nude["rows"][-1]["difference"] and nude["rows"][-1]["cells"]["overall"]["value"] == 0
    assert report["provenance"]["judges"]["nudenet"]["cut"] == 0.6
    text = (tmp_path / "out" / "report.md").read_text()
    assert "18.07" in text and 0 < text.index("original prompts, or NudeNet |") < text.index("*published*")
    left = sorted(p.name for p in (tmp_path / "out").rglob("*.png"))
    assert left in (["grid.png"], ["bars_1.png", "bars_2.png", "bars_3.png", "grid.png"])  # no picture itself


def test_the_papers_released_checkpoints_in_one_command(models, tmp_path, judge_files, small_report,
                                                        monkeypatch):
    """README's command, and docs/evaluation.md's: three subfolders of a hub's repository, one by one."""
    [command] = {block.replace("\\\n", " ") for name in ("README.md", "docs/evaluation.md")
                 for block in (ROOT / name).read_text().split("```\n")[1::2] if ":compact" in block}
    hub, fetched = tmp_path / "hub", []
    for folder, name in zip("aba", ("scaled", "compact", "empty-positive")):
        shutil.copytree(models / folder, hub / name)

    def snapshot(name, allow_patterns, ignore_patterns):
        fetched.append((name, *allow_patterns))
        keep = filter_repo_objects([str(p.relative_to(hub)) for p in hub.rglob("*") if p.is_file()],
                                   allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in keep:
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, tmp_path / "cache" / file)
        return tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda name, **_: str(models / "b"))
    table = [(f"prompt {i}", I2P[i % 7], i, 7, 64, 64) for i in range(2)]
    evaluate.main([*shlex.split(command)[2:], "--prompts", str(write_hub(tmp_path / "i2p.csv", table)),
                   "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "out"), *map(str, judge_files)])
    paper, base = "ItsMaxNorm/SafeDiffusion-R1", "CompVis/stable-diffusion-v1-4"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    made = report["provenance"]["models"]
    names = ("scaled", "compact", "empty-positive")
    assert list(made) == [f"{paper}:scaled", base, *(f"{paper}:{name}" for name in names[1:]),
                          f"{base} + sld-medium"]
    assert made[f"{paper}:compact"]["weights_sha256"] == made[base]["weights_sha256"]  # both are folder b
    assert set(fetched) == {(paper, f"{name}/*") for name in names}
    assert {p.name for p in (tmp_path / "cache").iterdir()} == set(names)


def test_prompt_files_and_captions_end_to_end(models, tmp_path, judge_files, small_report):
    (tmp_path / "own.txt").write_text("[hate]\na star\na ring\n[benign]\na circle\n")
    run(models, "--suite", "prompts", "--prompts", tmp_path / "own.txt", "--steps", 2, "--samples", 2,
        "--judges", "q16,clip", "--out", tmp_path / "out", *judge_files)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cells = report["tables"][0]["rows"][0]["cells"]
    assert {c: v["n"] for c, v in cells.items()} == {"hate": 4, "benign": 2, "overall": 6}
    captions = write_csv(tmp_path / "coco.csv", ("case_number", "prompt", "evaluation_seed"),
                         [(i, "a star", i) for i in range(4)])
    real = tmp_path / "real"
    real.mkdir()
    for i in range(3):
        Image.new("RGB", (70, 64), (i * 100, 50, 20)).save(real / f"{i}.jpg")
    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    run(models, "--suite", "coco", "--prompts", captions, "--steps", 2, "--save-images", "--fid", real,
        "--inception", tmp_path / "inception.pt", "--out", tmp_path / "coco", *judge_files)
    utility = json.loads((tmp_path / "coco" / "report.json").read_text())["tables"][0]
    cells = utility["rows"][0]["cells"]
    assert -1 <= cells["CLIP-T"]["value"] <= 1 and cells["FID"]["value"] > 0
    assert len(utility["published"]) == 5


# -------------------------------------------------------------------------------- bad input

COCO = ("--suite", "coco", "--prompts", "{tmp}/ok.csv")
PROMPTS = ("--suite", "prompts", "--prompts", "{tmp}/ok.csv")


@pytest.mark.parametrize("flags, said", (
    (("--suite", "i2p", "--prompts", "{tmp}/no_seed.csv"), "no column evaluation_seed or sd_seed"),
    (("--suite", "i2p", "--prompts", "{tmp}/words.csv"), "whole number"),
    (("--suite", "i2p", "--prompts", "{tmp}/nothing.csv"), "nothing.csv"),
    (("--suite", "i2p", "--prompts", "{tmp}/empty.csv"), "no column"),
    (("--suite", "coco"), "needs --prompts FILE.csv"),
    (("--suite", "geneval", "--prompts", "{tmp}/bad.jsonl"), "line 1: not JSON"),
    (("--suite", "shapes", "--limit", "5"), "use --images"),
    (("--suite", "shapes", "--judges", "q17"), "q17 unknown"),
    (("--suite", "shapes", "--images", "0"), "at least 1"),
    (("--suite", "shapes", "--eta", "2"), "between 0 and 1"),
    (("--suite", "shapes", "--guidance", "csv"), "give a number"),
    (("--suite", "shapes", "--batch", "0"), "--batch must be at least 1"),
    (("--suite", "shapes", "--judges", "clip"), "judged by its pixels"),
    (("--suite", "shapes", "--base", "{tmp}"), "not a diffusers pipeline"),
    (("--suite", "shapes", "--rescore"), "run once with --save-images"),
    ((*COCO, "--fid", "{tmp}"), "add --save-images"),
    ((*COCO, "--guidance", "csv"), "no column evaluation_guidance or sd_guidance_scale"),
    (("--suite", "prompts", "--judges", "clip", "--guidance", "csv", "--prompts", "{tmp}/own.txt"),
     "--suite prompts has no guidance column"),
    ((*COCO, "--save-images", "--fid", "{tmp}/nowhere"), "not a folder with pictures"),
    ((*COCO, "--save-images", "--fid", "{tmp}/broken"), "cannot read the picture"),
    ((*COCO, "--score-clip", "{tmp}"), "pass the folder with --score-clip"),
    ((*PROMPTS, "--judges", "nudenet"), "pip install nudenet==3.0.8"),
    ((*PROMPTS, "--judges", "q16"), "pass it with --q16-original FILE"),
    (("--suite", "i2p", "--judges", "clip"), "pass it with --prompts FILE.csv"),
    (("--suite", "geneval",), "pass it with --prompts FILE")))
def test_bad_input_is_one_line_that_says_what_to_do(flags, said, models, tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "no_seed.csv", ("prompt", "categories", "sd_image_width", "sd_image_height"),
              [("a", "hate", 64, 64)])
    write_hub(tmp_path / "words.csv", [("a", "hate", "seven", 7, 64, 64)])
    write_csv(tmp_path / "ok.csv", ("prompt",), [("a star",)])
    (tmp_path / "empty.csv").touch()
    (tmp_path / "own.txt").write_text("a star\n")
    (tmp_path / "bad.jsonl").write_text("not json\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"no picture")
    (tmp_path / "broken" / "2.png").write_bytes(b"no picture")

    def no_network(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(judges.urllib.request, "urlopen", no_network)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    monkeypatch.setattr(judges.util, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluate.results, "open_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        run(models, *(f.format(tmp=tmp_path) for f in flags), "--out", tmp_path / "out", "--cache", tmp_path)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and said in error[-1] and error[-1].startswith("evaluate.py:")


def test_without_the_folder_shapes_its_suite_is_absent(tmp_path):
    shutil.copy(evaluate.__file__, tmp_path)
    spec = importlib.util.spec_from_file_location("evaluate_alone", tmp_path / "evaluate.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert list(alone.SUITES) == ["i2p", "geneval", "coco", "prompts"]
    assert list(evaluate.SUITES) == [*alone.SUITES, "shapes"]
    with pytest.raises(SystemExit):
        alone.parse(["--model", "x", "--suite", "shapes"])


def test_another_nudenet_is_refused_and_a_missing_one_left_out(monkeypatch):
    monkeypatch.setattr(judges.util, "find_spec", lambda name: True)
    monkeypatch.setattr(judges.metadata, "version", lambda name: "3.4.2")
    assert "pip install nudenet==3.0.8" in judges.check_nudenet() and "3.4.2" in judges.check_nudenet()
    args = arguments("prompts", "--device", "cpu")
    args.judges.remove("q16")
    notes = evaluate.check(args, {})
    assert args.judges == [] and "no NudeNet figures" in notes[0]
