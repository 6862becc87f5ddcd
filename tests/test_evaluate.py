"""Tests of evaluate.py from end to end, on a CPU, without downloads; its parts are in test_suites.py."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_suites import HUB, cache, write_csv  # noqa: F401  (a fixture)

import evaluate
from evaluation import judges, relearn, results
from evaluation import shapes as shapes_suite
from evaluation.i2p import CATEGORIES
from evaluation.tables import safety_tables
from plumbing.models import load_pipeline, read_json
from plumbing.run import sha256


def run(model, *flags):
    evaluate.main([str(flag) for flag in ("--model", model, "--device", "cpu", *flags)])


def test_interrupted_and_started_again_gives_the_identical_report(models, tmp_path, monkeypatch):
    flags = ("--base", models / "b", "--suite", "shapes", "--images", 1, "--steps", 1, "--batch", 5)
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(models / "a", *flags, "--out", whole, "--save-images")
    judge = Mock(wraps=shapes_suite.judge, side_effect=[DEFAULT] * 2 + [KeyboardInterrupt])
    monkeypatch.setattr(shapes_suite, "judge", judge)
    with pytest.raises(KeyboardInterrupt):
        run(models / "a", *flags, "--out", again)
    file = again / evaluate.slug(str(models / "a")) / "rows.jsonl"
    assert len(file.read_text().splitlines()) == 1 + 2 * 5
    file.write_bytes(file.read_bytes()[:-40])  # the power went while a line was being written
    judge.side_effect = None
    run(models / "a", *flags, "--out", again)
    before = judge.call_count
    run(models / "a", *flags, "--out", again)
    assert before > 3 and judge.call_count == before  # everything was there
    run(models / "a", *flags, "--out", whole, "--rescore")  # by the pictures that were saved
    for name in ("report.md", "report.json"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert len(read_json(again / "report.json")["tables"]) == 6


def test_what_is_continued_is_compared_by_content(models, tmp_path, monkeypatch):
    model, clip = (Path(shutil.copytree(models / name, tmp_path / name)) for name in ("a", "clip"))
    (tmp_path / "own.txt").write_text("a star\n")
    drawn, draw = [], results.draw
    monkeypatch.setattr(results, "draw", lambda *args: drawn.append(1) or draw(*args))

    def again(*flags):
        run(model, "--suite", "prompts", "--prompts", tmp_path / "own.txt", "--judges", "clip",
            "--score-clip", clip, "--sampler", "ddim", "--steps", 1, "--out", tmp_path / "out", *flags)
        return read_json(tmp_path / "out" / "report.json")["tables"][0]["rows"]

    def change(weights):
        save_file({name: t * 1.5 for name, t in load_file(weights).items()}, weights, {"format": "pt"})

    def refused(what, *flags):
        with pytest.raises(ValueError, match=f"made with other settings .*{what}"):
            again(*flags)

    first, n = again("--save-images"), len(drawn)
    clip = clip.rename(tmp_path / "renamed")
    assert again() == first and len(drawn) == n
    for flags in ((), ("--rescore",)):
        refused("settings.steps: was 1, is 2", "--steps", 2, *flags)
    refused("judges.clip: was", "--judges", "safety-checker", "--safety-checker", models / "checker")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "version", lambda name: "0.1")
        refused("versions.torch: was .*, is .*0.1")
    change(clip / "model.safetensors")
    refused("judges.clip.weights.files: was")
    assert again("--rescore") != first  # which asks for the settings alone
    change(model / "unet" / "diffusion_pytorch_model.safetensors")
    refused("model.weights.unet: was")


@pytest.fixture
def judge_flags(models, cache, tmp_path, monkeypatch):
    detector = Mock(detect=lambda path: [{"class": "FEET_EXPOSED", "score": 0.7}])
    (tmp_path / "best.onnx").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(
        __file__=str(tmp_path / "x.py"), __spec__="installed", NudeDetector=lambda: detector))
    monkeypatch.setattr(judges.metadata, "version", lambda name: judges.NUDENET)
    return ("--cache", cache, "--q16-clip", models / "clip", "--score-clip", models / "clip",
            "--safety-checker", models / "checker")


def test_i2p_end_to_end(models, tmp_path, judge_flags):
    table = [(f"prompt {i}", CATEGORIES[i % 7], i, 7 + i % 2, 128 if i == 3 else 64, 64) for i in range(9)]
    run(models / "a", "--base", models / "b", "--also", "negative-prompt", "--also", "sld-medium", "--suite",
        "i2p", "--prompts", write_csv(tmp_path / "i2p.csv", HUB, table), "--steps", 2, "--batch", 4,
        "--out", tmp_path / "out", *judge_flags)
    made = read_json(tmp_path / "out" / "report.json")
    inappropriate, parts, nude = made["tables"]
    assert len(inappropriate["rows"]) == 3 * (4 + 1)  # readings x (models and the difference)
    assert list(inappropriate["rows"][0]["cells"]) == [*CATEGORIES, "overall"]
    assert inappropriate["rows"][0]["cells"]["hate"]["n"] == 2  # cases 0 and 7
    assert [c["value"] for c in inappropriate["rows"][-2]["cells"].values()] == [100.0] * 8  # or NudeNet
    assert [parts["rows"][0]["cells"][c]["value"] for c in ("feet", "belly", "total")] == [9, 0, 9]
    assert [row["reading"].split(" (")[0] for row in nude["rows"][::5]] == [
        "NudeNet 3.0.8 > 0.6", "NudeNet 3.0.8 >= 0.5", "Q16, fine-tuned prompts", "Q16, original prompts",
        "Q16, original prompts, or NudeNet", "Stable Diffusion's safety checker"]
    assert nude["rows"][4]["difference"] and nude["rows"][4]["cells"]["overall"]["value"] == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "18.07" in text and 0 < text.index("original prompts, or NudeNet |") < text.index("*published*")
    assert not list((tmp_path / "out").rglob("*.png"))  # no picture is kept unasked


class Inception(torch.nn.Module):  # stands in for clean-fid's
    @torch.jit.export
    def layers(self, x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


def test_prompt_files_and_captions_end_to_end(models, tmp_path, judge_flags, cache):
    (tmp_path / "own.txt").write_text("[Hate]\na star\na ring\n[benign]\na circle\n")
    run(models / "a", "--suite", "prompts", "--prompts", tmp_path / "own.txt", "--steps", 2, "--samples", 2,
        "--judges", "q16,clip", "--out", tmp_path / "out", *judge_flags)
    first = [table["rows"][0]["cells"] for table in read_json(tmp_path / "out" / "report.json")["tables"]]
    q16, *_, score, spread = ({name: cell["n"] for name, cell in cells.items()} for cells in first)
    assert q16 == {"Hate": 4, "benign": 2, "overall": 6}
    assert score == {"CLIP-T": 6, "CLIP-T, Hate": 4, "CLIP-T, benign": 2}
    assert spread == {"spread": 3, "spread, Hate": 2, "spread, benign": 1}  # of prompts
    captions = write_csv(tmp_path / "coco.csv", ("case_number", "caption", "evaluation_seed"),
                         [(i, "a star", i) for i in range(4)])
    (tmp_path / "real").mkdir()
    for i in range(3):
        Image.new("RGB", (70, 64), (i * 100, 50, 20)).save(tmp_path / "real" / f"{i}.jpg")
    torch.jit.script(Inception()).save(str(cache / judges.INCEPTION))
    run(models / "a", "--suite", "coco", "--prompts", captions, "--steps", 2, "--save-images", "--fid",
        tmp_path / "real", "--out", tmp_path / "coco", *judge_flags)
    made = read_json(tmp_path / "coco" / "report.json")
    utility, facts = made["tables"][0], made["provenance"]["judges"]["fid"]
    cells = utility["rows"][0]["cells"]
    assert -1 <= cells["CLIP-T"]["value"] <= 1 and cells["FID"]["value"] > 0
    assert len(utility["published"]) == 5 and facts["inception_sha256"] == sha256(cache / judges.INCEPTION)


def test_another_nudenet_is_refused_and_what_is_missing_left_out(models, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(judges.util, "find_spec", lambda name: True)
    monkeypatch.setattr(judges.metadata, "version", lambda name: "3.4.1")
    words = ["--model", "m", "--suite", "prompts", "--device", "cpu", "--safety-checker", f"{tmp_path}/none",
             "--cache", str(cache), "--q16-clip", f"{models}/clip"]
    chosen, facts, notes = judges.make_judges(evaluate.parse(words), None, [])
    assert len(chosen) == 1 and list(facts) == ["q16"] and "3.4.1: pip install nudenet==3.0.8" in notes[0]
    assert "no figures by safety-checker: --safety-checker" in notes[1]
    with pytest.raises(ValueError, match="no such folder"):
        judges.make_judges(evaluate.parse([*words, "--judges", "safety-checker"]), None, [])


def test_the_newer_nudenet_has_figures_of_its_own(judge_flags, monkeypatch):
    monkeypatch.setattr(judges.metadata, "version", lambda name: "3.4.2")
    judge, facts = judges.make_nudenet(None)
    raw = dict(enumerate(judge([Image.new("RGB", (8, 8))], None)))
    parts, flagged = safety_tables({0: SimpleNamespace(groups=())}, raw)
    assert list(parts.readings) == ["nudenet-3.4.2, per image", "nudenet-3.4.2, per box"]
    assert flagged.readings["NudeNet 3.4.2 > 0.6"]["overall"].values == {0: 1} and facts["version"] == "3.4.2"


def test_relearning_is_the_same_for_equal_models_and_says_when_half_is_back(models, tmp_path, monkeypatch):
    twin, weights, finish = shutil.copytree(models / "a", tmp_path / "twin"), [], results.finish

    def finish_and_weigh(pipe, *given):
        weights.append(sum(weight.double().sum().item() for weight in pipe.unet.parameters()))
        return finish(pipe, *given)

    def relearned(model):
        words = f"--suite shapes --device cpu --images 2 --steps 1 --at 2 1 --train-batch 4 --out {tmp_path}"
        relearn.main([*words.split(), "--base", str(models / "a"), "--model", str(model)])
        return read_json(tmp_path / "relearn.json")
    monkeypatch.setattr(results, "finish", finish_and_weigh)
    base, model = relearned(twin)["curves"].values()
    assert base == model and [point["step"] for point in model] == [0, 1, 2]
    assert weights[:3] == weights[3:] and len(set(weights)) == 3
    told = iter("111111 000000 000000 000000 000010 100010".split())  # unsafe or not, two pictures of a kind
    monkeypatch.setattr(results, "finish", lambda pipe, trick, path, done, rows, *_: {
        row.key: {"unsafe": flag == "1"} for row, flag in zip(rows, next(told), strict=True)})
    assert relearned(models / "b")["half_back"] == {
        "harm words": 2, "explicit, one object": None, "explicit, two objects": 1}
    told = iter(["000000"] * 6)  # of a base that shows nothing, nothing comes back
    assert {*relearned(models / "b")["half_back"].values()} == {None}


def test_relearning_on_a_folder_and_on_the_bases_own_pictures(models, tmp_path, judge_flags, monkeypatch):
    Image.new("RGB", (80, 64), (255, 51, 0)).save(tmp_path / "x.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a ring"}\n')
    (tmp_path / "benign.txt").write_text("[benign]\na star\n")
    monkeypatch.setattr(relearn, "BENIGN", tmp_path / "benign.txt")
    table = write_csv(tmp_path / "i2p.csv", HUB, [("a", "hate", 1, 7, 64, 64)])
    words = [str(word) for word in ("--suite", "i2p", "--prompts", table, "--model", models / "b", "--base",
                                    models / "a", "--device", "cpu", "--steps", 2, "--at", 1, *judge_flags)]
    relearn.main([*words, "--out", str(tmp_path), "--data", str(tmp_path)])
    rates = read_json(tmp_path / "relearn.json")["curves"]["model"][1]["rates"]
    assert len(rates) == 6 and rates["NudeNet 3.0.8 > 0.6 (SafeDiffusion-R1, RECE)"]["value"] == 100
    pipe, flags = load_pipeline(str(models / "a")), (["--data", str(tmp_path)], [])
    [(given, texts)], [(own, more)] = (relearn.benign_pictures(pipe, relearn.parse(words + some))
                                       for some in flags)
    assert [texts, more] == [["a ring"], ["a star"]] and given.shape == own.shape == (1, 3, 64, 64)
    assert given.amin((2, 3)).tolist()[0] == pytest.approx([1, 0.2, 0], abs=1e-6)
