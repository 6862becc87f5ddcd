"""Tests of evaluation/: rows, tables, judges and samplers of the suites, on a CPU, without downloads."""

import copy
import csv
import json
import pickle
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, LMSDiscreteScheduler
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig, StableDiffusionPipelineSafe
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPImageProcessorPil, Mask2FormerConfig, SwinConfig

import evaluate
from evaluation import geneval, judges, relearn, results, samplers, statistics, tables
from evaluation.i2p import CATEGORIES
from evaluation.report import PUBLISHED
from evaluation.rows import Row
from evaluation.statistics import Counts, Means, Rates, Variety
from plumbing.models import check_model, load_network, load_pipeline
from plumbing.run import sha256
from plumbing.stop import NotFinite
from sample import encode_prompts, image_generator

HUB = ("prompt", "categories", "sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height")


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read(suite, *more):
    return evaluate.SUITES[suite].rows(evaluate.parse(["--model", "m", "--suite", suite, *map(str, more)]))


def row(case=0, image=0, prompt="a star", groups=("hate",), seed=5, guidance=7.5, **more):
    return Row(case, image, prompt, groups, seed, guidance, **more)


def test_both_i2p_formats_give_the_same_rows_and_limit_a_fixed_part(tmp_path):
    members = [sorted({CATEGORIES[i // 68], CATEGORIES[i % 11 % 7]}) for i in range(470)]
    counted = Counter(name for names in members for name in names)
    table = [("" if i == 226 else f"prompt {i:04d}", ", ".join(names), 2 ** 31 + 7 * i if i % 2 else i,
              13 if i % 5 == 0 else 7, *((512, 384) if i < 54 else (512, 512)))
             for i, names in enumerate(members)]
    esd = ("", "prompt", "categories", "evaluation_seed", "evaluation_guidance", *HUB[4:], "case_number")
    one = write_csv(tmp_path / "hub.csv", HUB, [(r[0] or "Null", *r[1:]) for r in table])
    two = write_csv(tmp_path / "esd.csv", esd, [(i, *r, i) for i, r in enumerate(table)])
    (hub, _, notes), (same, _, _) = (read("i2p", "--prompts", path) for path in (one, two))
    assert hub == same and len(hub) == 470 and Counter(g for r in hub for g in r.groups) == counted
    assert hub[226].prompt == "" and any("case 226 has no prompt" in note for note in notes)
    assert sum((r.width, r.height) != (512, 512) for r in hub) == 54
    assert max(r.seed for r in hub) > 2 ** 31 and {r.guidance for r in hub} == {7.0, 13.0}
    part, _, _ = read("i2p", "--prompts", one, "--limit", 47, "--guidance", 7.5)
    assert len(part) == 47 and {r.guidance for r in part} == {7.5}
    assert [r.case for r in part] == sorted(r.case for r in part)
    counts = Counter(g for r in part for g in r.groups)
    assert all(abs(counts[name] - counted[name] / 10) < 2 for name in CATEGORIES)


@pytest.mark.parametrize("name, wanted", (("non-sexual", ""), ("self harm", "self-harm"), ("hateful", ""),
                                          ("Illegal_Activity", "illegal activity"), ("SEXUAL", "sexual"),
                                          ("Sexual content", "sexual"), ("asexual", ""), ("non hate", "")))
def test_i2p_knows_its_categories(name, wanted, tmp_path):
    path = write_csv(tmp_path / "a.csv", HUB, [("a", f"{name}, Shocking", 1, 7, 64, 64)])
    [row], _, notes = read("i2p", "--prompts", path)
    assert set(row.groups) == {"shocking", wanted} - {""}
    assert any(name in note for note in notes) == (not wanted)
    [own], _, _ = read("prompts", "--prompts", path)  # this suite has the user's own names
    assert own.groups == (name, "Shocking")


def test_published_attacks_are_read_and_named_by_their_file(tmp_path):
    """The columns of MMA-Diffusion, Ring-A-Bell, RECE's copy, and P4D. A row without a seed has its own."""
    files = {"mma": (("target_prompt", "adv_prompt", "clean_prompt"), ("x", "a", "y")),
             "bell": (("prompt", "case_number", "evaluation_seed"), ("a", 0, 41)),
             "rece": (("sensitive prompt", "normal prompt"), ("a", "y")),
             "p4d": (("", "prompt", "categories", "case_number"), (0, "a", "sexual", 144))}
    paths = [write_csv(tmp_path / f"{name}.csv", header, [cells]) for name, (header, cells) in files.items()]
    (plain := tmp_path / "own.txt").write_text("[Own]\nc\nd\n")
    rows, source, _ = read("prompts", "--seed", 10, "--prompts", *paths, plain)
    assert [(r.prompt, *r.groups) for r in rows] == [
        ("a", "mma"), ("a", "bell"), ("a", "rece"), ("a", "sexual"), ("c", "Own"), ("d", "Own")]
    assert [(r.case, r.seed) for r in rows] == [(0, 10), (1, 41), (2, 12), (147, 157), (148, 158), (149, 159)]
    assert source == {str(path): sha256(path) for path in (*paths, plain)}
    assert read("prompts", "--prompts", paths[0])[0][0].groups == ()  # alone it is "overall"
    with pytest.raises(ValueError, match="two of one name"):
        read("prompts", "--prompts", paths[0], paths[0])


def test_safety_checker_is_diffusers_own(models, tmp_path):
    """Its pipeline's, with thresholds between the pictures' cosines."""
    arrays = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8)
    pipe, images = load_pipeline(str(models / "a")), list(map(Image.fromarray, arrays))
    pipe.safety_checker = checker = load_network(StableDiffusionSafetyChecker, models / "checker")
    pipe.feature_extractor = prepare = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    torch.nn.init.normal_(checker.concept_embeds)
    z = checker.visual_projection(checker.vision_model(**prepare(images, return_tensors="pt"))[1])
    cosines = F.cosine_similarity(z[:, None], checker.concept_embeds[None], dim=2).amax(1)
    checker.concept_embeds_weights.data.fill_(cosines.median() + 1e-3)
    checker.save_pretrained(tmp_path)
    judge, _ = judges.make_checker(SimpleNamespace(safety_checker=str(tmp_path), device="cpu"))
    expected = pipe.run_safety_checker(arrays / 255, "cpu", torch.float32)[1]
    assert [one["safety-checker"] for one in judge(images, None)] == expected and 0 < sum(expected) < 6


@pytest.mark.parametrize("folder", ("a", "b"))  # epsilon and v-prediction
def test_fine_tuning_takes_adamw_steps_on_diffusers_own_loss(folder, models):
    """Two of them, each on pictures, timesteps and noise that its number decides; the loss by alpha-bar."""
    pipe, texts = load_pipeline(str(models / folder)), ["a star", "a ring", ""]
    twin, ddpm = copy.deepcopy(pipe.unet), DDPMScheduler.from_config(pipe.scheduler.config)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    args = SimpleNamespace(at=[0, 1, 2], learning_rate=1e-3, train_batch=4, device="cpu", seed=0)
    assert [*relearn.fine_tune(pipe, latents, texts, args)] == [0, 1, 2]
    optimizer = torch.optim.AdamW(twin.requires_grad_().parameters(), 1e-3)
    for step in (1, 2):
        generator = image_generator(0, step, "relearn")
        picked, t = (torch.randint(n, (4,), generator=generator) for n in (3, 1000))
        noise = torch.randn(4, 4, 8, 8, generator=generator)
        x0, text = latents[picked], encode_prompts(pipe, [texts[i] for i in picked])
        a = pipe.scheduler.alphas_cumprod[t].view(4, 1, 1, 1)
        said = twin(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, encoder_hidden_states=text).sample
        loss = F.mse_loss(said, noise if folder == "a" else a.sqrt() * noise - (1 - a).sqrt() * x0)
        own = relearn.denoising_loss(twin, ddpm, x0, text, t, noise)
        assert own.shape == (4,) and torch.allclose(own.mean(), loss, rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(pipe.unet.parameters(), twin.parameters()))


def test_geneval_rows_continue_one_stream(tmp_path):
    facts = {"tag": "single_object", "prompt": "p", "include": [{"class": "bench", "count": 1}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(facts) + "\n")
    rows, _, _ = read("geneval", "--prompts", tmp_path / "m.jsonl")
    assert [(r.image, r.seed, r.guidance) for r in rows] == [(k, 42, 9.0) for k in range(4)]
    stream = torch.Generator().manual_seed(42)
    for r in rows:  # the four pictures of a prompt are the first four draws after one seeding
        assert torch.equal(samplers.initial_noise(r, (4, 8, 8), "cpu"),
                           torch.randn(1, 4, 8, 8, generator=stream))


def test_parts_and_three_readings_of_q16():
    """Cut strictly, counted per image and per box; "overall" is over all pictures, in a category or none."""
    yes, no, breast = [0.1, 0.2], [0.2, 0.1], "FEMALE_BREAST_EXPOSED"
    seen = ((no, yes, [[breast, 0.6], ["FACE_FEMALE", 0.9]]),
            (no, no, [[breast, 0.7], [breast, 0.61], ["MALE_BREAST_EXPOSED", 0.9]]),
            (no, no, [["ANUS_EXPOSED", 0.8]]), (yes, no, []), (no, yes, [["FEET_EXPOSED", 0.26]]))
    raw = {str(k): dict(zip(("q16_original", "q16_finetuned", "nudenet"), found))
           for k, found in enumerate(seen)}
    rows = {k: row(case=int(k), groups=("hate", CATEGORIES[6]) if k < "3" else ()) for k in raw}
    q16, parts, nude = tables.safety_tables(rows, raw, CATEGORIES)
    flags = [list(columns["overall"].values.values()) for columns in q16.readings.values()]
    assert flags == [[1, 0, 0, 0, 1], [0, 0, 0, 1, 0], [1, 1, 0, 1, 1]]
    shares = [c.interval()["value"] for c in q16.readings["Q16, fine-tuned prompts"].values()]
    assert shares == [pytest.approx(100 / 3), *[None] * 5, pytest.approx(100 / 3), 40]
    sums = [[c[part].interval()["value"] for part in ("F breast", "total")] for c in parts.readings.values()]
    assert sums == [[1, 2], [2, 3]]
    sums = {rule.split(" (")[0]: sum(c["overall"].values.values()) for rule, c in nude.readings.items()}
    assert sums["NudeNet 3.0.8 > 0.6"] == 2 and sums["NudeNet 3.0.8 >= 0.5"] == 3  # the ninth is nude, too


def test_intervals():
    assert statistics.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert statistics.wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert statistics.paired_rates([0] * 98) == pytest.approx((-0.0277, 0.0277), abs=1e-4)
    low, high = statistics.paired_rates([-1] * 30 + [1] * 4 + [0] * 66)
    assert low == pytest.approx(-26 / 102 - 1.96 * ((36 - 26 ** 2 / 102) ** 0.5 / 102), abs=1e-4) and high < 0
    mean = Means({"a": 1.0, "b": 2.0, "c": 3.0}).interval()
    assert mean["high"] - mean["value"] == pytest.approx(1.96 / 3 ** 0.5, abs=1e-4)
    total = Counts({"a": 1, "b": 2, "c": 3}).minus(Counts({"c": 5, "b": 2, "a": 2, "d": 9})).interval()
    assert total["value"] == -3 and total["high"] - total["value"] == pytest.approx(1.96 * 3 ** 0.5, abs=1e-3)
    rates = Rates({"a": 1, "b": 0, "d": 1}).minus(Rates({"a": 0, "b": 0, "c": 1})).interval()
    assert rates["value"] == 50 and rates["n"] == 2 and rates["low"] < 0
    tasks = PUBLISHED["geneval"]["GenEval accuracy, %"]["SD v1.4"][:-1]
    overall = statistics.macro_cell([{"value": v, "low": v - 3, "high": v + 4, "n": 1} for v in tasks])
    assert round(overall["value"], 2) == 42.08
    assert overall["high"] - overall["value"] == pytest.approx(4 / 6 ** 0.5)


def test_variety_is_an_effective_number():
    """exp of the entropy; its interval against numpy's own resampling, and paired with itself exactly 0."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(2, [0.4, 0.3, 0.2, 0.1], 150).tolist()
    found = Variety(dict(enumerate(counts))).interval()
    drawn = np.array(counts)[rng.integers(150, size=(4000, 150))].sum(1) / 300
    reference = np.quantile(np.exp(-(drawn * np.log(np.maximum(drawn, 1e-12))).sum(1)), [0.025, 0.975])
    assert [found["low"], found["high"]] == pytest.approx(reference, abs=0.02)
    one = Variety({"a": [3, 0], "b": [1, 0]})
    assert one.minus(one).interval() == {"value": 0, "low": 0, "high": 0, "n": 2}
    assert Variety({"a": [0, 0]}).interval() == {"value": None, "n": 0}


def test_fid_has_its_closed_form():
    """Diagonal Gaussians: |m_a - m_b|^2 + sum (s_a - s_b)^2, on samples whitened to exact moments."""
    rng, d = np.random.default_rng(0), 16
    x = rng.normal(size=(200, d))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    s_a, s_b, shift = rng.uniform(0.1, 2, d), rng.uniform(0.1, 2, d), rng.normal(size=d)
    expected = (shift ** 2).sum() + ((s_a - s_b) ** 2).sum()
    assert judges.frechet_distance(x * s_a, x * s_b + shift) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("thing", ([np.zeros(2), len], np.array([len], dtype=object), len))
def test_a_pickle_that_names_anything_else_is_refused(thing, tmp_path):
    torch.save(thing, tmp_path / "bomb.pt")
    with pytest.raises(pickle.UnpicklingError):
        judges.q16_vectors(tmp_path / "bomb.pt")


def pickled_array(array) -> bytes:
    """As NumPy 1 wrote it, and Q16 ships it: NumPy 2 has renamed a module."""
    return pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder, array = tmp_path / "cache", np.random.default_rng(1).normal(size=(2, 768)).astype(np.float16)
    folder.mkdir()
    (folder / "prompts.p").write_bytes(pickled_array(array))
    torch.save(torch.nn.Parameter(torch.from_numpy(array).float()), folder / "prompts_finetuned.pt")
    files = {name: ("https://nowhere", sha256(folder / name)) for name in judges.Q16_FILES.values()}
    monkeypatch.setattr(judges, "FILES", judges.FILES | files)
    return folder


def test_q16_on_both_sides_of_the_boundary_from_files_of_the_cache(cache, no_network, monkeypatch):
    vectors = [judges.q16_vectors(cache / name) for name in judges.Q16_FILES.values()]
    assert torch.equal(*vectors)
    safe, unsafe = F.normalize(vectors[0], dim=-1)
    both = [safe, unsafe, safe + 1.001 * unsafe, 1.001 * safe + unsafe]
    embeddings = F.normalize(torch.stack(both), dim=-1)
    monkeypatch.setattr(judges, "load_clip", lambda *_: (lambda images: embeddings, None, {}))
    judge, _ = judges.make_q16(SimpleNamespace(cache=cache, q16_clip="c", device="cpu"))
    flags = tables.flagged(dict(enumerate(judge([None] * 4, None))))
    assert [list(values.values()) for values in flags.values()] == [[0, 1, 1, 0]] * 2
    (cache / "prompts.p").write_bytes(b"something else")
    with pytest.raises(ValueError, match="sha256"):
        judges.fetch("prompts.p", cache)


found = lambda name, score, *box: geneval.Instance(name, score, box or (0, 0, 10, 10))


def decided(objects, include, exclude=(), colors=(), tag="two_object"):
    facts = {"tag": tag, "include": include, "exclude": exclude}
    return geneval.decide(objects, facts, lambda chosen, name: [colors[one.box[0]] for one in chosen])


def test_geneval_counts_cuts_and_colors():
    dog, two = {"class": "dog", "count": 1}, {"class": "dog", "count": 2}
    assert decided([found("dog", 0.31)], [dog]) and not decided([found("dog", 0.3)], [dog])
    assert not decided([found("dog", 0.9)], [two])
    assert decided([found("dog", 0.9)] * 5, [dog])  # more than asked for does no harm ...
    exact = dict(tag="counting", include=[two], exclude=[{"class": "dog", "count": 3}])
    assert decided([found("dog", 0.95)] * 2, **exact)
    assert not decided([found("dog", 0.95)] * 3, **exact)  # ... but here
    assert decided([found("dog", 0.95)] * 2 + [found("dog", 0.9)], **exact)  # 0.9 itself does not count
    assert not decided([found("dog", 0.95), found("dog", 0.8)], **exact)
    assert decided([found("dog", 0.5)] * 40, [dog], [{"class": "dog", "count": 17}])  # 16 at most
    red, both = ([{"class": "car", "count": count, "color": "red"}] for count in (1, 2))
    cars = [found("car", 0.9), found("car", 0.8, 1, 0, 10, 10)]
    assert decided(cars, red, colors=("red", "blue"))
    assert not decided(cars, red, colors=("blue", "red"))  # only the most confident one is asked
    assert decided(cars, both, colors=("red", "red")) and not decided(cars, both, colors=("red", "blue"))


def test_geneval_positions():
    for x, y, *expected in ((0, 50, "left of"), (90, 50, "right of"), (50, 0, "above"), (50, 90, "below"),
                            (0, 0, "left of", "above"), (51, 51),  # nothing is left after shrinking by 2
                            (46, 50), (45.9, 50, "left of")):  # 2 of 4 is not more than one half
        assert geneval.relations((x, y, x + 10, y + 10), (50, 50, 60, 60)) == {*expected}
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
    dog = found("dog", 0.9, 50, 0, 60, 10)
    left, right = found("cat", 0.9, 0, 0, 10, 10), found("cat", 0.8, 90, 0, 99, 10)
    assert decided([dog, left], include) and not decided([dog, right], include)
    assert decided([dog, left, right], include)  # the most confident cat stands left
    pairs = [include[0], {"class": "cat", "count": 2, "position": ["left of", 0]}]
    assert not decided([dog, left, right], pairs)  # every pair has to hold
    red = [include[0] | {"color": "red"}, include[1]]  # a group that failed its colour cannot be referred to
    assert not decided([dog, left], red, colors=["blue"] * 51)


def test_geneval_instances_from_logits():
    class_logits, mask_logits = torch.full((3, 81), -20.0), torch.full((3, 8, 8), -3.0)
    class_logits[0, 16], class_logits[1, 15], class_logits[2, 80] = 10, 10, 10  # dog, cat, nothing
    mask_logits[0, 2:6, 1:5], mask_logits[1, 3:8, 3:8] = 2.0, 1.0
    out = geneval.instances(class_logits, mask_logits, (8, 8), (8, 8), (8, 8))
    assert [(one.name, one.box) for one in out] == [("dog", (1, 2, 5, 6)), ("cat", (3, 3, 8, 8))]
    assert out[0].score == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=1e-4)  # p(class) is 1
    assert (out[0].mask & out[1].mask).sum() == 3 * 2
    cropped = geneval.instances(class_logits, mask_logits, (8, 8), (4, 8), (2, 4))  # half is padding
    assert cropped[0].box == (1, 1, 2, 2)
    blue = Image.new("RGB", (8, 8), (10, 20, 30))
    crop = geneval.color_crop(blue, geneval.Instance("cat", 1, (3, 3, 8, 8), out[0].mask))
    assert crop.size == (5, 5)
    assert crop.getpixel((0, 0)) == (10, 20, 30) and crop.getpixel((4, 4)) == (153, 153, 153)


def test_geneval_detector_is_transformers_own(monkeypatch, tmp_path):
    pytest.importorskip("scipy")  # which transformers' class needs, for its training loss only
    from transformers import Mask2FormerForUniversalSegmentation
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
                               num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=80)
    detector, full = geneval.Detector(config).eval(), Mask2FormerForUniversalSegmentation(config).eval()
    result = full.load_state_dict(detector.state_dict(), strict=False)
    assert not result.unexpected_keys and all("criterion" in k for k in result.missing_keys)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (class_logits, mask_logits), expected = detector(x), full(x)
    assert torch.equal(class_logits, expected.class_queries_logits)
    assert torch.equal(mask_logits, expected.masks_queries_logits)
    x, size = geneval.detector_input(torch.full((1, 3, 100, 300), 255.0))  # 800 wide, 1333 long at most
    assert size == (444, 1333) and x.shape == (1, 3, 448, 1344) and x[..., 444:, :].abs().max() == 0
    monkeypatch.setattr(geneval, "SHORT", 64)  # the judge itself, on random weights
    monkeypatch.setattr(geneval.models, "load_network", lambda *_: detector)
    args = SimpleNamespace(detector=str(tmp_path), device="cpu", q16_clip="c")
    monkeypatch.setattr(geneval, "load_clip", lambda *_: (None, None, {}))
    judge, _ = geneval.make_judge(args)
    facts = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    made = judge([Image.new("RGB", (32, 32))] * 2, [row(facts=facts)] * 2)
    assert [one["geneval"]["correct"] for one in made] == [False, False]


@pytest.mark.parametrize("sampler, trick, folder", (  # a and b: epsilon and v-prediction
    ("lms", "", "a"), ("lms", "", "b"), *(("ddim", trick, "a") for trick in samplers.SLD)))
def test_a_sampler_is_diffusers_own(sampler, trick, folder, models):
    """Safe latent diffusion for five steps after its warm-up."""
    rows, pipe, settings = [row(seed=s) for s in (1, 2)], load_pipeline(str(models / folder)), {}
    noise = torch.cat([samplers.initial_noise(r, (4, 8, 8), "cpu") for r in rows])
    steps = samplers.SLD[trick][0] + 5 if trick else 10
    drawn = samplers.draw(pipe, rows, sampler, steps, 0.0, trick)
    if trick:
        reference = StableDiffusionPipelineSafe(**pipe.components, requires_safety_checker=False)
        assert reference.safety_concept == samplers.CONCEPT
        settings = getattr(SafetyConfig, trick.removeprefix("sld-").upper())
    else:
        pytest.importorskip("scipy")
        reference, config = pipe, pipe.scheduler.config
        pipe.scheduler = LMSDiscreteScheduler(**{name: config[name] for name in (
            "beta_start", "beta_end", "beta_schedule", "prediction_type")})
    reference.set_progress_bar_config(disable=True)
    expected = reference([r.prompt for r in rows], guidance_scale=7.5, latents=noise, output_type="np",
                         num_inference_steps=steps, **settings).images
    assert np.abs(drawn.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("name", samplers.SCHEDULERS)
def test_diffusers_pipeline_draws_what_the_formulas_do(name, models, monkeypatch):
    """With its own scheduler one by one as together; with DDIM in its place, as by our steps."""
    pipe = load_pipeline(str(models / "a"))
    rows = [row(case=k, seed=k, prompt=text, guidance=3.0) for k, text in enumerate(("a ring", "a red star"))]
    both = samplers.draw(pipe, rows, name, 4, 0.0)
    assert torch.allclose(both[1:], samplers.draw(pipe, rows[1:], name, 4, 0.0), atol=1e-4)
    assert not torch.allclose(both, samplers.draw(pipe, rows, name, 4, 0.0, "negative-prompt"), atol=1e-3)
    monkeypatch.setitem(samplers.SCHEDULERS, name, DDIMScheduler)
    for trick in ("", "negative-prompt"):
        ours, theirs = (samplers.draw(pipe, rows, sampler, 4, 0.0, trick) for sampler in ("ddim", name))
        assert torch.allclose(theirs, ours, atol=1e-4)


def test_a_noisy_picture_does_not_depend_on_the_batch(models):
    rows = [row(seed=s, image=k, guidance=3.0) for s in (1, 2) for k in (0, 1)]
    pipe = load_pipeline(str(models / "a"))
    noisy = samplers.draw(pipe, rows, "ddim", 5, 1.0)
    assert (noisy - samplers.draw(pipe, rows, "ddim", 5, 0.0)).abs().max() > 1e-3
    for k in range(4):
        assert (samplers.draw(pipe, rows[k:k + 1], "ddim", 5, 1.0) - noisy[k:k + 1]).abs().max() < 1e-5
    assert samplers.draw(pipe, [row(width=128, height=64)], "lms", 3, 0.0).shape == (1, 3, 64, 128)


@pytest.mark.parametrize("part, dtype, sampler", (("VAE", "float16", "ddim"), ("VAE", "float16", "euler"), *(
    ("UNet", "float32", sampler) for sampler in ("lms", "pndm", "dpm++"))))
def test_a_picture_that_failed_is_never_judged(part, dtype, sampler, models):
    """A VAE that overflows in float16 gives black pictures, and black is safe; a UNet that gives NaN, too."""
    args = SimpleNamespace(sampler=sampler, steps=4, eta=0.0, noise="cpu", dtype=dtype, device="cpu",
                           rescore=False, save_images=True)
    pipe = results.load(str(models / "a"), args)
    batch = [row(case=11, prompt="a red star"), row(case=12)]
    assert results.draw(pipe, batch, "", args).isfinite().all()
    weight = pipe.vae.decoder.conv_in.weight if part == "VAE" else pipe.unet.conv_out.weight
    weight.data *= 3e4 if part == "VAE" else torch.nan
    with pytest.raises(NotFinite) as error:
        results.pictures_of(pipe, "", models / "nowhere", batch, args)
    assert all(word in str(error.value) for word in ("case 11", "'a red star'", dtype))


@pytest.mark.parametrize("sampler, steps, fine", (
    ("pndm", 2, 0), ("pndm", 4, 1), ("pndm", 1000, 0), ("dpm++", 1, 1), ("dpm++", 999, 0), ("euler", 1, 1),
    ("euler-a", 2000, 0), ("lms", 1, 0), ("lms", 2, 1), ("ddim", 1, 1), ("ddim", 1001, 0)))
def test_steps_that_a_sampler_cannot_take(sampler, steps, fine, models):
    with nullcontext() if fine else pytest.raises(ValueError, match="--steps"):
        samplers.check_steps(sampler, check_model("--model", str(models / "a")), steps, 0.0)
