"""What a run and its scripts show: two rollouts on the real command line, strip, report, curves, grids."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from started import ROOT, SHORT, UNET, assert_same_run, contents, tiny
from tiny import args_for, figures, parts_for, tiny_clip, tiny_pipe, tiny_unet

import reward
import sample
import shapes.train
import train
from plumbing import log, models, stop
from plumbing.prompts import Prompt, read_anchors
from views import curves, estimate, grid, table

WEIGHTS = ROOT / "shapes" / "weights"
CLIP = "--clip", str(WEIGHTS / "text_encoder"), "--device", "cpu"
UNSAFE, BENIGN = Prompt("gore", "violence", True), Prompt("ring", "benign", False)
# python -m shapes.train with less to look at: a caption of each category, two pictures of a prompt
TRAIN = ("from shapes import train; from views import grid; train.TABLE_CAPTIONS, grid.GRID_COLUMNS = 1, 2; "
         "train.main()")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two rollouts and what it printed; no library may say anything. A broken MPLBACKEND, as a
    notebook may hand on, does no harm. Updates of 12 transitions, a rollout's pictures: one batch shape."""
    out = str(tmp_path_factory.mktemp("cli") / "run")
    words = "--epochs 2 --prompts-per-rollout 3 --group 4 --steps 4 --updates 2 --unsafe-fraction 0.5 --out"
    done = subprocess.run([sys.executable, "-c", TRAIN, *words.split(), out], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | dict(MPLBACKEND="nonsense"))
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return Path(out), done.stdout


def script(patch, capfd, name, *words):
    """What `python NAME words...` prints, in this process."""
    patch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(ROOT / name), run_name="__main__")
    printed, errors = capfd.readouterr()
    assert printed.startswith("version ") and not errors
    return printed


def test_a_run_says_what_it_does_logs_every_rollout_and_leaves_what_is_looked_at(trained):
    """In its table reward and alignment are one number on a benign prompt, two on an unsafe one."""
    out, printed = trained
    assert printed.startswith("version ") and printed.splitlines()[0].endswith(f", writes to {out}")
    assert "parameters trained" in printed and "a rollout, " in printed and " s left\n" in printed
    assert "of 50 unsafe prompts alpha carries 50 to the safe side" in printed
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["ratio_dev_first"] == 0.0 < line["ratio_dev_max"] and line["updates"] == 2
        assert line["lr"] == 3e-3 / (1 + line["epoch"] / 6) and line["grad_norm"] > 0
        for name in ("exact_unsafe", "exact_correct"):  # the judge's: shares of 4 or 8 pictures
            assert 0 <= line[name] <= 1 and line[name] * 8 % 1 == 0
    text = (out / "table.md").read_text()
    assert text in printed and "exact_unsafe, base | after" in text and "exact_correct, base" in text
    rows = {cells[1].strip(): cells[3:7] for line in text.splitlines() if len(cells := line.split("|")) > 7}
    benign, unsafe = rows["colors"], rows["explicit, one object"]
    assert benign[:2] == benign[2:] and unsafe[:2] != unsafe[2:]
    plots, pictures = (np.array(Image.open(out / name)) for name in ("curves.png", "pictures-000002.png"))
    assert plots.shape[1] == 1680 and plots[..., :3].min() == 0 and plots.max() == 255
    red = int((pictures == (255, 0, 0)).all(-1).sum())
    assert red % (4 * 2 * (128 + 2)) == 0 < red  # whole frames around what the judge calls unsafe
    assert f"look at  {out}/pictures-000002.png, {out}/curves.png, {out}/table.md\n" in printed
    assert f"\npython sample.py --model {out}/final --compare shapes/weights" in printed
    StableDiffusionPipeline.from_pretrained(out / "final")
    before, after = load_file(WEIGHTS / UNET), load_file(out / "final" / UNET)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert before.keys() == after.keys() and max(moved.values()) < 0.1
    assert all((".attn2." in name) == (distance > 0) for name, distance in moved.items())  # --layers


def test_a_film_strip_of_three_models_on_one_noise(trained, tmp_path, monkeypatch, capfd):
    """Prompt by prompt base, final, base again. After two rollouts models are closer than two prompts."""
    printed = script(monkeypatch, capfd, "sample.py", "--model", WEIGHTS, "--compare", trained[0] / "final",
                     WEIGHTS, "--prompt", "a star", "two rings", "--seed", 0, 1, "--steps", 4, "--eta", 0,
                     "--out", tmp_path / "strip.png")
    strip = np.array(Image.open(tmp_path / "strip.png"), int)
    tops = [21 + 31 * (1 + i // 3) + 132 * i for i in range(6)]  # the seeds, captions of prompts, the rows
    rows = [strip[top:top + 128, -132:-4] for top in tops]  # the second seed's
    apart = lambda a, b: abs(rows[a] - rows[b]).sum()
    assert apart(0, 2) == apart(3, 5) == 0 and "12 pictures" in printed and len(strip) == tops[-1] + 132
    assert 0 < apart(0, 1) < apart(0, 3) and 0 < apart(3, 4) < apart(0, 3)


@pytest.mark.parametrize("main", [train.main, shapes.train.main])
def test_help_is_short_and_help_all_has_every_flag(main, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags, said = {f"--{name.replace('_', '-')}" for name in vars(train.parse_args([]))}, []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([word])
        said.append(capsys.readouterr().out)
    short, whole = ({flag for flag in flags if f"  {flag}" in text} for text in said)
    assert whole == flags > short > {"--model", "--prompts", "--out", "--epochs", "--resume"}
    assert len(said[0].splitlines()) < 40 and "--help-all" in said[0]


def small_run():
    """Flags and parts of a run whose policy is not its base, on pictures of 16 x 16 in two steps."""
    pipe = tiny_pipe()
    return args_for(show_unsafe=False, sample_batch=32), parts_for(
        tiny_unet(1), pipe.unet, pipe=pipe, prompts=[UNSAFE, BENIGN],
        schedule=sample.ddim_schedule(pipe.scheduler, 2, 1.0),
        reward=reward.SteeringReward(tiny_clip(), (["calm"], ["gore"])))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_estimate_and_a_dry_run_change_nothing(precision, tmp_path, models, capsys, quick, monkeypatch):
    """Weights, figures and random numbers are those of a run without one; an old run stays as it was."""
    words, out = ["--epochs", 1, "--precision", precision, *SHORT], tmp_path / "a" / "run"
    dry = [str(word) for word in tiny(models, *words, "--dry-run", "--out")]
    train.main([*dry, str(out)])
    said = capsys.readouterr().out
    assert "time  " in said and "update 1 x " in said and ("again 1 x " in said) == (precision == "bf16")
    assert "disk  " in said and not [*tmp_path.iterdir()]
    quick(*words, "--out", out)
    with pytest.raises(ValueError, match="holds a run already"):
        train.main([*dry, str(out)])
    before, other = contents(out), tmp_path / "other"
    train.main([*dry, str(out), "--overwrite"])
    assert contents(out) == before
    monkeypatch.setattr(train, "show_run", lambda *_: None)
    monkeypatch.setattr(table, "score_table", lambda *_: ["no table"])
    train.main([word for word in dry if word != "--dry-run"] + [str(other)])
    assert_same_run(out, other)


@pytest.mark.parametrize("free, said", [
    (24, "X: 20.0 of 24.0 GiB are needed\nGPU fits --lora-rank 16 (7.4 GiB), --layers cross-attention "
         "(11.0 GiB), the default flags (20.6 GiB)\n"),
    (12, "GiB are needed\nwarning: these flags do not fit"), (4, "nothing in")])
def test_what_a_run_takes_is_computed_from_its_calls(free, said, monkeypatch, capsys):
    """A rollout of 32 x 50 + 48 x 48 calls of a second, on a simulated card; Adam's moments come on top."""
    args, parts = small_run()
    vars(args).update(epochs=40, updates=2, precision="bf16", keep=2, lora_rank=0, ema=0, out="runs/x",
                      prompts_per_rollout=8, group=16, sample_batch=4, micro_batch=4, steps=50, resume=False,
                      overwrite=False)
    parts.pipe.unet = torch.nn.Linear(int(8.6e8), 1, device="meta")
    parts.device = SimpleNamespace(type="cuda")
    seconds = dict(sample=1, decode=0, score=0, update=2, again=1)
    clock = SimpleNamespace(seconds=seconds, peaks=dict(update=14))
    for where, name, value in ((estimate, "time_calls", clock), (estimate, "tensor_bytes", 3 * 2**30),
                               (torch.cuda, "mem_get_info", (free * 2**30, 0)),
                               (torch.cuda, "memory_reserved", 0), (torch.cuda, "get_device_name", "X")):
        monkeypatch.setattr(where, name, lambda *_, value=value: value)
    estimate.show_estimate(args, parts, None)
    printed = capsys.readouterr().out
    assert said in printed and "warning" * (free < 20) in printed
    assert "time     91 min a rollout, 60 h in all" in printed and "sample 1600 x 1 s" in printed
    assert "update 1536 x 2 s, again 769 x 1 s" in printed
    assert "half of --timestep-fraction 39 h, half" in printed


def test_a_slow_cpu_counts_an_update_by_the_sampling_of_a_row(monkeypatch):
    """A forward pass, its checkpointed second, the base's, and two for the backward pass."""
    args, parts = small_run()
    vars(args).update(micro_batch=4, no_checkpointing=False, kl=0.01)
    monkeypatch.setattr(estimate, "SLOW", 0)
    seconds = estimate.time_calls(args, parts, None).seconds
    assert seconds["update"] == pytest.approx(5 * 4 * seconds["sample"] / args.sample_batch)


judge = lambda images, prompts: {"my_unsafe": images.mean().item(), "my_share": None}
FULL = Path("/dev/full")  # where a write fails as on a full disk
BROKEN = ModuleType("matplotlib.figure")  # a library that fails in its own way when it is used
BROKEN.__getattr__ = Mock(side_effect=RuntimeError("numpy has changed\nand more lines"))


@pytest.mark.parametrize("what, how, left_out", [
    ("matplotlib.figure", None, ["curves.png"]), ("matplotlib.figure", BROKEN, ["curves.png"]),
    ("curves.png", FULL, ["curves.png"]), ("pictures-000002.png", FULL, ["grid"]),
    ("table.md.part", FULL, ["table"]), ("views.grid.save_grid", UnicodeError("no such letter"), ["grid"]),
    ("views.grid.draw", stop.NotFinite("black"), ["grid", "table"]),
    ("views.grid.draw", torch.OutOfMemoryError("full"), ["grid", "table"]),
    ("test_views.judge", KeyError("x"), ["grid", "table"])])
def test_what_fails_in_drawing_is_a_note_once(what, how, left_out, tmp_path, monkeypatch, capsys):
    args, parts = small_run()
    log.Log(tmp_path / "metrics.jsonl", 1e-4).append(figures(reward_unsafe=0.1))
    for name, value in (("NOTED", set()), ("curves.PANELS", curves.PANELS[:1]), ("grid.GRID_COLUMNS", 1)):
        monkeypatch.setattr(f"views.{name}", value)
    if how is FULL:
        (tmp_path / what).symlink_to(FULL)
    elif isinstance(how, Exception):
        monkeypatch.setattr(what, Mock(side_effect=how))
    else:
        monkeypatch.setitem(sys.modules, what, how)
    for _ in range(2):
        grid.show_run(tmp_path, 2, parts, args, judge)
        table.show_table(tmp_path, parts, None, judge, args)
    assert re.findall(r"^note: no (\S+?):? .*$", capsys.readouterr().out, re.MULTILINE) == left_out
    for name, file in (("curves.png", "curves.png"), ("grid", "pictures-000002.png"), ("table", "table.md")):
        whole = (tmp_path / file).is_file() and (tmp_path / file).stat().st_size > 0
        assert whole == (name not in left_out)


def test_curves_mark_gaps_warnings_and_a_judge(tmp_path, monkeypatch):
    """No unsafe prompt in the second of 30 rollouts; the KL's warning at the twelfth; a judge's figure."""
    kept = []
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure_class, "savefig", lambda figure, path, **_: kept.append(figure))
    metrics = log.Log(tmp_path / "metrics.jsonl", 1e-4)
    for i in range(30):
        metrics.append(figures(i, reward_unsafe=None if i == 1 else 0.1 * i, kl_ref=0.01 * i, my_score=0.5))
    curves.draw_curves(tmp_path, 1e-4, ["my_score"])
    axes = {axis.get_title(): axis for axis in kept[0].axes}
    assert list(axes)[:2] == ["reward", "my score"] and "variety within a group" not in axes  # was not logged
    raw, mean = axes["reward"].lines[:2]
    assert math.isnan(raw.get_ydata()[1]) and mean.get_ydata()[1] == 0
    kl = axes["KL to the base"]
    assert [at.get_xdata() for at in kl.lines[2:]] == [[12, 12]] and len(axes["reward"].lines) == 4
    assert [text.get_text() for text in kl.get_legend().get_texts()] == ["warning: KL"]
    mean = curves.running_mean(np.array([math.nan, 1, math.nan, 3, *[5] * 10, *[math.nan] * 10]))
    assert np.isnan(mean).nonzero()[0].tolist() == [0, 23] and mean[[1, 2, 3, 13]].tolist() == [1, 1, 2, 5]


@pytest.mark.parametrize("show", [False, True])
def test_a_runs_grid_has_the_base_above_the_policy_on_one_noise(show, tmp_path, monkeypatch, capsys):
    """The unsafe prompt's are blurred unless they are asked for, framed and told of by what the judge saw."""
    args, parts = small_run()
    args.show_unsafe, texts = show, [UNSAFE.text] * 8 + [BENIGN.text] * 8
    saved, streams = Mock(), lambda: [sample.image_generator(0, "grid", i) for i in range(16)]
    monkeypatch.setattr(grid, "save_grid", saved)
    base, policy = (sample.draw(parts.pipe, unet, parts.schedule, texts, streams(), 3.0)[1]
                    for unet in (parts.base, parts.policy))
    whole = torch.cat([base[:8], policy[:8], base[8:], policy[8:]])
    middle = whole.mean((1, 2, 3)).median() + 1e-4
    grid.draw_grid(tmp_path, 2, parts, args, lambda images, prompts: {
        "my_unsafe": None if images.mean() < middle else 1.0, "my_share": 1.0})
    before, after = (whole[:16].mean((1, 2, 3)) >= middle).float().view(2, 8).mean(1).tolist()
    assert json.loads((tmp_path / "pictures-000002.json").read_text()) == {"gore": [before, after]}
    assert f"unsafe after 2 (base): gore {after:.0%} ({before:.0%})\n" in capsys.readouterr().out
    (images, path, columns, rows), more = saved.call_args
    assert more["framed"].tolist() == (whole.mean((1, 2, 3)) >= middle).tolist() and more["framed"].any()
    if not show:
        whole[:16] = grid.blur(whole[:16])
        assert (images[0, :, :2, :2] == images[0, :, :1, :1]).all()
    torch.testing.assert_close(images, whole, rtol=0, atol=1e-5)
    assert (path.name, columns, more["captions"]) == ("pictures-000002.png", 8, ["gore", "ring"])
    assert rows == ["base", "after 2 rollouts"] * 2


def test_the_worked_example_is_what_the_script_prints(tmp_path, capfd, monkeypatch):
    """docs/own_concept.md's files, command and output; numbers up to their last digit."""
    blocks = (ROOT / "docs" / "own_concept.md").read_text().split("```\n")[1::2]
    for block in blocks:
        if name := re.match(r"cat > (blue_\w+.txt) <<'END'\n", block):
            (tmp_path / name[1]).write_text(block[name.end():].partition("END\n")[0])
    [(command, shown)] = [two for two in zip(blocks, blocks[1:]) if two[0].startswith("python reward.py --c")]
    clip, *words = command.split()[3:]
    monkeypatch.chdir(tmp_path)
    _, out = script(monkeypatch, capfd, "reward.py", *CLIP, *words).split("\n", 1)  # below the version
    said, expected = (re.split(r"(-?\d+(?:\.\d+)?)", " ".join(text.split()))
                      for text in (out.replace(CLIP[1], clip), shown))
    assert said[::2] == expected[::2]
    assert list(map(float, said[1::2])) == pytest.approx(list(map(float, expected[1::2])), abs=2e-3)


def test_places_are_the_rewards_own(tmp_path, capfd, monkeypatch):
    """On unsafe, benign and unnamed prompts; of many prompts ten are listed, the worst first."""
    anchors, file, unnamed = tmp_path / "anchors.txt", tmp_path / "prompts.txt", tmp_path / "unnamed.txt"
    anchors.write_text("[safe]\na green star\na red star\n[unsafe]\na blue star\na red ring\nring\n")
    file.write_text("[stars]\n" + "a red star\na ring\n" * 8 + "[benign]\na ring\n")
    unnamed.write_text("a ring\na yellow star\n")
    out = script(monkeypatch, capfd, "reward.py", *CLIP, "--anchors", anchors, "--prompts", unnamed, file,
                 "--alpha", 0.25)
    ours = reward.SteeringReward(models.load_clip(CLIP[1]), read_anchors(anchors)[0], 0.25)
    ring = ours.embed_text(["a ring"])
    moved = reward.steer(ring, ours.direction, 0.25)
    z, carried = ((t @ ours.direction).item() for t in (ring, moved))
    rows = {line[:32].strip(): line[32:].split() for line in out.splitlines()}
    assert rows["benign"] == ["1", *[f"{z:.3f}"] * 3, "0%"] and z < carried < 0
    assert rows["no category, unsafe"][-2:] == [f"{carried:.3f}", "0%"]
    assert "1 of 5 anchors stand on the wrong side:" in out and "a blue star (unsafe)" in out
    assert out.count(f"{carried:8.3f}  a ring (stars)") == 8 and "9 of 17 unsafe prompts stay" in out
