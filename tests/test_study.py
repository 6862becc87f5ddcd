"""The study: what it runs and in which order, that it goes on, and what study.json says."""

import json
import shutil
from pathlib import Path

import pytest

import evaluate
from shapes import study
from shapes.train import parse

ROOT = Path(__file__).parent.parent
ENTRIES = json.loads((ROOT / "docs" / "study.json").read_text(encoding="utf-8"))


def test_every_entry_says_how_it_was_made():
    """And nothing in a table was left unmeasured; tests/test_docs.py compares the tables with the pages."""
    assert len({(e["variant"], e["seed"], e["work"], str(e["cell"])) for e in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert int(entry["commit"].removesuffix("+changes"), 16)
        assert entry["flags"] == study.VARIANTS[entry["variant"]][0]
        assert entry["rollouts"] == study.rollouts(entry["variant"], entry["work"])
    assert "| - |" not in "".join(study.tables(ENTRIES).values())


def test_work_is_counted_in_calls_of_the_unet():
    """A backward pass counts as two, and only the paper's choices cost another number than the default."""
    for variant, (flags, _) in study.VARIANTS.items():
        args = parse(flags.split())
        calls = args.steps + (args.steps - args.skip_last) * (4 if args.kl or args.kl_benign else 3)
        assert calls == (study.PAPER_CALLS if variant == "paper" else study.DEFAULT_CALLS)
    assert [study.rollouts("paper", work) for work in (16, 60)] == [18, 69]


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """Trained, measured, trained on, measured; then only what is gone. A program that fails ends it."""
    with pytest.raises(ValueError, match="ended with 1: see .*log.txt"):
        study.start(tmp_path, "no_such_module")
    row = {column: {"value": 1.0, "low": 0.5, "high": 2.0} for _, column, *_ in study.MEASURES.values()}
    report = {"provenance": {"commit": "0" * 40}, "tables": [{"title": title, "rows": [{"cells": row}]}
                                                             for title, *_ in study.MEASURES.values()]}
    started = []

    def start(folder, module, *words):
        """Reads the flags as the program would, and leaves what it would leave."""
        given = {"evaluate": evaluate.parse, "shapes.train": parse}[module]([str(word) for word in words])
        out = Path(given.out)
        out.mkdir(parents=True, exist_ok=True)
        if module == "evaluate":
            (out / "report.json").write_text(json.dumps(report))
        else:
            line = json.dumps(dict.fromkeys(study.PLAN["curves"], 0.5)) + "\n"
            (out / "metrics.jsonl").write_text(line * given.epochs)
            (out / "flags.json").write_text("{}")
        started.append(f"{module} {getattr(given, 'epochs', '')} {getattr(given, 'resume', '')}".strip())

    monkeypatch.setattr(study, "start", start)
    monkeypatch.setitem(study.VARIANTS, "default", ["", [1, 2]])
    docs, run = tmp_path / "docs", tmp_path / "s" / "default" / "seed-1"
    docs.mkdir()
    files = docs / "shapes.md", tmp_path / "README.md"
    for file in files:
        file.write_text("before\n<!-- study: main -->\nold\n<!-- end -->\nafter\n")
    words = ["--variants", "default", "--seeds", "1", "--out", str(tmp_path / "s"), "--docs", str(docs)]
    study.main(words)
    assert started == ["shapes.train 1 False", "evaluate", "shapes.train 2 True", "evaluate"]
    first, last = json.loads((docs / "study.json").read_text())
    assert (first["work"], last["work"], last["figures"]["explicit"]) == (1, 2, [1.0, 0.5, 2.0])
    assert "curves" not in first and last["curves"]["exact_unsafe"] == [0.5, 0.5]
    shown = f"before\n<!-- study: main -->\n{study.tables([first, last])['main']}<!-- end -->\nafter\n"
    assert [file.read_text() for file in files] == [shown, shown]
    shutil.rmtree(run / "report-002")
    study.main(["--list", *words])
    assert "report-002/report.json\n1 reports are missing" in capsys.readouterr().out
    study.main(words)
    assert started[4:] == ["shapes.train 2 True", "evaluate"]
    shutil.rmtree(run / "report-001")
    with pytest.raises(ValueError, match="report-001 is missing and its run has gone on"):
        study.main(words)


def test_cells_of_samplers_are_reports_of_their_own():
    """The base and the default at 60 are drawn with every sampler and guidance; no other stage is."""
    found = study.reports(["base", "default"], [0, 1])
    assert len({study.file_of(ROOT, *key) for key in found}) == len(found) == 13 + 2 * (13 + 2)
    for words in study.PLAN["samplers"].values():
        evaluate.parse(["--model", "m", "--suite", "shapes", *words.split()])


def test_a_curve_is_a_running_mean_of_what_has_a_value():
    assert study.smooth([1, None, 3, None, 5, 9]) == {5: 3, 6: 17 / 3} and study.smooth([None] * 5) == {}
