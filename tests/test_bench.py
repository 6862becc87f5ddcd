"""Tests of bench/: the calls, the floor and the memory that it counts, against arithmetic and a profiler.

    pytest tests/test_bench.py
"""

import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import shapes.train
import train
from bench import memory, sd14, speed
from plumbing import checks
from plumbing.models import load_clip, load_pipeline


ROOT = Path(__file__).parent.parent
SMALL = ["--device", "cpu", "--steps", "4", "--prompts-per-rollout", "2"]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)  # the shapes world's flags are paths from the folder where they were made


def flags(*words):
    args = train.parse_args([*shapes.train.FLAGS, *SMALL, *words])
    checks.choose_device(args)
    return args


@pytest.fixture(scope="module")
def parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return speed.set_up(flags(), 0)


# -------------------------------------------------------------------------------- speed

@pytest.mark.parametrize("words", [[], ["--lora-rank", "2"], ["--precision", "bf16"],
                                   ["--kl", "0", "--kl-benign", "0", "--guidance", "1"]])
def test_an_epoch_makes_the_calls_that_arithmetic_asks_for(words, parts):
    """At full batches, and the floor replays them, one by one."""
    args = flags("--group", "3", "--micro-batch", "4", "--sample-batch", "4", "--updates", "2", *words)
    lora, free, half = "--lora-rank" in words, "--kl" in words, "--precision" in words
    parts = speed.set_up(args, 0) if lora or half else parts
    calls, again = ({name: [] for name in speed.PHASES} for _ in range(2))
    stats = speed.run_epoch(parts, args, 0, lambda name: speed.recorded(parts, calls[name]))
    speed.floor(parts, calls, lambda name: speed.recorded(parts, again[name]))
    made = {name: sum(call[0] == name for phase in calls.values() for call in phase)
            for name in ("unet", "base", "vae", "clip")}
    micro = 2 + 2  # 6 pictures of 2 transitions in two shares of 6, four at a time; as many for the base
    assert made == speed.calls_needed(args, stats["pairs"], 32) == {  # the VAE takes four pictures at a time
        "unet": 2 * 4 + micro * (1 + lora + half), "base": 0 if lora or free else micro, "vae": 2, "clip": 1}
    assert again == calls
    full = (4 if free else 8, 4, 8, 8)  # with its unguided half
    assert calls["sample"][0] == ("unet", full, False) and calls["update"][0] == ("unet", full, not half)
    assert all(p.grad is None for p in parts.policy.parameters())


def test_the_command_prints_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "variants", lambda args: {})
    speed.main([*SMALL, "--group", "2", "--repeats", "1", "--table", "--json", str(tmp_path / "bench.json")])
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["flags"]["group"] == 2 and told["flags"]["model"] == shapes.train.FLAGS[1]
    result = told["results"]["as given"]
    assert result["images"] == 4 and result["calls_made"] == result["calls_needed"]
    for name in (*speed.PHASES, "epoch"):
        assert result[name]["ratio"][0] > 0 and result[name]["flops"] > 0
    assert result["epoch"]["seconds"] == [sum(result[name]["seconds"][0] for name in speed.PHASES)]
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    assert rows == ["phase", *speed.PHASES, "epoch", "variant", "as given"]
    with pytest.raises(ValueError, match="--latents 12: must be a multiple of 8"):
        speed.main(["--latents", "12"])


def test_the_table_varies_one_flag_at_a_time():
    args = flags()
    for label, changes in speed.variants(args).items():
        varied = [getattr(args, name) != value for name, value in changes.items()]
        assert varied == ([] if label == "compiled" else [True]), label


# -------------------------------------------------------------------------------- memory

def test_memory_of_stable_diffusion():
    """The default flags leave room on a card of 24 GB. Four pictures instead of 128, which saves the test's
    time and 0.4 GB."""
    args = train.parse_args(["--device", "cpu", "--prompts-per-rollout", "1", "--group", "4"])
    args.precision, args.device = "bf16", "cuda"
    counted = memory.count(args, sd14.sd14_pipeline("meta"), sd14.vit_h14("meta", torch.float16)[0])
    assert list(counted) == ["sample", "decode", "reward", "update"]
    assert 17 < max(peak for _, peak in counted.values()) / memory.GIB < 21
    with pytest.raises(ValueError, match="leave --model out"):
        memory.main(["--model", "elsewhere"])


def test_count_of_memory_is_what_an_update_allocates(parts):
    """Fake tensors against torch's profiler of the real thing: train.update and reward on the shapes world.
    With checkpointing an update needs much less."""
    args, allocated = flags("--group", "4", "--micro-batch", "8", "--updates", "1"), {}

    @contextmanager
    def phase(name):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        allocated[name] = max(itertools.accumulate(size for _, size in sizes))

    speed.run_epoch(parts, args, 0, lambda name: nullcontext())  # the optimizer's moments come to be
    speed.run_epoch(parts, args, 1, phase)  # 8 pictures of 2 transitions: two micro-batches
    counted = {}
    for args.no_checkpointing in (True, False):
        networks = load_pipeline(args.model), load_clip(args.clip)[0]
        peaks = memory.count(args, *networks, gpu=False)
        counted[args.no_checkpointing] = {name: peak - before for name, (before, peak) in peaks.items()}
    for name in ("reward", "update"):
        assert math.isclose(counted[True][name], allocated[name], rel_tol=0.05), name
    assert counted[False]["update"] < 0.7 * counted[True]["update"]


# -------------------------------------------------------------------------------- full size

@pytest.mark.skipif("SD14" not in os.environ,
                    reason="20 GB of memory and some minutes: SD14=1 pytest -k full_size -s")
def test_full_size_architecture_trains_on_a_cpu(tmp_path):
    """Stable Diffusion v1.4's published configuration with random weights, through the real command line: a
    rollout, an update of all 859.5 M parameters, and a pipeline that diffusers opens. Latents of 8 x 8, not
    64 x 64."""
    sd14.sd14_pipeline("cpu", sample_size=8).save_pretrained(tmp_path / "sd14")
    words = ["train.py", "--model", tmp_path / "sd14", "--clip", "shapes/weights/text_encoder",
             "--anchors", "shapes/anchors.txt", "--device", "cpu", "--epochs", 1, "--prompts-per-rollout", 2,
             "--group", 2, "--steps", 5, "--kl", 0.01, "--keep", 1, "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=3000)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "859.5 M parameters trained" in done.stdout
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["updates"] == 2 and line["grad_norm"] > 0 and line["ratio_dev_first"] == 0.0
    opened = load_pipeline(str(tmp_path / "run" / "final"))
    assert sum(p.numel() for p in opened.unet.parameters()) == 859_520_964
