"""Tests of plumbing/log.py on figures made by hand: a rollout's line, warnings, trend, time, the plan."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import args_for, figures, parts_for, tiny_unet

from plumbing import log
from plumbing.prompts import Prompt

RISING = [dict(reward_mean=0.01 * i, alignment=0.3 - 0.01 * i) for i in range(40)]


def test_record_is_computed_by_hand():
    """Of two unsafe prompts and a benign one; of a rollout without any, where shares are 0 and means None."""
    stats = dict(positive=4, clipped_positive=1, negative=8, clipped_negative=6, kl_old=0.24, kl_ref=2.4)
    told = dict(ratio_dev_first=1e-4, ratio_dev_max=3e-3, rounding=2e-4, grad_norm=0.7, updates=2)
    stats |= told | dict(pairs=12, kl_ref_first=0.1)
    assert log.record(
        epoch=5, group=2, rate=1e-5, stats=stats, spreads=torch.tensor([1.0, 0.0, 0.4]),
        rewards=torch.tensor([0.1, 0.3, 0.5, 0.5, 0.2, 0.8]), alignment=torch.tensor([0.0, 0.6] * 3),
        safety=torch.tensor([-0.1, -0.3, -0.2, -0.2, 0.5, 0.9]), unsafe=torch.arange(6) < 4,
        advantages=torch.tensor([-1.0, 1, 0, 0, 0, 1])) == pytest.approx(dict(  # the last 0 is at its mean
            epoch=5, reward_mean=0.4, reward_std=(0.1 + 0.3) / 3, reward_unsafe=0.35, reward_benign=0.5,
            alignment=0.3, image_safety=0.1, image_safety_unsafe=-0.2, zero_std_groups=1 / 3, lr=1e-5,
            spread_unsafe=0.5, spread_benign=0.4, **told,
            clip_frac_pos=0.25, clip_frac_neg=0.75, kl_ref_first=0.1, kl_ref=0.2, kl_old=0.02))
    ones = torch.ones(4)
    line = log.record(epoch=0, rewards=ones, alignment=ones, safety=ones, spreads=torch.zeros(2), rate=0.1,
                      advantages=0 * ones, group=2, unsafe=ones > 0, stats=log.tally([], [], []))
    assert line["reward_benign"] is None and line["reward_unsafe"] == 1 and line["zero_std_groups"] == 1
    assert line["clip_frac_pos"] == line["clip_frac_neg"] == line["kl_ref"] == line["kl_old"] == 0


@pytest.mark.parametrize("kind, memory", [("cpu", 0.0), ("cuda", 1.0)])
def test_clock_has_seconds_and_memory_of_the_runs_own_device(kind, memory, monkeypatch):
    ticks, seen, device = iter([0.0, 1.0, 4.0, 4.5]), [], SimpleNamespace(type=kind, index=1)
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(ticks))
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: seen.append(device) or 2**30)
    clock = log.Clock(device)
    for phase in ("sample", "update"):
        with clock(phase):
            pass
    assert clock.figures(6) == dict(seconds_sample=1.0, seconds_update=0.5, images_per_second=4.0,
                                    peak_memory_gb=memory)
    assert seen == [device] * 8 * (kind == "cuda")


@pytest.mark.parametrize("history, said", [
    ([dict(clip_frac_neg=0.9)] * 3, "90% of the transitions were past the clip range"),
    ([dict(clip_frac_pos=0.6)] * 3, "60% of the transitions were past the clip range"),
    ([dict(kl_ref=1.0)] * 3, "raise --kl"), ([dict(zero_std_groups=1.0)] * 3, "no group had any spread"),
    ([dict(ratio_dev_first=2e-4)] * 3, "give --sample-batch and --micro-batch one value"),
    ([dict(clip_frac_pos=0.4, clip_frac_neg=0.4, kl_ref=0.09, ratio_dev_first=5e-5)], None),
    (RISING, "the reward rose by 0.100 while the alignment with the prompts fell by 0.100"),
    ([line | dict(alignment=0.3) for line in RISING], None),                       # it holds
    ([line | dict(alignment=0.3 - 0.0005 * i) for i, line in enumerate(RISING)], None),  # it falls by 0.005
    ([line | dict(reward_mean=-line["reward_mean"]) for line in RISING], None)])   # the reward falls, too
def test_warnings_come_once(history, said, tmp_path, capsys):
    metrics = log.Log(tmp_path / "metrics.jsonl", 1e-4)
    lines = [figures(epoch, **change) for epoch, change in enumerate(history)]
    for line in lines:
        metrics.append(line)
    printed = capsys.readouterr().out.splitlines()
    warned = [line for line in printed if line.startswith("warning")]
    assert len(warned) == (said is not None) and all(said in line for line in warned)
    assert sum(line.startswith("epoch") for line in printed) == len(history)
    assert [json.loads(line) for line in metrics.path.read_text().splitlines()] == lines


def test_a_continued_log_knows_what_it_has_said(tmp_path, capsys):
    """Opened again after each rollout, it warns as one that stayed open; appending reads no line before."""
    path = tmp_path / "metrics.jsonl"
    for epoch, change in enumerate(RISING):
        metrics = log.Log(path, 1e-4)
        metrics.append(figures(epoch, kl_ref=0.5 * (epoch > 3), **change))
    path.write_text("not a line of the log\n")  # reading it would fail
    metrics.append(figures(40))
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warned) == 2 and "the KL to the base is 0.5" in warned[0] and "over 20 rollouts" in warned[1]


@pytest.mark.parametrize("errors, found", [(1.9, 0), (2.1, 1), (50, 1), (-1.9, 0), (-2.1, 1)])
def test_trend_is_the_difference_of_two_means_or_nothing(errors, found):
    """In units of its standard error, of ten values that spread by 0.1 and ten more; nothing of nineteen."""
    zigzag = [0.9, 1.1] * 5
    change = errors * (2 * 0.1**2 / 9) ** 0.5
    history = [dict(x=value) for value in (7.0, *zigzag, *(value + change for value in zigzag))]
    assert log.trend(history, "x") == pytest.approx(change * found) and log.trend(history[2:], "x") == 0


def test_time_left_goes_by_this_process(tmp_path, capsys, monkeypatch):
    """Epochs of 60 s and then of 20 s, whose last 20 are what counts; another process starts from its own."""
    ticks = iter([0.0, 60, *(80 + 20 * i for i in range(21)), 1000, 1010])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(ticks))
    metrics = log.Log(tmp_path / "metrics.jsonl", 1e-4, epochs=25)
    for epoch in range(22):
        metrics.append(figures(epoch))
    log.Log(metrics.path, 1e-4, epochs=25).append(figures(22))
    said = [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said[:2] == ["24 min left", "15 min left"]  # mean of 60 and 20: 40 s
    assert said[-2:] == ["60 s left", "20 s left"]


@pytest.mark.parametrize("n", [1, 2])
def test_plan_says_what_is_trained_on_what(n, capsys):
    args = args_for(model="m", clip="c", alpha=0.5, direction="unit", steer="unsafe", eta=1.0, epochs=10,
                    ema=0.9, lora_rank=0, layers="all", precision="float32")
    prompts = [Prompt("gore", "violence", True), Prompt("ring", "benign", False)][:n]
    log.print_plan(args, parts_for(unet := tiny_unet(), unet, prompts=prompts), "")
    plan = capsys.readouterr().out
    assert "2 prompts x 3 = 6 images" in plan and "on 24 transitions (all but the last 2" in plan
    assert "1 of them unsafe: violence 1" in plan and ("utility is held by --kl" in plan) == (n == 1)
