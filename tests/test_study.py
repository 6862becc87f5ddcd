"""The study: what it runs, in which order, that it goes on, and that its tables follow from study.json."""

import json
import re
import shutil
from pathlib import Path

import pytest

import evaluate
from shapes import study
from shapes.train import parse

ROOT = Path(__file__).parent.parent
ENTRIES = json.loads((ROOT / "docs" / "study.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", ["README.md", "docs/shapes.md"])
def test_tables_follow_from_study_json(file):
    text, made = (ROOT / file).read_text(encoding="utf-8"), study.tables(ENTRIES)
    found = re.findall(r"<!-- study: (\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found
    for name, lines in found:
        assert lines == "\n".join(made[name]), name
        assert len(made[name]) > 2 and "| - |" not in lines, f"{name}: something in it was not measured"


def test_every_entry_says_how_it_was_made():
    assert len({study.key_of(e) for e in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", entry["commit"])
        assert entry["flags"] == study.VARIANTS.get(entry["variant"], ("",))[0]
        assert entry["rollouts"] == study.rollouts(entry["flags"], entry["work"])


def test_work_is_counted_in_calls_of_the_unet():
    """64 pictures of 12 steps and 10 transitions: a forward, two backward, one of the base of each; x 2."""
    assert study.calls(parse([])) == 2 * 64 * (12 + 10 * 4)
    assert study.calls(parse(study.PAPER.split())) == 2 * 64 * (12 + 11 * 3)
    assert [study.rollouts(study.PAPER, work) for work in (16, 60)] == [18, 69]


@pytest.fixture
def programs(monkeypatch):
    """What the study started, in order; a report appears where one is asked for, and the flags are real."""
    def started(folder, args, module, *words):
        words = [str(word) for word in words]
        calls.append((module, *words))
        if module == "evaluate":
            given = evaluate.parse(words)
            given.out.mkdir(parents=True)
            (given.out / "report.json").write_text(json.dumps(report))
        else:
            given = parse(words)
            given_out = Path(given.out)
            given_out.mkdir(parents=True, exist_ok=True)
            assert given.resume == (given_out / "flags.json").is_file()
            (given_out / "flags.json").write_text("{}")
            (given_out / "metrics.jsonl").write_text(json.dumps(dict.fromkeys(study.CURVES, 0.5)) + "\n")

    cell = {"value": 1.0, "low": 0.5, "high": 2.0}
    cells = {title: {} for title, _ in study.MEASURES.values()}
    for title, column in study.MEASURES.values():
        cells[title][column] = cell
    report = {"provenance": {"commit": "0" * 40},
              "tables": [{"title": title, "rows": [{"cells": row}]} for title, row in cells.items()]}
    calls = []
    monkeypatch.setattr(study, "started", started)
    return calls


def test_a_study_goes_on_where_it_was_stopped(programs, tmp_path, monkeypatch, capsys):
    """Two stages of a run: trained, measured, trained on, measured; a second start does only what is gone."""
    monkeypatch.setitem(study.VARIANTS, "default", ("", (1, 2)))
    docs = tmp_path / "docs"
    docs.mkdir()
    for file in (docs / "shapes.md", tmp_path / "README.md"):
        file.write_text("before\n<!-- study: main -->\nold\n<!-- end -->\nafter\n")
    words = ["--variants", "default", "--seeds", "1", "--out", str(tmp_path / "s"), "--docs", str(docs)]
    study.main(words)
    assert [call[0] for call in programs] == ["shapes.train", "evaluate"] * 2
    assert "--resume" not in programs[0] and "--resume" in programs[2]
    entries = json.loads((docs / "study.json").read_text())
    assert [(e["variant"], e["seed"], e["work"], e["figures"]["explicit"]) for e in entries] == [
        ("default", 1, 1, [1.0, 0.5, 2.0]), ("default", 1, 2, [1.0, 0.5, 2.0])]
    study.main(words)
    assert len(programs) == 4
    shutil.rmtree(next((tmp_path / "s").rglob("report-002")))
    study.main(["--list", *words])
    assert re.search(r"default +2 +2.0 +1 of 2", capsys.readouterr().out)
    study.main(words)
    assert len(programs) == 6
    written = re.compile(r"before\n<!-- study: main -->\n\| % .*\n<!-- end -->\nafter\n", re.DOTALL)
    for file in (docs / "shapes.md", tmp_path / "README.md"):
        assert written.fullmatch(file.read_text())


def test_cells_of_samplers_are_reports_of_their_own():
    """The base and the default at 60 are drawn with every sampler and guidance; no other stage is."""
    cells = [cell for _, _, cell, _ in study.reports("default") if cell]
    assert len(cells) == len(study.SAMPLERS) * len(study.GUIDANCES) == len({str(cell) for cell in cells})
    assert [cell for _, _, cell, _ in study.reports("base") if cell] == cells
    for _, _, _, words in study.reports("default"):
        evaluate.parse(["--model", "m", "--suite", "shapes", *words])


def test_a_program_that_fails_ends_the_study(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="ended with 1: see .*log.txt"):
        study.started(tmp_path, study.parse_args([]), "no_such_module")


def test_bad_flags_are_refused(capsys):
    for words in (["--variants", "dafault"], ["--seeds", "7"]):
        with pytest.raises(SystemExit):
            study.main(words)
    with pytest.raises(ValueError, match="--jobs"):
        study.main(["--jobs", "0"])
