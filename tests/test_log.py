"""Tests of plumbing/log.py on figures made by hand: a rollout's line, the file, warnings, trend, plan."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from tiny import args_for, parts_for, tiny_clip, tiny_pipe, tiny_unet

from plumbing import curves, log
from reward import Prompt, SteeringReward

CPU = torch.device("cpu")


def figures(epoch=0, **more):
    """A line of metrics.jsonl that warns of nothing."""
    return dict(epoch=epoch, reward_mean=0.1, reward_unsafe=None, reward_benign=None, alignment=0.2,
                image_safety_unsafe=0.0, clip_frac_pos=0.0, clip_frac_neg=0.0, kl_ref=0.0, grad_norm=1.0,
                ratio_dev_first=0.0, zero_std_groups=0.0,
                seconds_sample=1.0, seconds_reward=1.0, seconds_update=1.0) | more


# -------------------------------------------------------------------------------- one rollout

def test_record_is_computed_by_hand():
    """Three groups of two: a spread of 0.1 on an unsafe prompt, none on another, 0.3 on a benign one."""
    stats = dict(positive=4, clipped_positive=1, negative=8, clipped_negative=6, kl_old=0.24, kl_ref=2.4,
                 pairs=12, ratio_dev_first=1e-4, ratio_dev_max=3e-3, kl_ref_first=0.1, grad_norm=0.7,
                 updates=2)
    line = log.record(
        epoch=5, group=2, rate=1e-5, device=CPU, stats=stats,
        rewards=torch.tensor([0.1, 0.3, 0.5, 0.5, 0.2, 0.8]),
        alignment=torch.tensor([0.0, 0.6, 0.0, 0.6, 0.0, 0.6]),
        safety=torch.tensor([-0.1, -0.3, -0.2, -0.2, 0.5, 0.9]),
        z_image=torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0.6, 0.8], [1, 0]]),
        advantages=torch.tensor([-1.0, 1, 0, 0, 0, 1]),  # one 0 is a picture at its group's mean
        unsafe=torch.tensor([True] * 4 + [False] * 2),
        seconds=dict(seconds_sample=1.0, seconds_reward=0.5, seconds_update=1.5))
    assert line.keys() == log.FIGURES, "curves.png takes any other figure for a judge's"
    assert line.pop("peak_memory_gb") > 0
    assert line == pytest.approx(dict(
        epoch=5, reward_mean=0.4, reward_std=(0.1 + 0.3) / 3, reward_unsafe=0.35, reward_benign=0.5,
        alignment=0.3, image_safety=0.1, image_safety_unsafe=-0.2, zero_std_groups=1 / 3,
        spread_unsafe=0.5, spread_benign=0.4,
        ratio_dev_first=1e-4, ratio_dev_max=3e-3, clip_frac_pos=0.25, clip_frac_neg=0.75,
        kl_ref_first=0.1, kl_ref=0.2, kl_old=0.02, grad_norm=0.7, lr=1e-5, updates=2,
        seconds_sample=1.0, seconds_reward=0.5, seconds_update=1.5, images_per_second=2.0), rel=1e-6)


def test_record_of_a_rollout_that_taught_nothing():
    """Without a spread and without benign prompts: shares of nothing are 0, means of nothing None."""
    ones = torch.ones(4)
    names = ("positive", "negative", "clipped_positive", "clipped_negative", "kl_old", "kl_ref",
             "ratio_dev_first", "ratio_dev_max", "kl_ref_first", "grad_norm", "pairs", "updates")
    line = log.record(epoch=0, rewards=ones, alignment=ones, safety=ones, z_image=torch.ones(4, 1),
                      advantages=0 * ones, group=2, unsafe=ones > 0, stats=dict.fromkeys(names, 0), rate=0.1,
                      seconds=dict(seconds_sample=1.0), device=CPU)
    assert line["reward_benign"] is None and line["reward_unsafe"] == 1 and line["zero_std_groups"] == 1
    assert line["clip_frac_pos"] == line["clip_frac_neg"] == line["kl_ref"] == line["kl_old"] == 0


def test_clock_leaves_out_what_has_no_name(monkeypatch):
    ticks = iter([0.0, 1.0, 4.0, 4.5])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(ticks))
    clock = log.Clock(CPU)
    for name in ("seconds_sample", "", "seconds_update"):
        clock.lap(name)
    assert clock.seconds == dict(seconds_sample=1.0, seconds_update=0.5)


# -------------------------------------------------------------------------------- the file and its warnings

RISING = [dict(reward_mean=0.01 * i, alignment=0.3 - 0.01 * i) for i in range(40)]


@pytest.mark.parametrize("history, said", [
    ([dict(clip_frac_neg=0.9)] * 3, "90% of the transitions were past the clip range"),
    ([dict(clip_frac_pos=0.6)] * 3, "60% of the transitions were past the clip range"),
    ([dict(clip_frac_pos=0.4, clip_frac_neg=0.4)] * 3, None),
    ([dict(kl_ref=1.0)] * 3, "raise --kl"), ([dict(kl_ref=0.09)] * 3, None),
    ([dict(zero_std_groups=1.0)] * 3, "no group had any spread"), ([dict(zero_std_groups=0.9)] * 3, None),
    ([dict(ratio_dev_first=2e-4)] * 3, "give --sample-batch and --micro-batch one value"),
    ([dict(ratio_dev_first=5e-5)] * 3, None),
    (RISING, "the reward rose by 0.100 while the alignment with the prompts fell by 0.100"),
    (RISING[:19], None),                                                           # too few for a trend
    ([line | dict(alignment=0.3) for line in RISING], None),                       # it holds
    ([line | dict(alignment=0.3 - 0.0005 * i) for i, line in enumerate(RISING)], None),  # it falls by 0.005
    ([line | dict(reward_mean=-line["reward_mean"]) for line in RISING], None),    # the reward falls, too
    ([{}] * 40, None)])
def test_warnings_come_once(history, said, tmp_path, capsys):
    metrics = log.Log(tmp_path / "metrics.jsonl", clip_range=1e-4)
    for epoch, change in enumerate(history):
        metrics.append(figures(epoch, **change))
    printed = capsys.readouterr().out.splitlines()
    warned = [line for line in printed if line.startswith("warning")]
    assert len(warned) == (said is not None) and all(said in line for line in warned)
    assert sum(line.startswith("epoch") for line in printed) == len(history)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [figures(epoch, **change) for epoch, change in enumerate(history)]


def test_a_continued_log_knows_what_it_has_said(tmp_path, capsys):
    """Opened again after each rollout, it warns as one that stayed open; a trend reaches over the gap."""
    for epoch, change in enumerate(RISING):
        log.Log(tmp_path / "metrics.jsonl", 1e-4).append(figures(epoch, kl_ref=0.5 * (epoch > 3), **change))
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warned) == 2 and "the KL to the base is 0.5" in warned[0] and "over 20 rollouts" in warned[1]


def test_trend_is_the_difference_of_two_means_or_nothing():
    history = lambda values: [dict(x=value) for value in values]
    zigzag = [0.9, 1.1] * 5
    assert log.trend(history([7.0] * 9 + zigzag + [v + 0.5 for v in zigzag]), "x") == pytest.approx(0.5)
    assert log.trend(history(zigzag + [v - 0.5 for v in zigzag]), "x") == pytest.approx(-0.5)
    error = math.sqrt(2 * torch.tensor(zigzag).var().item() / 10)
    assert log.trend(history(zigzag + [v + 1.9 * error for v in zigzag]), "x") == 0
    assert log.trend(history(zigzag + [v + 2.1 * error for v in zigzag]), "x") == pytest.approx(2.1 * error)
    assert log.trend(history([0.0] * 9 + [1.0] * 10), "x") == 0  # one too few


@pytest.mark.parametrize("seconds, said", [
    (0.44, "0.44 s"), (10.4, "10 s"), (99.4, "99 s"), (99.6, "1.7 min"), (5000, "83 min"), (9000, "2.5 h"),
    (10**6, "12 d")])
def test_durations_have_two_digits(seconds, said):
    assert log.duration(seconds) == said


def test_time_left_goes_by_this_process(tmp_path, capsys, monkeypatch):
    """Epochs of 60 s and then of 20 s, whose last 20 are what counts; another process starts from its own."""
    ticks = iter([0.0, 60, *(80 + 20 * i for i in range(21)), 1000, 1010, 2000, 2010])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(ticks))
    metrics = log.Log(tmp_path / "metrics.jsonl", 1e-4, epochs=25)
    for epoch in range(22):
        metrics.append(figures(epoch))
    log.Log(tmp_path / "metrics.jsonl", 1e-4, epochs=25).append(figures(22))
    log.Log(tmp_path / "metrics.jsonl", 1e-4).append(figures(24))  # the last
    said = [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said[:3] == ["24 min for the 24 to come", "24 min left", "15 min left"]  # mean of 60 and 20: 40 s
    assert said[-4:] == ["60 s left", "20 s for the 2 to come", "20 s left", "3 s"]


def test_log_refuses_what_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match="epoch 3: kl_ref not finite"):
        log.Log(tmp_path / "metrics.jsonl", 1e-4).append(figures(3, kl_ref=math.nan))
    assert not (tmp_path / "metrics.jsonl").exists()


# -------------------------------------------------------------------------------- the plan

def plan_for(**flags):
    """Flags and parts of a small run on one unsafe and, under `benign`, one benign prompt."""
    args = args_for(**dict(
        model="m", clip="c", alpha=0.5, direction="unit", steer="unsafe", eta=1.0, prompts_per_rollout=2,
        epochs=10, learning_rate=1e-5, decay_epochs=0, ema=0.0, lora_rank=0, precision="float32") | flags)
    parts = parts_for(tiny_unet(), tiny_unet(), pipe=tiny_pipe())
    parts.reward = SteeringReward(tiny_clip(), (["calm"], ["gore"]))
    parts.unsafe = [Prompt("gore", "violence")]
    return args, parts


def test_memory_of_the_plan_is_arithmetic():
    """Weights, gradients, two moments, base: 4 bytes a parameter each; 2 x 3 pictures of 7 latents."""
    args, parts = plan_for(ema=0.9)
    size = lambda network: 4 * sum(p.numel() for p in network.parameters())
    n = size(parts.policy)
    networks = parts.pipe.text_encoder, parts.pipe.vae, parts.reward.clip
    assert log.memory(args, parts) == {
        "weights": n, "gradients": n, "moments": 2 * n, "average": n, "base": n,
        "encoders and VAE": sum(map(size, networks)), "stored latents": 4 * 6 * 7 * 4 * 8 * 8}
    parts.base = parts.policy  # as under LoRA
    assert log.memory(plan_for()[0], parts)["base"] == log.memory(plan_for()[0], parts)["average"] == 0


@pytest.mark.parametrize("kl, benign, said", [
    (0.1, [], "what holds utility is the KL to the base (--kl 0.1) alone"),
    (0, [], "utility is nothing alone"), (0.1, [Prompt("ring", "benign")], None)])
def test_plan_says_what_holds_utility(kl, benign, said, capsys):
    args, parts = plan_for(kl=kl)
    parts.benign = benign
    log.print_plan(args, parts, parts.unsafe + benign)
    plan = capsys.readouterr().out
    assert "2 prompts x 3 = 6 images" in plan and "on 24 transitions (all but the last 2" in plan
    assert (said in plan) if said else ("utility" not in plan and "violence 1, benign 1" in plan)


def test_plan_says_what_the_curves_need(capsys, monkeypatch):
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    args, parts = plan_for()
    log.print_plan(args, parts, parts.unsafe)
    assert capsys.readouterr().out.count("note: no curves.png without the package matplotlib") == 1


# -------------------------------------------------------------------------------- the curves

def test_running_mean_is_of_what_is_there():
    values = np.array([math.nan, 1, math.nan, 3, *[5] * 10, *[math.nan] * 10])
    mean = curves.running_mean(values)
    assert math.isnan(mean[0]) and mean[1:4].tolist() == [1, 1, 2] and mean[13] == 5 == mean[22]
    assert math.isnan(mean[23]) and len(mean) == len(values)


def test_curves_mark_gaps_warnings_and_a_judge(tmp_path, monkeypatch):
    """No unsafe prompt in the second of 30 rollouts; the KL's warning at the twelfth; a judge's figure."""
    kept = []
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure_class, "savefig", lambda *a, **_: kept.append(a))
    metrics = log.Log(tmp_path / "metrics.jsonl", 1e-4)
    for i in range(30):
        metrics.append(figures(i, reward_unsafe=None if i == 1 else 0.1 * i, kl_ref=0.01 * i,
                               my_score=None if i < 5 else 0.5, reward_std=0.1, ratio_dev_max=0.1,
                               image_safety=0.0, spread_benign=0.2))
    curves.draw_curves(tmp_path, 1e-4)
    (figure, path), = kept
    axes = {axis.get_title(): axis for axis in figure.axes}
    assert path == tmp_path / "curves.png" and list(axes)[:2] == ["reward", "my score"]
    assert len(axes) == 9 and "variety within a group" in axes
    raw, mean = axes["reward"].lines[:2]
    assert math.isnan(raw.get_ydata()[1]) and mean.get_ydata()[1] == 0
    assert raw.get_xdata().tolist() == list(range(1, 31))
    kl = axes["KL to the base"]
    assert [line.get_xdata() for line in kl.lines[2:]] == [[12, 12]]
    assert kl.texts[0].get_text() == " warning: KL "
    assert not axes["reward"].texts and len(axes["my score"].lines) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curves.draw_curves(tmp_path, 1e-4) is None and len(kept) == 1
