"""bench/: the calls, the floor and the memory that it counts, against arithmetic and a profiler."""

import gc
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import shapes.train
import train
from bench import card, memory, sd14, speed
from plumbing.models import choose_device, load_clip, load_pipeline
from views import estimate

SMALL = ["--device", "cpu", "--steps", "4", "--prompts-per-rollout", "2", "--group", "2"]


def flags(*words):
    args = train.parse_args([*shapes.train.FLAGS, *SMALL, *words])
    choose_device(args)
    return args


@pytest.mark.parametrize("words", [[], ["--lora-rank", "2"], ["--precision", "bf16"],
                                   ["--kl", "0", "--kl-benign", "0", "--guidance", "1"]])
def test_an_epoch_makes_the_calls_that_arithmetic_asks_for(words):
    """As the estimate counts and the floor replays them. Under bf16 three of four have to be made again."""
    args = flags("--group", "3", "--micro-batch", "4", "--sample-batch", "4", "--updates", "2", *words)
    lora, free, half = "--lora-rank" in words, "--kl" in words, "--precision" in words
    parts = speed.set_up(args)
    calls, again = ({name: [] for name in speed.PHASES} for _ in range(2))
    train.one_epoch(parts, args, 0, lambda name: speed.recorded(parts, calls[name]))
    speed.floor(parts, calls, lambda name: speed.recorded(parts, again[name]))
    made = Counter(name for phase in calls.values() for name, *_ in phase)
    micro = 2 + 2  # 6 pictures of 2 transitions in two shares of 6, four at a time; as many for the base
    assert made == Counter(unet=2 * 4 + micro * (1 + lora) + 3 * half, base=0 if lora or free else micro,
                           vae=2, clip=1)  # the VAE takes four pictures at a time
    assert estimate.count_calls(args) == dict(sample=8, update=4, again=3 * half, decode=2, score=1)
    assert str(again) == str(calls)  # each tensor as its shape and type
    (one, ((x, *_), _), learns), (other, ((y, *_), _), taught) = calls["sample"][0], calls["update"][0]
    assert (one, learns, other, taught) == ("unet", False, "unet", not half)
    assert x.shape == y.shape == (4 if free else 8, 4, 8, 8)  # with its unguided half
    assert all(p.grad is None for p in parts.policy.parameters())


@pytest.mark.parametrize("words", [[], ["--arch", "sd14"]])
def test_the_command_prints_and_writes_what_it_measured(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "sd14_pipeline", lambda device: load_pipeline(str(shapes.WEIGHTS)))
    monkeypatch.setattr(speed, "vit_h14", lambda *_: load_clip(str(shapes.WEIGHTS / "text_encoder")))
    speed.main([*SMALL, *words, "--repeats", "1", "--json", str(tmp_path / "bench.json")])
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["flags"]["group"] == 2 and told["calls"]["vae"] == 1 and bool(told["arch"]) == bool(words)
    phases = told["phases"]
    assert phases["epoch"]["seconds"] == [sum(phases[name]["seconds"][0] for name in speed.PHASES)]
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    assert rows == ["phase", *speed.PHASES, "epoch"]


def test_on_a_gpu_norms_are_float32_and_attention_is_half():
    """And the memory of a tensor counts as long as it lives, in blocks of 512 bytes."""
    with FakeTensorMode(), memory.Alive() as alive, memory.as_on_a_gpu(), torch.autocast("cpu"):
        x = torch.empty(1, 4, 8, 8)
        assert F.group_norm(x.bfloat16(), 2).dtype == torch.float32
        assert F.layer_norm(x.bfloat16(), (8, 8)).dtype == torch.float32
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
        gc.collect()
        assert alive.now == 1024 and alive.peak >= 2048
    with pytest.raises(ValueError, match="leave --model out"):
        memory.main(["--model", "elsewhere"])


def test_count_of_memory_is_what_an_epoch_allocates():
    """Fake tensors against torch's profiler of the real thing."""
    args, allocated = flags("--group", "4", "--micro-batch", "8", "--updates", "1"), {}

    @contextmanager
    def phase(name):
        with torch.profiler.profile(profile_memory=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        allocated[name] = max(itertools.accumulate(size for _, size in sizes))

    parts = speed.set_up(args)
    train.one_epoch(parts, args, 0, lambda name: nullcontext())  # the optimizer's moments come to be
    train.one_epoch(parts, args, 1, phase)  # 8 pictures of 2 transitions: two micro-batches
    counted = memory.count(args, load_pipeline(args.model), load_clip(args.clip)[0])
    for name in ("reward", "update"):
        before, peak = counted[name]
        assert peak - before == pytest.approx(allocated[name], rel=0.05), name


def test_a_step_that_fails_on_a_card_is_noted_and_the_next_one_begins(tmp_path, monkeypatch):
    """Each step's figures are in the file when the next begins."""
    monkeypatch.setattr(card, "VARIANTS", {"lora-rank 2": ["--lora-rank", "2"]})
    monkeypatch.setattr(card, "a_run", lambda own: 1 / 0)
    seen = lambda: json.loads((tmp_path / "card.json").read_text())["steps"]
    monkeypatch.setattr(card, "shapes_run", lambda own: {"before": [*seen()]})
    card.main(["--small", "--out", str(tmp_path)])
    epoch, run, *drawn, shapes_world = seen().values()
    assert epoch["figures"]["ratio_dev_first"] == 0 < epoch["figures"]["seconds_update"]
    assert epoch["phases"].keys() == {*speed.PHASES, "epoch"}
    assert run["error"].startswith("ZeroDivisionError") and len(shapes_world["before"]) == 4
    assert all("no such folder" in step["error"] for step in drawn)  # of a_run's model


@pytest.mark.skipif("SD14" not in os.environ, reason="20 GB, minutes: SD14=1 pytest -k full_size -s")
def test_the_full_size_architecture(tmp_path, capsys):
    """The default flags leave room on a card of 24 GB, and the real command line trains latents of 8 x 8."""
    memory.main([])
    assert "| update | 14.09 | 20.59 |" in capsys.readouterr().out
    sd14.sd14_pipeline("cpu", sample_size=8).save_pretrained(tmp_path / "sd14")
    words = ["--model", tmp_path / "sd14", "--clip", "shapes/weights/text_encoder", "--keep", "1",
             "--anchors", "shapes/anchors.txt", "--epochs", "1", "--kl", "0.01", "--out", tmp_path / "run"]
    subprocess.run([sys.executable, "train.py", *SMALL, *words], check=True)
    opened = load_pipeline(str(tmp_path / "run" / "final"))
    assert sum(p.numel() for p in opened.unet.parameters()) == 859_520_964
