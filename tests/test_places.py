"""Names of models and folders, what stands at a place already, and where output goes."""

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from started import quick_script, start, tiny

import evaluate
import sample
from evaluation import judges, results
from plumbing import checkpoint, log, models, names, output, pictures, stop
from reward import Prompt

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"


# -------------------------------------------------------------------------------- names

@pytest.mark.parametrize("name", [
    "2026-11-25T10:30:00", "a:b", "run 1", "läufe", "运行", "run'1", "$HOME", "a;b", "(x)", "-x", ":x", "x:",
    "a:b:c", "#1"])
def test_a_folder_is_the_folder_whatever_its_name(name, tmp_path):
    place = shutil.copytree(WEIGHTS, tmp_path / name / "final")
    assert names.local_folder("--model", str(place)) == place
    models.load_pipeline(str(place))
    assert names.local_folder("--model", f"{tmp_path / name}:final") == place
    said = shlex.join(["python", "sample.py", "--model", str(place)])
    assert shlex.split(said)[-1] == str(place) and "\n" not in said


@pytest.mark.parametrize("name, parts", [
    ("a/b", ("a/b", "")), ("a/b:c", ("a/b", "c")), ("a/b:c/d", ("a/b", "c/d")), ("a:b:c", ("a:b", "c")),
    ("", ("", "")),
    ("ItsMaxNorm/SafeDiffusion-R1:scaled", ("ItsMaxNorm/SafeDiffusion-R1", "scaled"))])
def test_a_name_is_split_at_its_last_colon(name, parts):
    assert names.split_name(name) == parts


@pytest.mark.parametrize("name", ["/no/such/2026-11-25T10:30:00/final", "./a:b/c", "../x", "~/x:y", "a/b/c"])
def test_a_place_where_nothing_is_is_no_hub_id(name):
    with pytest.raises(ValueError, match="no such folder"):
        names.local_folder("--model", name)


@pytest.mark.parametrize("labels", [
    ["run_a", "run-a"], ["运行一", "运行二"], ["a/b", "a-b", "a b"], ["Run", "run"], ["..", "."], ["/", "-"],
    ["a" * 300, "b" + "a" * 299],
    ["é", "e"], ["a:b", "a-b"], ["x", "x-2", "X"], ["运行" * 200, "运" * 300], ["a + sld-weak", "a + sld-max"]])
def test_output_folders_are_unique_and_keep_their_letters(labels, tmp_path):
    made = results.folders(labels)
    assert len({name.casefold() for name in made.values()}) == len(labels)
    for label, name in made.items():
        (tmp_path / name).mkdir()
        assert (tmp_path / name).parent == tmp_path and not name.startswith((".", "-"))
    assert {p.name for p in tmp_path.iterdir()} == set(made.values())
    if labels[0] == "运行一":
        assert set(made.values()) == set(labels)


def test_two_models_of_one_slug_are_two(tmp_path):
    args = evaluate.parse(["--model", "run_a", "--base", "run-a", "--also", "run.a", "--suite", "shapes"])
    assert len(evaluate.name_models(args)) == 3
    args = evaluate.parse(["--model", "run_a", "--base", "run_a", "--suite", "shapes"])
    with pytest.raises(ValueError, match="twice"):
        evaluate.name_models(args)


# -------------------------------------------------------------------------------- a run that is replaced

@pytest.fixture
def run(quick):
    """A run of one epoch in this process."""
    return lambda *argv: quick("--epochs", 1, "--updates", 1, "--micro-batch", 4, "--sample-batch", 4, *argv)


def old_run(out: Path) -> dict:
    """A folder that looks like a finished run, with links in it; returns what it holds."""
    for name in ("checkpoint-000007", "elsewhere"):
        (out / name).mkdir(parents=True)
        (out / name / "weights").write_text(name)
    (out / "final").symlink_to(out / "elsewhere")
    (out / "checkpoint-000003").symlink_to(out / "nowhere")
    for name in ("metrics.jsonl", "flags.json", "curves.png", "table.md", "pictures-000007.png", "mine.txt"):
        (out / name).write_text(name)
    return tree(out)


def tree(out: Path) -> dict:
    return {str(path.relative_to(out)): os.readlink(path) if path.is_symlink() else path.read_text()
            for path in out.rglob("*") if (path.is_symlink() or path.is_file()) and path.name != ".lock"}


@pytest.mark.parametrize("reason", [
    ValueError("bad"), RuntimeError("bad"), OSError("full"), torch.OutOfMemoryError("full"),
    KeyboardInterrupt(), SystemExit(3),
    stop.NotFinite("the latent"), stop.Asked(), MemoryError()], ids=lambda reason: type(reason).__name__)
def test_what_fails_before_the_first_checkpoint_puts_the_old_run_back(reason, run, tmp_path, monkeypatch,
                                                                      capsys):
    before = old_run(tmp_path / "run")

    def fail(*_):
        stop.RECEIVED.append(signal.SIGTERM)
        raise reason
    monkeypatch.setattr(stop, "check_rollout", fail)
    with pytest.raises(BaseException) as error:
        run("--out", tmp_path / "run", "--overwrite")
    assert tree(tmp_path / "run") == before and "is put back" in capsys.readouterr().out
    assert error.type is {stop.NotFinite: ValueError, stop.Asked: SystemExit}.get(type(reason), type(reason))


@pytest.mark.parametrize("flags", [["--steps", 1001], ["--clip", "/none"], ["--model", "/none"],
                                   ["--prompts", "/none"],
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
    assert names == {"checkpoint-000001", "final", "metrics.jsonl", "flags.json", "table.md", "mine.txt",
                     "elsewhere", ".lock"}
    assert not (tmp_path / "run" / "final").is_symlink()
    assert (tmp_path / "run" / "elsewhere" / "weights").exists()


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
    before = signal.signal(number, signal.SIG_DFL)  # whatever this process was started with

    def sent(*words):
        os.kill(os.getpid(), number)
        check(*words)
    monkeypatch.setattr(stop, "check_rollout", sent)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--out", "a b"])
    with pytest.raises(SystemExit) as error:
        run("--out", tmp_path / "run", "--epochs", 2)
    assert error.value.code == 128 + number and (tmp_path / "run" / "checkpoint-000000").is_dir()
    assert "python train.py --out 'a b' --resume" in capfd.readouterr().out
    assert signal.signal(number, before) == signal.SIG_DFL


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop.signals_noted():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, before)


class Broken:
    """A stream whose reader is gone, or whose letters are few."""
    encoding, closed = "utf-8", False

    def __init__(self, error):
        self.error, self.file = error, tempfile.TemporaryFile()

    def write(self, text):
        raise self.error

    flush = property(lambda self: lambda: self.write(""))
    fileno = property(lambda self: self.file.fileno)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "EIO"), OSError(9, "EBADF"),
                                   OSError(28, "ENOSPC")], ids=repr)
def test_a_broken_output_is_no_error(error):
    stream = output.Steady(Broken(error))
    print("a line", file=stream, flush=True)
    assert stream.write("two") == 3 and stream.encoding == "utf-8"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r"])
def test_an_output_of_few_letters_shows_codes(encoding):
    raw = io.BytesIO()
    stream = output.Steady(io.TextIOWrapper(raw, encoding=encoding))
    print("насилие 暴力", file=stream, flush=True)
    assert b"\\u66b4" in raw.getvalue()


def on_an_ascii_pipe(pipe, argv):
    handle = os.open(pipe, os.O_WRONLY)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", encoding="ascii", buffering=1)
    quick_script(argv)


def test_a_pipe_that_is_closed_and_letters_it_lacks_do_not_end_a_run(models, tmp_path):
    """As `train.py ... 2>&1 | head -1`, on an ASCII output, with a Cyrillic category."""
    (tmp_path / "prompts.txt").write_text("[насилие]\na red star\n[benign]\na blue star\n", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    argv = tiny(models, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run")
    process = start(tmp_path / "log", on_an_ascii_pipe, str(tmp_path / "pipe"), argv)
    with open(tmp_path / "pipe", encoding="ascii") as head:
        assert head.readline().startswith("version ")
    process.join()
    assert process.exitcode == 0 and not (tmp_path / "log").read_text()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "final" / "model_index.json").exists()


def test_a_rollouts_line_fits_and_a_log_file_has_no_bars(run, tmp_path, capsys):
    run("--out", tmp_path / "run", "--epochs", 2)
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err and not printed.err.strip()
    lines = [line for line in printed.out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert all(len(line) <= 120 and "reward" in line and "alignment" in line for line in lines)
    worst = dict(epoch=9999, reward_mean=-0.123, reward_unsafe=-0.123, reward_benign=-0.123, alignment=0.123,
                 image_safety_unsafe=-0.123, kl_ref=5e-4, seconds_sample=900.0, seconds_reward=99.0,
                 seconds_update=0.0)
    line = log.line_of(worst, 99 * 60)
    assert len(line) <= 120 and line.endswith("999 s, 99 min left")


# -------------------------------------------------------------------------------- sample.py, folders, systems

@pytest.mark.parametrize("flags, said", [
    (["--guidance", "nan"], "--guidance nan"), (["--guidance", "-1"], "--guidance"),
    (["--guidance", "inf"], "--guidance"),
    (["--batch", "0"], "--batch 0"), (["--batch", "-2"], "--batch"), (["--device", "cuda:99"], "not usable"),
    (["--device", "banana"], "--device banana"), (["--out", "{}/grid"], "such as grid.png"),
    (["--out", "{}"], "ending"),
    (["--out", "{}/x.txt"], "ending"), (["--out", "{}/file/x.png"], "file"), (["--steps", "0"], "--steps"),
    (["--steps", "1001"], "--steps"),
    (["--eta", "2"], "--eta"), (["--eta", "nan"], "--eta"), (["--compare", "/none"], "no such folder"),
    (["--model", "/none"], "no such")])
def test_sample_refuses_before_it_loads(flags, said, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(models, "load_network", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises((ValueError, OSError)) as error:
        sample.main(["--model", str(WEIGHTS), "--prompt", "a", "--device", "cpu", "--out",
                     str(tmp_path / "a.png"),
                     *(flag.format(tmp_path) for flag in flags)])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_sample_makes_the_folder_of_its_picture(tmp_path, capsys):
    sample.main(["--model", str(WEIGHTS), "--prompt", "a " * 80, "一只猫 и кот", "--device", "cpu", "--steps",
                 "2", "--out",
                 str(tmp_path / "a" / "b" / "grid.PNG")])
    with Image.open(tmp_path / "a" / "b" / "grid.PNG") as grid:
        assert grid.width < 700


def script(reason):
    stop.run_script("x.py", Mock(side_effect=reason))


@pytest.mark.parametrize("reason, said, code", [
    (KeyboardInterrupt(), "x.py: stopped", 130), (ValueError("bad"), "x.py: bad", 1)])
def test_a_script_ends_in_one_line(reason, said, code, tmp_path):
    process = start(tmp_path / "log", script, reason)
    process.join()
    assert process.exitcode == code and (tmp_path / "log").read_text() == said + "\n"


def test_a_version_is_the_commit_and_says_where_files_differ(tmp_path, monkeypatch):
    own = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    git = lambda *words: subprocess.run([*own, *words], check=True, capture_output=True,
                                        text=True).stdout.strip()
    monkeypatch.setattr(output, "ROOT", tmp_path / "copy")  # a download inside another repository
    (tmp_path / "copy").mkdir()
    git("init", "-q")
    assert output.commit() == "unknown" and output.heading() == "version  commit unknown"
    monkeypatch.setattr(output, "ROOT", tmp_path)
    (tmp_path / "file").write_text("a")
    git("add", "file"), git("commit", "-qm", "first"), git("tag", "v1")
    assert output.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    short = git("rev-parse", "HEAD")[:10]
    assert output.heading("runs/x") == f"version  commit {short}+changes, writes to runs/x"


@pytest.mark.parametrize("models, names", [
    (["shapes/weights", "runs/sd14/checkpoint-000020", "/x/runs/sd14/checkpoint-000040:average"],
     ["shapes/weights", "checkpoint-000020", "checkpoint-000040:average"]),
    (["a/checkpoint-1", "b/checkpoint-1"], ["a/checkpoint-1", "b/checkpoint-1"]), (["."], ["."]),
    (["x/sd14/final", "CompVis/stable-diffusion-v1-4"], ["sd14/final", "CompVis/stable-diffusion-v1-4"])])
def test_models_have_short_names(models, names):
    assert pictures.short_names(models) == names


def test_a_grid_has_captions_that_wrap_and_frames(tmp_path):
    """Two prompts of two rows: a frame lies around its picture, and all words of a long caption fit."""
    pictures.save_grid(torch.full((8, 3, 96, 96), 0.5), tmp_path / "a.png", 2, ["base", "after"] * 2,
                       captions=["short", "word " * 40], framed=torch.arange(8) == 3)
    with Image.open(tmp_path / "a.png") as grid:
        lines = pictures.wrapped("word " * 40, grid.width - 8)
        assert " ".join(lines).split() == ["word"] * 40 and len(lines) > 2
        assert max(map(pictures.FONT.getlength, lines)) < grid.width
        tops = [4 + 31, 4 + 31 + 100, 4 + 31 + 200 + 17 * len(lines) + 14]
        assert grid.height == tops[-1] + 200
        pixels = np.array(grid)
        where = np.argwhere((pixels == (255, 0, 0)).all(-1))
        left = where[:, 1].min()
        assert where[:, 0].min() == tops[1] - 2 and where[:, 0].max() == tops[1] + 97
        assert len(where) == 4 * 2 * 98
        assert all((pixels[top:top + 96, left + 2:left + 98] == 128).all() for top in tops)


@pytest.mark.parametrize("seen, framed", [
    ({"exact_unsafe": 1.0}, True), ({"exact_unsafe": 0.5, "exact_correct": 1.0}, False),
    ({"unsafe": None}, False), ({}, False)])
def test_a_picture_that_the_judge_calls_unsafe(seen, framed):
    judge = lambda images, prompts, unsafe: seen
    assert pictures.looks_unsafe(judge, torch.zeros(3, 8, 8), Prompt("a")) is framed
    assert not pictures.looks_unsafe(None, torch.zeros(3, 8, 8), Prompt("a"))


@pytest.mark.parametrize("text", ["naïve café", "кот", "一只猫", "a\nb\tc", "𝔘", "", "x" * 500, "ﬁ"])
def test_labels_are_in_letters_that_the_font_has(text):
    shown = pictures.legible(text)
    missing = bytes(pictures.FONT.getmask("\U0010ffff"))
    assert all(c == " " or bytes(pictures.FONT.getmask(c)) != missing for c in shown)
    assert bool(shown) == bool(text)
    lines = pictures.wrapped(text, 100)
    assert max(map(pictures.FONT.getlength, lines)) <= 100
    assert "".join(lines).replace(" ", "") == shown.replace(" ", "")


def test_fid_folders_are_read_as_clean_fid_reads_them(tmp_path):
    for name in ("a.png", "b/c.JPG", "b/d/e.tiff", "f.ppm", "notes.txt", "g.webp", "h.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        file = tmp_path / name
        file.write_text("x") if name.endswith("txt") else Image.new("RGB", (8, 8)).save(file)
    assert len(judges.list_pictures(tmp_path, "--fid")) == 6
    (tmp_path / "b" / "x.npy").touch()
    with pytest.raises(OSError, match="npy"):
        judges.list_pictures(tmp_path, "--fid")


def test_without_a_home_the_cache_is_temporary(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", home)
    assert evaluate.parse(["--model", "m", "--suite",
                           "i2p"]).cache == Path(tempfile.gettempdir()) / "safediffusion"


def test_systems_without_resource_and_with_bytes(monkeypatch):
    kib = log.peak_memory(torch.device("cpu"))
    monkeypatch.setattr(log.sys, "platform", "darwin")
    assert log.peak_memory(torch.device("cpu")) == pytest.approx(kib / 1024, rel=0.2)
    monkeypatch.setattr(log, "resource", None)
    assert log.peak_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("number, fine", [(errno.EINVAL, True), (errno.EACCES, True), (errno.EIO, False),
                                          (errno.ENOSPC, False)])
def test_file_systems_that_cannot_fsync_a_folder(number, fine, tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if fine else pytest.raises(OSError):
        checkpoint.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        checkpoint.sync(tmp_path / "file")


def test_an_older_python_is_told_which_ones_do(monkeypatch):
    import plumbing
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match="3.11, 3.12 or 3.13"):
        exec(compile(Path(plumbing.__file__).read_text(), "plumbing", "exec"), {})
