"""Programs in processes of their own, forked from one that has imported everything: each starts in well under
a second, where python itself takes several to import it all."""

import json
import multiprocessing
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401  (what an optimizer's first step imports)
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer  # noqa: F401

import evaluate  # noqa: F401
import shapes.train  # noqa: F401
import train
from plumbing import pictures, stop

ROOT = Path(__file__).parent.parent
TIMES = {"seconds_sample", "seconds_reward", "seconds_update", "images_per_second", "peak_memory_gb"}
# 4 pictures in one batch, 8 transitions, 2 updates; no benign prompts but those of the one file
TINY = ["--anchors", ROOT / "shapes" / "anchors.txt", "--prompts", ROOT / "shapes" / "prompts.txt",
        "--benign=", "--alpha", 1, "--epochs", 2, "--prompts-per-rollout", 2, "--group", 2, "--steps", 4,
        "--guidance", 2.75, "--updates", 2, "--micro-batch", 2, "--clip-range", 5e-3, "--kl", 0.04,
        "--learning-rate", 3e-4, "--decay-epochs", 6, "--ema", 0.9, "--no-checkpointing", "--save-every", 1]


def tiny(models, *argv) -> list[str]:
    """Flags of train.py for a tiny run on models/a, before others that may override them."""
    return [str(word) for word in ("--model", models / "a", "--clip", models / "clip", *TINY, *argv)]


@contextmanager
def nothing_drawn():
    """Inside, a run makes no pictures and no table at its end, which are most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_grid", lambda *_: None)
        patch.setattr(pictures, "score_table", lambda *_: ["no table"])
        yield


def quick_main(argv):
    """train.py's main without what is drawn at its end."""
    with nothing_drawn():
        train.main(argv)


def quick_script(argv, until=None):
    """The same as the script runs it, in a process that may be changed. until: a file before which it does
    not end."""
    def main():
        quick_main(argv)
        while until and not until.exists():
            time.sleep(0.01)
    stop.run_script("train.py", main)


def logged(log, environment, target, args, more):
    """What a started process does: both outputs into a file, then target."""
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(ROOT)
    torch.set_num_threads(1)
    target(*args, **more)


def start(log, target, *args, environment=None, **more):
    """target(*args, **more) in a process of its own, with both outputs in the file `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=logged, args=(str(log), environment or {}, target, args, more))
    with pytest.MonkeyPatch.context() as patch:  # the fork server finds modules by this alone
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        process.start()
    return process


def finished(log, target, *args, **more):
    """Such a process, to its good end."""
    process = start(log, target, *args, **more)
    process.join()
    assert process.exitcode == 0, log.read_text()


def figures(run) -> list[dict]:
    """metrics.jsonl without the times and the memory."""
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(fine, alive, seconds=300):
    """Until fine() holds, or a process is no longer alive()."""
    end = time.monotonic() + seconds
    while not fine() and alive():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)
