"""Tests of several processes (plumbing/parallel.py): gloo on a CPU, started as torchrun starts them.

The runs share a module's fixtures; one core needs about 40 s.

    python -m pytest tests/test_parallel.py
"""

import copy
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from started import ROOT, figures, nothing_drawn, start, tiny, wait_for

import evaluate
import sample
import shapes.train
import train
from evaluation import report
from plumbing import checkpoint, parallel, stop

RATE = 1e-4
# 8 pictures, 24 transitions, 2 updates; float32 rounds one picture's batch of 1 or 2 unlike one of 8
FLAGS = ["--epochs", "3", "--prompts-per-rollout", "4", "--group", "2", "--steps", "5", "--updates", "2",
        "--micro-batch", "8", "--sample-batch", "8", "--unsafe-fraction", "0.5", "--save-every", "1",
        "--keep", "4", "--decay-epochs", "0", "--learning-rate", str(RATE)]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


# -------------------------------------------------------------------------------- starting processes

class Started:
    """W processes that are running, or have ended: target(rank, *args) under torchrun's environment."""

    def __init__(self, W, log, target, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = dict(WORLD_SIZE=W, LOCAL_WORLD_SIZE=W, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                        TORCHELASTIC_RUN_ID="test")
        self.logs = [Path(f"{log}.{rank}") for rank in range(W)]
        self.processes = [
            start(self.logs[rank], target, rank, *args,
                  environment={**torchrun, "RANK": rank, "LOCAL_RANK": rank} if W > 1 else {})
            for rank in range(W)]

    def until(self, fine):
        wait_for(fine, lambda: all(process.is_alive() for process in self.processes))
        assert fine(), self.said()

    def codes(self, seconds=120):
        """Exit codes; none of the processes may hang."""
        for process in self.processes:
            process.join(seconds)
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, self.said()
        return [process.exitcode for process in self.processes]

    def said(self, rank=None):
        return "\n".join(log.read_text() for log in (self.logs if rank is None else self.logs[rank:rank + 1]))


def run(rank, argv, fault=None):
    """shapes.train without what is drawn and saved at its end. fault: (rank, call of loss_on, what)."""
    checkpoint.save_final = lambda *_: None
    loss_on, calls = train.loss_on, []

    def faulty(*args):
        loss, log_rho, stats = loss_on(*args)
        calls.append(1)
        if fault and (rank, len(calls)) == fault[:2]:
            if fault[2] == "error":
                raise KeyError("broken")
            loss = loss * math.nan
        return loss, log_rho, stats

    train.loss_on = faulty
    with nothing_drawn():
        stop.run_script("shapes.train", lambda: shapes.train.main(argv))


def finished(W, models, out, *argv):
    started = Started(W, f"{out}.log", run, tiny(models, *FLAGS, "--out", out, *argv))
    assert started.codes() == [0] * W, started.said()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def alone(models, folder):
    return finished(1, models, folder / "w1")


@pytest.fixture(scope="module")
def two(models, folder):
    return finished(2, models, folder / "w2")


def newest(out):
    return checkpoint.checkpoints(out)[-1]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_bits(a, b):
    states = (torch.load(newest(out) / "optimizer.pt", weights_only=True)["state"] for out in (a, b))
    return equal(*states) and equal(*(load_file(newest(out) / WEIGHTS) for out in (a, b)))


def gradient(rank, out):
    """The gradient and statistics of one update of a tiny UNet on 4 transitions of each of 12 pictures in 6
    groups, of which this process has its share; and the first ratio of the same in bf16, at broken
    micro-batches."""
    parallel.join()
    torch.manual_seed(0)
    policy = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4).eval()
    base = copy.deepcopy(policy)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.01 * torch.randn_like(p))
    args = SimpleNamespace(steps=6, skip_last=2, timestep_fraction=1.0, updates=1, micro_batch=4, kl=0.1,
                           kl_benign=0.3, guidance=3.0, clip_range=1e-3, max_grad_norm=1e9, seed=0,
                           lora_rank=0, group=2)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              set_alpha_to_one=False, steps_offset=1)
    schedule = sample.ddim_schedule(scheduler, args.steps, 1.0)
    whole = sample.rollout(policy, schedule, torch.randn(12, 5, 12), torch.randn(1, 5, 12), args.guidance,
                           [sample.image_generator(0, i) for i in range(12)], (4, 8, 8), batch_size=4)
    own = [2 * i + j for i in parallel.share(6) for j in range(2)]
    advantages = torch.linspace(-1.5, 2, 12)
    advantages[-2:] = 0  # a group without spread, on the last process
    batch = sample.Rollout(whole.latents[own], whole.log_probs[own], whole.text[own], whole.null_text,
                           unsafe=torch.tensor(own) % 4 < 2,
                           advantages=advantages[own])
    parts = train.Parts(*[None] * 12)
    parts.device, parts.dtype, parts.schedule, parts.policy, parts.base = (
        torch.device("cpu"), torch.float32, schedule, policy, base)
    parts.pipe = SimpleNamespace(scheduler=scheduler)
    parts.optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    parallel.BUCKET = 10_000  # several buckets
    stats = train.update(parts, batch, args, 0)
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])
    parts.dtype, args.micro_batch = torch.bfloat16, 3
    half = train.update(parts, batch, args, 0)["ratio_dev_first"]
    torch.save((found, stats, half), f"{out}.{rank}")


# -------------------------------------------------------------------------------- the same run

def test_the_gradient_of_several_processes_is_that_of_one(folder):
    found = {}
    for W in (1, 2, 3):
        started = Started(W, folder / f"gradient-log{W}", gradient, str(folder / f"gradient{W}"))
        assert started.codes() == [0] * W, started.said()
        found[W] = [torch.load(folder / f"gradient{W}.{rank}") for rank in range(W)]
    [(g, stats, _)] = found[1]
    for W in (2, 3):
        for other, told, _ in found[W]:
            assert (other - g).norm() < 1e-6 * g.norm()
            assert torch.equal(other, found[W][0][0])  # to the bit the same on every process
            assert told == pytest.approx(stats, rel=1e-5, abs=1e-6)
    # the micro-batch divides what each has: the network is called at the rollout's shape
    assert [told["ratio_dev_first"] for W in found for _, told, _ in found[W]] == [0] * 6
    assert [half for W in found for _, _, half in found[W]] == [0] * 6
    assert stats["pairs"] == 40


@pytest.mark.parametrize("W", [2, 4])
def test_the_number_of_processes_changes_a_run_by_rounding_alone(W, models, alone, two, folder):
    """Cosines, whose scale is 1, to 1e-5, and so their means and spreads; what an update reports, which is
    differences of nearly equal numbers (the KL to the last policy, the clipped share), to 1e-4 of itself.

    Adam makes of a gradient that would be 0 but for rounding (a bias before a norm) steps of up to the rate,
    so a weight may be off by the rate times the steps, and hardly any is."""
    several = two if W == 2 else finished(W, models, folder / f"w{W}")
    cosines = {"reward_mean", "reward_std", "reward_unsafe", "reward_benign", "alignment", "image_safety",
               "image_safety_unsafe", "spread_unsafe", "spread_benign"}
    for one, other in zip(figures(alone), figures(several), strict=True):
        assert one.keys() == other.keys() and max(one["ratio_dev_first"], other["ratio_dev_first"]) < 1e-5
        for name in one.keys() - {"ratio_dev_first"}:
            bound = dict(rel=1e-5, abs=1e-5) if name in cosines else dict(rel=1e-4)
            same = one[name] is None is other[name] or other[name] == pytest.approx(one[name], **bound)
            assert same, (one["epoch"], name)
    a, b, start = (load_file(path / WEIGHTS) for path in (newest(alone), newest(several), models / "a"))
    apart, moved = (torch.cat([(x[name] - a[name]).flatten() for name in a]) for x in (b, start))
    assert apart.abs().max() <= RATE * 6 and apart.norm() < 1e-3 * moved.norm()
    assert (apart.abs() > 0.01 * RATE).float().mean() < 1e-3


def test_killed_and_continued_to_the_bit(models, two, folder):
    """SIGKILL of process 1: process 0 ends with a message; the continued run is the undisturbed one of as
    many processes, to the bit."""
    out = folder / "killed"
    started = Started(2, folder / "killed.log", run, tiny(models, *FLAGS, "--out", out))
    started.until(lambda: (out / "checkpoint-000001").exists())
    started.processes[1].kill()
    assert started.codes() == [1, -signal.SIGKILL], started.said()
    assert "has lost another one" in started.said(0) and "--resume" in started.said(0)
    assert len(checkpoint.checkpoints(out)) < 3
    finished(2, models, out, "--resume")
    assert same_bits(out, two) and figures(out) == figures(two)


def test_one_may_continue_what_two_began_and_back(models, alone, folder):
    """SIGTERM to process 1: both end at the same step, with one checkpoint, which does not depend on how many
    processes wrote it."""
    out = folder / "asked"
    argv = tiny(models, *FLAGS, "--out", out, "--save-every", 100)
    started = Started(2, folder / "asked.log", run, argv)
    started.until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text())
    os.kill(started.processes[1].pid, signal.SIGTERM)
    assert started.codes() == [143, 143], started.said()
    [saved] = checkpoint.checkpoints(out)
    assert checkpoint.read_state(saved)["epoch"] == len(figures(out))
    assert f"stopped, in {saved}; to continue:" in started.said(0)
    for W, before in ((1, 2), (2, 1)):
        again = Started(W, folder / f"again{W}.log", run, [*argv, "--resume", "--epochs", str(3 + W)])
        assert again.codes() == [0] * W, again.said()
        assert f"{before} processes wrote it, and there are {W} now; equal up to rounding" in again.said(0)
    assert figures(out)[2]["reward_mean"] == pytest.approx(figures(alone)[2]["reward_mean"], abs=1e-5)


# -------------------------------------------------------------------------------- failures

@pytest.mark.parametrize("what, words", [
    ("nan", "the loss is not finite: epoch 1, prompt"), ("error", "process 1: KeyError: 'broken'")])
def test_a_failure_on_one_ends_all_with_a_checkpoint(what, words, models, folder):
    """It is told once, by process 0, with the checkpoint and the command; the state before it is in there."""
    out = folder / what
    argv = tiny(models, *FLAGS, "--out", out, "--save-every", 100)
    started = Started(2, folder / f"{what}.log", run, argv, (1, 4, what))
    assert started.codes() == [1, 1], started.said()
    assert words in started.said(0) and words not in started.said(1)
    [saved] = checkpoint.checkpoints(out)
    assert f"The last good state is {saved}" in started.said(0) and "--resume" in started.said(0)
    assert words in checkpoint.read_state(saved)["stopped"] and checkpoint.read_state(saved)["epoch"] == 1
    assert all(t.isfinite().all() for t in load_file(saved / WEIGHTS).values())
    torch.load(saved / "optimizer.pt", weights_only=True)
    assert what != "error" or "Traceback" in started.said(1)


def refused(rank, argv):
    stop.run_script("train.py", lambda: train.main(argv))


def test_what_cannot_be_shared_out_is_refused_once(folder):
    started = Started(3, folder / "refused.log", refused, ["--prompts-per-rollout", "8"])
    assert started.codes() == [1, 1, 1]
    assert started.said().strip() == (
        "train.py: --prompts-per-rollout 8: 3 processes cannot share them evenly; give 6 or 9, "
        "or --nproc_per_node 1 or 2 or 4 or 8")


def apart(rank):
    parallel.join()
    parallel.check_equal([torch.full((3,), 1.0 + 1e-7 * (rank == 2))], 1)   # not the epoch for it
    parallel.check_equal([torch.ones(3)], 10)
    parallel.check_equal([torch.ones(3), torch.full((3,), 1.0 + 2e-7 * (rank == 2))], 10)


def test_weights_that_come_apart_stop_the_run(folder):
    started = Started(3, folder / "apart.log", apart)
    assert started.codes() == [1, 1, 1]
    assert "after epoch 10 the weights of processes [2] are not those of process 0" in started.said(0)
    assert not started.said(1).strip()


# -------------------------------------------------------------------------------- evaluation, torchrun itself

def judge_pictures(rank, argv):
    report.bar_pictures, report.GRID = lambda *_: None, 3
    evaluate.main(argv)


def test_an_evaluation_by_three_reports_what_one_does(models, folder):
    argv = ["--model", str(models / "a"), "--suite", "shapes", "--images", "4", "--steps", "1", "--batch",
            "4"]
    outs = [folder / "evaluated1", folder / "evaluated3"]
    for out, W in zip(outs, (1, 3)):
        started = Started(W, f"{out}.log", judge_pictures, [*argv, "--out", str(out)])
        assert started.codes() == [0] * W, started.said()
    ours, theirs = ((out / "report.json").read_bytes() for out in outs)
    assert ours == theirs
    # stopped, with a part of the results in another process's file
    path = outs[0] / evaluate.slug(str(models / "a")) / "rows.jsonl"
    head, *results = path.read_text().splitlines(keepends=True)
    path.write_text(head + "".join(results[:3]))
    path.with_name("rows-2.jsonl").write_text(head + "".join(results[2:9]) + results[9][:7])
    started = Started(1, folder / "again.log", judge_pictures, [*argv, "--out", str(outs[0])])
    assert started.codes() == [0], started.said()
    assert (outs[0] / "report.json").read_bytes() == ours
    assert [part.name for part in path.parent.glob("*.jsonl")] == ["rows.jsonl"]
    assert sorted(path.read_text().splitlines(keepends=True)[1:]) == sorted(results)


@pytest.mark.skipif("TORCHRUN" not in os.environ, reason="each process imports all anew, 40 s: TORCHRUN=1")
def test_torchrun_itself(models, tmp_path):
    """SIGTERM to torchrun ends all processes with one checkpoint; the command printed continues the run."""
    out = tmp_path / "a run; $(not a command)"
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    argv = [torchrun, "--nproc_per_node=2", "-m", "shapes.train",
            *tiny(models, *FLAGS, "--epochs", 100000, "--save-every", 100000, "--picture-every", 100000,
                  "--out", out)]
    process = subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    [saved] = checkpoint.checkpoints(out)
    stopped, command = said.strip().splitlines()[-2:]
    assert stopped == f"stopped, in {saved}; to continue:", said + errors
    assert shlex.split(command) == [*argv, "--resume"]
    epoch = checkpoint.read_state(saved)["epoch"]
    again = [*shlex.split(command), "--epochs", str(epoch + 1)]
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
    assert len(figures(out)) == epoch + 1
