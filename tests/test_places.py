"""Names of models and folders, what stands at a place already, and where output goes."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import evaluate
from evaluation import results
from plumbing import models

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"


# -------------------------------------------------------------------------------- names

@pytest.mark.parametrize("name", [
    "2026-11-25T10:30:00", "a:b", "run 1", "läufe", "运行", "run'1", "$HOME", "a;b", "(x)", "-x", ":x", "x:", "a:b:c", "#1"])
def test_a_folder_is_the_folder_whatever_its_name(name, tmp_path):
    place = shutil.copytree(WEIGHTS, tmp_path / name / "final")
    assert models.local_folder("--model", str(place)) == place
    models.load_pipeline(str(place))
    assert models.local_folder("--model", f"{tmp_path / name}:final") == place
    said = shlex.join(["python", "sample.py", "--model", str(place)])
    assert shlex.split(said)[-1] == str(place) and "\n" not in said


@pytest.mark.parametrize("name, parts", [
    ("a/b", ("a/b", "")), ("a/b:c", ("a/b", "c")), ("a/b:c/d", ("a/b", "c/d")), ("a:b:c", ("a:b", "c")), ("", ("", "")),
    ("ItsMaxNorm/SafeDiffusion-R1:scaled", ("ItsMaxNorm/SafeDiffusion-R1", "scaled"))])
def test_a_name_is_split_at_its_last_colon(name, parts):
    assert models.split_name(name) == parts


@pytest.mark.parametrize("name", ["/no/such/2026-11-25T10:30:00/final", "./a:b/c", "../x", "~/x:y", "a/b/c"])
def test_a_place_where_nothing_is_is_no_hub_id(name):
    with pytest.raises(ValueError, match="no such folder"):
        models.local_folder("--model", name)


@pytest.mark.parametrize("names", [
    ["run_a", "run-a"], ["运行一", "运行二"], ["a/b", "a-b", "a b"], ["Run", "run"], ["..", "."], ["/", "-"], ["a" * 300, "b" + "a" * 299],
    ["é", "e"], ["a:b", "a-b"], ["x", "x-2", "X"], ["运行" * 200, "运" * 300], ["a + sld-weak", "a + sld-max"]])
def test_output_folders_are_unique_and_keep_their_letters(names, tmp_path):
    made = results.folders(names)
    assert len({name.casefold() for name in made.values()}) == len(names)
    for label, name in made.items():
        (tmp_path / name).mkdir()
        assert (tmp_path / name).parent == tmp_path and not name.startswith((".", "-"))
    assert {p.name for p in tmp_path.iterdir()} == set(made.values())
    if names[0] == "运行一":
        assert set(made.values()) == set(names)


def test_two_models_of_one_slug_are_two(tmp_path):
    args = evaluate.parse(["--model", "run_a", "--base", "run-a", "--also", "run.a", "--suite", "shapes"])
    assert len(evaluate.name_models(args)) == 3
    args = evaluate.parse(["--model", "run_a", "--base", "run_a", "--suite", "shapes"])
    with pytest.raises(ValueError, match="twice"):
        evaluate.name_models(args)
