"""Names of models and folders, what stands at a place already, and where output goes."""

import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from evaluation import results
from plumbing import checkpoint, models, pictures, stop

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


# -------------------------------------------------------------------------------- a run that is replaced

TINY = ["--model", WEIGHTS, "--clip", WEIGHTS / "text_encoder", "--anchors", WEIGHTS.parent / "anchors.txt",
        "--prompts", WEIGHTS.parent / "prompts.txt", "--benign=", "--epochs", 1, "--prompts-per-rollout", 2, "--group", 2,
        "--steps", 4, "--updates", 1, "--micro-batch", 4, "--sample-batch", 4, "--save-every", 1, "--device", "cpu"]


@pytest.fixture
def run(monkeypatch):
    """train.main in this process, without the pictures and the table at the end."""
    monkeypatch.setattr(pictures, "draw_grid", lambda *_: None)
    monkeypatch.setattr(pictures, "score_table", lambda *_: ["no table"])
    return lambda *argv: train.main([*map(str, TINY), *map(str, argv)])


def old_run(out: Path) -> dict:
    """A folder that looks like a finished run, with links in it; returns what it holds."""
    for name in ("checkpoint-000007", "elsewhere"):
        (out / name).mkdir(parents=True)
        (out / name / "weights").write_text(name)
    (out / "final").symlink_to(out / "elsewhere")
    (out / "checkpoint-000003").symlink_to(out / "nowhere")
    for name in ("metrics.jsonl", "flags.json", "table.md", "pictures-000007.png", "mine.txt"):
        (out / name).write_text(name)
    return tree(out)


def tree(out: Path) -> dict:
    return {str(path.relative_to(out)): os.readlink(path) if path.is_symlink() else path.read_text()
            for path in out.rglob("*") if (path.is_symlink() or path.is_file()) and path.name != ".lock"}


@pytest.mark.parametrize("reason", [
    ValueError("bad"), RuntimeError("bad"), OSError("full"), torch.OutOfMemoryError("full"), KeyboardInterrupt(), SystemExit(3),
    stop.NotFinite("the latent"), stop.Asked(), MemoryError()], ids=lambda reason: type(reason).__name__)
def test_what_fails_before_the_first_checkpoint_puts_the_old_run_back(reason, run, tmp_path, monkeypatch, capsys):
    before = old_run(tmp_path / "run")

    def fail(*_):
        stop.RECEIVED.append(signal.SIGTERM)
        raise reason
    monkeypatch.setattr(stop, "check_rollout", fail)
    with pytest.raises(BaseException) as error:
        run("--out", tmp_path / "run", "--overwrite")
    assert tree(tmp_path / "run") == before and "is put back" in capsys.readouterr().out
    assert error.type is {stop.NotFinite: ValueError, stop.Asked: SystemExit}.get(type(reason), type(reason))


@pytest.mark.parametrize("flags", [["--steps", 1001], ["--clip", "/none"], ["--model", "/none"], ["--prompts", "/none"],
                                   ["--anchors", "/none"], ["--lora-rank", -1], ["--device", "banana"]])
def test_a_bad_flag_leaves_the_old_run_alone(flags, run, tmp_path):
    before = old_run(tmp_path / "run")
    with pytest.raises((ValueError, OSError)):
        run("--out", tmp_path / "run", "--overwrite", *flags)
    assert tree(tmp_path / "run") == before


def test_a_new_run_with_a_checkpoint_replaces_the_old_one(run, tmp_path):
    old_run(tmp_path / "run")
    run("--out", tmp_path / "run", "--overwrite")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint-000001", "final", "metrics.jsonl", "flags.json", "table.md", "mine.txt", "elsewhere", ".lock"}
    assert not (tmp_path / "run" / "final").is_symlink() and (tmp_path / "run" / "elsewhere" / "weights").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moves", range(20))
def test_killed_between_any_two_moves_the_old_run_is_put_back(moves, tmp_path, monkeypatch):
    """On its way aside, beside a new run's first files, and on its way back."""
    before, left, replace = old_run(tmp_path), [moves], os.replace

    def counted(source, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        replace(source, target)
    monkeypatch.setattr(os, "replace", counted)
    try:
        checkpoint.set_aside(tmp_path)
        (tmp_path / "metrics.jsonl").write_text("new")
        checkpoint.put_back(tmp_path)
    except Killed:
        monkeypatch.setattr(os, "replace", replace)
        if any((tmp_path / name).exists() for name in (checkpoint.ASIDE, checkpoint.MOVING)):
            checkpoint.put_back(tmp_path)
    assert tree(tmp_path) == before


def test_resume_with_fewer_epochs_than_are_done_has_nothing_to_do(run, tmp_path):
    run("--out", tmp_path / "run", "--epochs", 2)
    with pytest.raises(ValueError, match="has 2 already, so there is nothing to do"):
        run("--out", tmp_path / "run", "--epochs", 1, "--resume")


def test_another_number_of_threads_is_said(run, tmp_path, capsys):
    run("--out", tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-000001" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"threads": 99}))
    run("--out", tmp_path / "run", "--epochs", 1, "--resume")
    assert "the threads were 99, are" in capsys.readouterr().out


# -------------------------------------------------------------------------------- signals and output

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_schedulers_signal_asks_for_a_checkpoint(name, tmp_path, run, monkeypatch, capfd):
    number, check = getattr(signal, name), stop.check_rollout

    def sent(*words):
        os.kill(os.getpid(), number)
        check(*words)
    monkeypatch.setattr(stop, "check_rollout", sent)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--out", "a b"])
    with pytest.raises(SystemExit) as error:
        run("--out", tmp_path / "run", "--epochs", 2)
    assert error.value.code == 128 + number and (tmp_path / "run" / "checkpoint-000000").is_dir()
    assert "python train.py --out 'a b' --resume" in capfd.readouterr().out
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
