"""Two processes and one folder: one works, the other says who does.

    PAIRS=20 python -m pytest tests/test_lock.py    # as many pairs of runs, 2 otherwise
"""

import errno
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plumbing import lock, pictures, stop

ROOT = Path(__file__).parent.parent
TINY = ["--model", "shapes/weights", "--clip", "shapes/weights/text_encoder", "--anchors", "shapes/anchors.txt",
        "--prompts", "shapes/prompts.txt", "--benign=", "--epochs", "3", "--prompts-per-rollout", "2",
        "--group", "2", "--steps", "4", "--updates", "1", "--micro-batch", "4", "--sample-batch", "4",
        "--save-every", "1", "--keep", "9"]
TIMES = {"seconds_sample", "seconds_reward", "seconds_update", "images_per_second", "peak_memory_gb"}
HOLD = "from pathlib import Path; from plumbing import lock; import sys, time; lock.hold(Path(sys.argv[1])); "
os.environ["OMP_NUM_THREADS"] = "1"


def holder(folder, then="print('held', flush=True); time.sleep(60)"):
    return subprocess.Popen([sys.executable, "-c", HOLD + then, str(folder)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_second_start_is_told_who_holds_it_until_its_owner_dies(tmp_path):
    first = holder(tmp_path)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ValueError) as error:
        lock.hold(tmp_path)
    said = str(error.value)
    assert f"{tmp_path} is in use by process {first.pid} on " in said and f"since {time.strftime('%Y-')}" in said
    assert "another --out" in said and "\n" not in said
    first.kill()
    first.communicate()
    lock.hold(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    lock.hold(tmp_path)  # again in this process: a run and then its continuation
    second = holder(tmp_path)
    assert f"in use by process {os.getpid()}" in second.communicate()[1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_said_and_used(number, tmp_path, monkeypatch, capsys):
    def take(file):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(lock, "take", take)
    lock.hold(tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no locks" in said and str(tmp_path) in said


@pytest.mark.parametrize("refusal", [BlockingIOError, PermissionError])  # the second as Windows has it
def test_a_lock_that_another_holds_is_refused(refusal, tmp_path, monkeypatch):
    def take(file):
        raise refusal(errno.EACCES, "held")
    monkeypatch.setattr(lock, "take", take)
    with pytest.raises(ValueError, match="in use by another process"):
        lock.hold(tmp_path)


# -------------------------------------------------------------------------------- pairs of runs

def run(argv, log):
    """train.main in a process of its own, without the pictures and the table, which are most of its time."""
    import train
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    pictures.draw_grid, pictures.score_table = lambda *_: None, lambda *_: ["no table"]
    stop.run_script("train.py", lambda: train.main([*TINY, *argv]))


def start(argv, log):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "train"])
    process = context.Process(target=run, args=(list(map(str, argv)), str(log)))
    with pytest.MonkeyPatch.context() as patch:  # the fork server finds modules by this alone
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        process.start()
    return process


def figures(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    alone = start(["--out", out], out.parent / "log")
    alone.join()
    assert alone.exitcode == 0, (out.parent / "log").read_text()
    return out


@pytest.mark.parametrize("second", [[], ["--resume"], ["--overwrite"]], ids=["same", "resume", "overwrite"])
def test_of_two_runs_on_one_folder_one_wins(second, whole, tmp_path):
    draw = random.Random(len(second))
    weights = load_file(whole / "final/unet/diffusion_pytorch_model.safetensors")
    for pair in range(int(os.environ.get("PAIRS", 2)) if not second else 1):
        out, logs = tmp_path / f"{pair}", [tmp_path / f"{pair}-{i}.log" for i in range(2)]
        one = start(["--out", out], logs[0])
        while second and not (out / "flags.json").exists():  # so that there is something to continue or replace
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        two = start([*second, "--out", out], logs[1])
        one.join(), two.join()
        told = [log.read_text() for log in logs]
        assert sorted((one.exitcode, two.exitcode)) == [0, 1], told
        lost = told[one.exitcode == 0].strip().splitlines()
        assert "in use by process" in lost[-1] and not any("Traceback" in text for text in told)
        assert figures(out) == figures(whole)
        final = load_file(out / "final/unet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(final[name], weights[name]) for name in weights)
        assert not list(out.glob("*.part")) and not (out / "replaced").exists()
