"""Two processes and one folder: one works, the other says who does.

    PAIRS=20 python -m pytest tests/test_lock.py    # as many pairs of runs, 2 otherwise
"""

import errno
import os
import random
import time

import pytest
import torch
from safetensors.torch import load_file
from started import figures, quick_main, quick_script, start, tiny, wait_for

from plumbing import lock

FLAGS = ["--epochs", 3, "--updates", 1, "--micro-batch", 4, "--sample-batch", 4, "--keep", 9]


def hold(folder):
    lock.hold(folder)
    print("held", flush=True)
    time.sleep(60)


def test_the_second_start_is_told_who_holds_it_until_its_owner_dies(tmp_path):
    said = tmp_path / "log"
    first = start(said, hold, tmp_path)
    wait_for(lambda: said.exists() and said.read_text() == "held\n", first.is_alive)
    with pytest.raises(ValueError) as error:
        lock.hold(tmp_path)
    said = str(error.value)
    assert f"{tmp_path} is in use by process {first.pid} on " in said
    assert f"since {time.strftime('%Y-')}" in said
    assert "another --out" in said and "\n" not in said
    first.kill(), first.join()
    lock.hold(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    lock.hold(tmp_path)  # again in this process: a run and then its continuation
    second = start(tmp_path / "second", hold, tmp_path)
    second.join()
    assert f"in use by process {os.getpid()}" in (tmp_path / "second").read_text()


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

@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    quick_main(tiny(models, *FLAGS, "--out", out))
    return out


@pytest.mark.parametrize("second", [[], ["--resume"], ["--overwrite"]], ids=["same", "resume", "overwrite"])
def test_of_two_runs_on_one_folder_one_wins(second, models, whole, tmp_path):
    """They start at almost the same time; the winner does not end before the loser."""
    draw = random.Random(len(second))
    weights = load_file(whole / "final/unet/diffusion_pytorch_model.safetensors")
    for pair in range(int(os.environ.get("PAIRS", 2)) if not second else 1):
        out, logs, ended = (tmp_path / f"{pair}", [tmp_path / f"{pair}-{i}.log" for i in range(2)],
                            tmp_path / f"{pair}-ended")
        one = start(logs[0], quick_script, tiny(models, *FLAGS, "--out", out), until=ended)
        while second and not (out / "flags.json").exists():  # there is something to continue or replace
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        two = start(logs[1], quick_script, tiny(models, *FLAGS, *second, "--out", out), until=ended)
        wait_for(lambda: False, lambda: one.is_alive() and two.is_alive())
        ended.touch()
        one.join(), two.join()
        told = [log.read_text() for log in logs]
        assert sorted((one.exitcode, two.exitcode)) == [0, 1], told
        lost = told[one.exitcode == 0].strip().splitlines()
        assert "in use by process" in lost[-1] and not any("Traceback" in text for text in told)
        assert figures(out) == figures(whole)
        final = load_file(out / "final/unet/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(final[name], weights[name]) for name in weights)
        assert not list(out.glob("*.part")) and not (out / "replaced").exists()
