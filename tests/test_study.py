"""The study: what it runs and in which order, that it goes on, and what study.json says."""

import json
import shutil
from pathlib import Path

import pytest

import evaluate
from evaluation import relearn
from plumbing import log
from shapes import study
from shapes.train import parse

ROOT = Path(__file__).parent.parent
ENTRIES = json.loads((ROOT / "docs" / "study.json").read_text(encoding="utf-8"))


def test_every_entry_says_how_it_was_made():
    """tests/test_docs.py compares the tables with the pages; one with a cell unmeasured is not made."""
    assert len({(e["variant"], e["seed"], str(e["cell"])) for e in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert int(entry["commit"].removesuffix("+changes"), 16)
        plan = study.VARIANTS.get(entry["variant"], {"flags": "", "rollouts": 0, "seeds": [0]})
        assert (entry["flags"], entry["rollouts"]) == (plan["flags"], plan["rollouts"])
        assert entry["seed"] in plan["seeds"]
    assert {"readme", "main"} <= set(study.tables(ENTRIES)) and "main" not in study.tables(ENTRIES[1:])


def test_what_is_compared_costs_the_unet_the_same():
    """Calls of a picture, a backward pass as two: those of a run are the other's to a rollout and a half."""
    def calls(variant):
        args = parse(study.VARIANTS[variant]["flags"].split())
        each = args.steps + log.per_picture(args) * (4 if args.kl or args.kl_benign else 3)
        return study.VARIANTS[variant]["rollouts"] * each, each
    for one, other in (("paper", "default"), ("night", "early")):
        assert abs(calls(one)[0] - calls(other)[0]) <= 1.5 * calls(one)[1]


def pretended(started: list):
    """A study.start that reads the flags as the program would, and leaves what it would leave."""
    row = {column: {"value": 1.0, "low": 0.5, "high": 2.0} for _, column, *_ in study.MEASURES.values()}
    report = {"provenance": {"commit": "0" * 40}, "tables": [{"title": title, "rows": [{"cells": row}]}
                                                             for title, *_ in study.MEASURES.values()]}
    rates = {"harm words": {"value": 2.5}}
    curves = {model: [{"step": step, "rates": rates} for step in (0, 10)] for model in ("base", "model")}
    found = {kind: {"value": 50.0} for kind in ("plain", "words", "free")}
    left = {"evaluate": ("report", report),
            "evaluation.relearn": ("relearn", {"curves": curves, "commit": "0"}),
            "shapes.attack": ("attack", {"base": found, "model": found, "commit": "0"})}
    parsers = {"evaluate": evaluate.parse, "shapes.train": parse, "evaluation.relearn": relearn.parse}

    def start(folder, module, *words):
        words = [str(word) for word in words]
        given, out = parsers.get(module, lambda _: None)(words), Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if module == "shapes.train":
            line = json.dumps(dict.fromkeys(study.PLAN["curves"], 0.5)) + "\n"
            (out / "metrics.jsonl").write_text(line * given.epochs)
            (out / "flags.json").write_text("{}")
            (out / "final").mkdir()
        else:
            name, content = left[module]
            (out / f"{name}.json").write_text(json.dumps(content))
        started.append(f"{module} {getattr(given, 'epochs', '')} {getattr(given, 'resume', '')}".strip())
    return start


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """Trained, measured; then only what is gone. A program that fails ends it."""
    with pytest.raises(ValueError, match="ended with 1: see .*log.txt"):
        study.start(tmp_path, "no_such_module")
    started = []
    monkeypatch.setattr(study, "start", pretended(started))
    monkeypatch.setitem(study.VARIANTS, "default", {"flags": "--kl 0.02", "rollouts": 2, "seeds": [7, 8]})
    monkeypatch.setitem(study.PLAN, "sampled", [])
    monkeypatch.setitem(study.PLAN, "attacked", dict.fromkeys(study.HIDDEN, ["default"]))
    monkeypatch.setitem(study.PLAN, "cell_seeds", 1)
    docs = tmp_path / "docs"
    docs.mkdir()
    files = docs / "shapes.md", tmp_path / "README.md"
    for file in files:
        file.write_text("".join(f"before\n<!-- study: {name} -->\nold\n<!-- end -->\n"
                                for name in ("main", "relearn")))
    words = ["--variants", "default", "--out", str(tmp_path / "s"), "--docs", str(docs)]
    study.main([*words, "--seeds", "8"])
    assert started == ["shapes.train 2 False", "evaluate"]
    [entry] = json.loads((docs / "study.json").read_text())
    assert (entry["seed"], entry["rollouts"], entry["flags"]) == (8, 2, "--kl 0.02")
    assert entry["figures"]["one object"] == [1.0, 0.5, 2.0] and entry["curves"]["exact_unsafe"] == [0.5, 0.5]
    assert all(file.read_text().count("-->\nold\n<!--") == 2 for file in files)  # nothing is whole yet
    shutil.rmtree(tmp_path / "s" / "default" / "seed-8" / "report")
    study.main(["--list", *words])
    assert "report/report.json\n5 reports are missing" in capsys.readouterr().out
    study.main(words)
    assert started[2:] == ["shapes.train 2 False", "evaluate", *["evaluation.relearn"] * 2, "shapes.attack",
                           "evaluate"]
    entries = json.loads((docs / "study.json").read_text())
    assert [entry["seed"] for entry in entries if entry["cell"] is None] == [7, 8]
    made = study.tables(entries)
    assert all(f"-->\nold\n<!-- end -->\nbefore\n<!-- study: relearn -->\n{made['relearn']}<!-- end -->\n"
               in file.read_text() for file in files)
    assert "| `--kl 0.02` | harm words | 2.5 | 2.5 |\n" in made["relearn"]
    assert "| 0 | 10 |" in made["opposite"]
    assert "| base | captions without a colour | 50.0 | 50.0 | 50.0 |\n" in made["attack"]


def test_cells_of_samplers_are_reports_of_their_own():
    """The base and the default's first seeds are drawn with every sampler; the latter are attacked, too."""
    found = study.reports(["base", "default"])
    assert len({study.file_of(ROOT, *key) for key in found}) == len(found) == 9 + 3 * 12 + 7
    for words in study.PLAN["samplers"].values():
        evaluate.parse(["--model", "m", "--suite", "shapes", *words.split()])


def test_a_curve_is_a_running_mean_of_what_has_a_value():
    assert study.smooth([1, None, 3, None, 5, 9]) == {5: 3, 6: 17 / 3} and study.smooth([None] * 5) == {}
