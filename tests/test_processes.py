"""Runs in processes of their own: killed and continued to the bit, one in a folder, several by torchrun."""

import math
import os
import random
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from started import (KINDS, SHORT, UNET, assert_same_run, contents, figures, quick_main, quick_script, start,
                     tiny, wait_for)
from tiny import ADVANTAGES, UNSAFE, args_for, parts_for, rollout_for, tiny_unet

import evaluate
import sample
import train
from plumbing import parallel, run

RATE = 1e-4
# 8 pictures, 24 transitions, 2 updates; float32 rounds one picture's batch of 1 or 2 unlike one of 8
SHARED = ["--prompts-per-rollout", 4, "--group", 2, "--steps", 5, "--micro-batch", 8, "--sample-batch", 8,
          "--keep", 9, "--decay-epochs", 0, "--learning-rate", RATE]
has_logged = lambda out: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0


def slow_to_save(argv, seconds=0.1):
    """A run that takes so long to write a checkpoint's last files."""
    save = torch.save
    torch.save = lambda *given: (save(*given), time.sleep(seconds))
    quick_script(argv)


@pytest.mark.parametrize("kind, moment, most", [*zip(KINDS, ("saving", "epoch", "loading"), (0.1, 0.2, 0.5))])
def test_killed_at_any_instant_and_continued_to_the_bit(kind, moment, most, models, tmp_path, monkeypatch):
    """SIGKILL while a checkpoint is written, in an epoch, or while loading: nothing differs at the end."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    whole, out, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    flags = [*KINDS[kind], *SHORT, "--epochs", 3, "--keep", 99]
    argv = lambda: tiny(models, *flags, "--out", out, *["--resume"][:out.exists()])
    quick_main(tiny(models, *flags, "--out", whole))
    process = start(log, slow_to_save, argv())
    if moment != "loading":
        wait_for(lambda: run.checkpoints(out), process.is_alive)
    if moment == "saving":
        wait_for(lambda: any(out.glob("checkpoint-??????.part")), process.is_alive)
    time.sleep(random.Random(kind).uniform(0, most))
    process.kill(), process.join()
    torn = any(out.glob("*.part"))
    assert process.exitcode == -signal.SIGKILL and (torn or moment != "saving"), log.read_text()
    process = start(log, quick_script, argv())
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert_same_run(out, whole)


def hold(folder):
    with run.locked(folder):
        print("held", flush=True)
        time.sleep(60)


def test_a_second_start_is_refused_until_the_first_has_ended(tmp_path, quick):
    """It changes nothing; a folder is free after a kill, and after a run of this process."""
    out, log, flags = tmp_path / "run", tmp_path / "log", ["--epochs", 1, *SHORT]
    quick("--out", out, *flags)
    before, process = contents(out), start(log, hold, out)
    wait_for(lambda: log.exists() and log.read_text() == "held\n", process.is_alive)
    for words in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(ValueError, match=f"^{out} is in use by another process.*another --out$"):
            quick("--out", out, *flags, *words)
    assert contents(out) == before
    process.kill(), process.join()
    quick("--out", out, *flags, "--overwrite")


def test_a_second_signal_stops_at_once(models, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(log, slow_to_save, tiny(models, *SHORT, "--out", out), 30)
    for fine in (lambda: has_logged(out), lambda: "once more stops at once" in log.read_text()):
        wait_for(fine, process.is_alive)
        os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT, log.read_text()


class Started:
    """W processes that are running, or have ended: target(*args) under torchrun's environment."""

    def __init__(self, W, log, target, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = dict(WORLD_SIZE=W, LOCAL_WORLD_SIZE=W, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                        TORCHELASTIC_RUN_ID="test")
        self.logs = [Path(f"{log}.{rank}") for rank in range(W)]
        self.processes = [start(self.logs[rank], target, *args, environment=torchrun | {
            "RANK": rank, "LOCAL_RANK": rank}) for rank in range(W)]

    def codes(self, seconds=120) -> list:
        """Exit codes; none of the processes may hang."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    def said(self, *ranks) -> str:
        return "\n".join(log.read_text() for i, log in enumerate(self.logs) if i in ranks or not ranks)


def spoilt(argv):
    """A run whose process 1 meets a loss that is not finite, in epoch 1."""
    original, calls = train.loss_on, []

    def poisoned(*given, **more):
        calls.append(1)
        out = original(*given, **more)
        return (out[0] * math.nan, *out[1:]) if len(calls) == 4 and os.environ["RANK"] == "1" else out
    train.loss_on = poisoned
    quick_script(argv)


def run_by(W, models, out, *argv):
    started = Started(W, f"{out}.log", quick_script, tiny(models, *SHARED, "--out", out, *argv))
    assert started.codes() == [0] * W, started.said()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def whole(models, folder):
    """Undisturbed runs: by one process, and by two."""
    return {W: run_by(W, models, folder / f"w{W}") for W in (1, 2)}


def gradient(out):
    """Gradient and statistics of an update on this process's share of three groups, one without spread."""
    parallel.join()
    policy, base = tiny_unet(), tiny_unet(1)
    whole = rollout_for(policy, batch_size=2)
    own = [2 * i + j for i in parallel.share(3) for j in range(2)]
    batch = sample.Rollout(whole.latents[own], whole.log_probs[own], whole.text[own], whole.null_text,
                           [whole.names[i] for i in own])
    advantages = torch.where(torch.arange(6) < 4, ADVANTAGES, 0)[own]
    stats = train.update(parts_for(policy, base), batch, advantages, UNSAFE[own], args_for(), 0)
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.save((found, stats), f"{out}.{parallel.rank()}")


def test_the_gradient_of_several_processes_is_that_of_one(folder):
    """One of three processes has no pair in its share."""
    for W in (1, 3):
        started = Started(W, folder / f"log{W}", gradient, str(folder / f"gradient{W}"))
        assert started.codes() == [0] * W, started.said()
    (g, stats), *others = [torch.load(folder / f"gradient{name}") for name in ("1.0", "3.0", "3.1", "3.2")]
    for other, told in others:
        assert (other - g).norm() < 1e-6 * g.norm() and torch.equal(other, others[0][0])
        assert told == pytest.approx(stats, rel=1e-5, abs=1e-6) and stats["pairs"] == 16


def test_the_number_of_processes_changes_a_run_by_rounding_alone(models, whole):
    """Cosines to 1e-5; what an update reports, differences of nearly equal numbers, to 1e-4 of itself. Adam
    makes of a gradient of rounding alone steps of up to the rate, and hardly any weight has such."""
    for one, other in zip(figures(whole[1]), figures(whole[2]), strict=True):
        assert one.keys() == other.keys() and max(one["ratio_dev_first"], other["ratio_dev_first"]) < 1e-5
        for name in one.keys() - {"ratio_dev_first", "rounding"}:
            cosine = name.startswith(("reward", "alignment", "image_safety", "spread"))
            bound = dict(rel=1e-5, abs=1e-5) if cosine else dict(rel=1e-4)
            assert one[name] is None is other[name] or other[name] == pytest.approx(one[name], **bound), name
    a, b, base = (load_file(path / UNET) for path in (whole[1] / "final", whole[2] / "final", models / "a"))
    apart, moved = (torch.cat([(x[name] - a[name]).flatten() for name in a]) for x in (b, base))
    assert apart.abs().max() <= RATE * 4 and apart.norm() < 1e-3 * moved.norm()
    assert (apart.abs() > 0.01 * RATE).float().mean() < 1e-3


def test_one_is_killed_and_all_continue_to_the_bit(models, whole, folder):
    """SIGKILL of process 1 takes the other with it; the continued run is the undisturbed one of as many."""
    out = folder / "killed"
    argv = tiny(models, *SHARED, "--out", out, "--epochs", 99)
    started = Started(2, folder / "killed.log", quick_script, argv)
    wait_for((out / "checkpoint-000001").exists, started.processes[1].is_alive)
    started.processes[1].kill()
    assert started.codes() == [1, -signal.SIGKILL], started.said()
    for checkpoint in run.checkpoints(out)[1:]:
        checkpoint.rename(folder / checkpoint.name)
    run_by(2, models, out, "--resume")
    assert_same_run(out, whole[2])


def test_a_signal_to_one_ends_all_and_any_number_continues(models, whole, folder):
    """Both end at the same step, with one checkpoint, which does not depend on how many wrote it."""
    out = folder / "asked"
    argv = tiny(models, *SHARED, "--out", out, "--save-every", 100, "--epochs", 99)
    started = Started(2, folder / "asked.log", quick_script, argv)
    wait_for(lambda: has_logged(out), started.processes[1].is_alive)
    os.kill(started.processes[1].pid, signal.SIGTERM)
    assert started.codes() == [143, 143], started.said()
    [saved], epochs = run.checkpoints(out), len(figures(out))
    assert run.read_state(saved)["epoch"] == epochs
    stopped, command = started.said(0).strip().splitlines()[-2:]
    assert stopped == f"stopped, in {saved}; to continue:"
    assert shlex.split(command) == ["torchrun", "--nproc_per_node=2", "train.py", *argv, "--resume"]
    again = Started(1, folder / "again", quick_script, [*argv, "--resume", "--epochs", str(epochs + 1)])
    assert again.codes() == [0] and "note: processes: was 2, is 1; equal up to rounding" in again.said()
    assert len(figures(out)) == epochs + 1
    assert figures(out)[1]["reward_mean"] == pytest.approx(figures(whole[1])[1]["reward_mean"], abs=1e-5)


def test_a_number_that_is_not_finite_in_one_ends_all_with_a_checkpoint(models, folder):
    """At the same step, with the same message; the state before it is in there."""
    argv = tiny(models, *SHARED, "--out", out := folder / "nan", "--save-every", 100)
    started = Started(2, f"{out}.log", spoilt, argv)
    assert started.codes() == [1, 1], started.said()
    [saved] = run.checkpoints(out)
    for words in ("train.py: the loss is not finite: epoch 1, prompt ", f"good state is {saved}", "--resume"):
        assert words in started.said(0) and words in started.said(1)
    assert "Traceback" not in started.said() and run.read_state(saved)["epoch"] == 1
    assert all(t.isfinite().all() for t in load_file(saved / UNET).values())


def test_an_evaluation_by_two_reports_what_one_does(models, folder):
    argv = ["--suite", "shapes", "--images", "1", "--steps", "1", "--batch", "4", "--model", f"{models}/a"]
    for W in (1, 2):
        started = Started(W, folder / "judged.log", evaluate.main, [*argv, "--out", f"{folder}/judged{W}"])
        assert started.codes() == [0] * W, started.said()
    ours, theirs = ((folder / f"judged{W}" / "report.json").read_bytes() for W in (1, 2))
    assert ours == theirs
