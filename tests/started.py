"""Tiny runs of train.py, in this process or in others, and how two of them are compared.

Others are forked from a process that has imported everything, so each starts in well under a second."""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401  (what an optimizer's first step imports)
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer  # noqa: F401

import evaluate  # noqa: F401
import train
import views.grid
import views.table
from plumbing import stop

ROOT = Path(__file__).parent.parent
UNET = "unet/diffusion_pytorch_model.safetensors"
TIMES = {"seconds_sample", "seconds_reward", "seconds_update", "images_per_second", "peak_memory_gb"}
# 4 pictures in one batch, 4 transitions, 2 updates; no benign prompts but those of the one file
TINY = ["--anchors", ROOT / "shapes" / "anchors.txt", "--prompts", ROOT / "shapes" / "prompts.txt",
        "--benign=", "--alpha", 1, "--epochs", 2, "--prompts-per-rollout", 2, "--group", 2, "--steps", 3,
        "--guidance", 2.75, "--updates", 2, "--micro-batch", 2, "--clip-range", 5e-3, "--kl", 0.04,
        "--learning-rate", 3e-4, "--decay-epochs", 6, "--ema", 0.9, "--no-checkpointing", "--save-every", 1]
KINDS = {"full": ["--ema", 0, "--layers", "cross-attention"], "average": [],
         "adapters": ["--lora-rank", 2, "--learning-rate", 1e-2]}
SHORT = ["--steps", 2, "--skip-last", 1, "--updates", 1, "--micro-batch", 4]  # half the time


def tiny(models, *argv) -> list[str]:
    """Flags of train.py for a tiny run on models/a, before others that may override them."""
    return [str(word) for word in ("--model", models / "a", "--clip", models / "clip", *TINY, *argv)]


def quick_main(argv):
    """train.py's main without estimate, pictures, curves, and with a table of one word: most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_estimate", lambda *_: None)
        patch.setattr(views.grid, "draw_grid", lambda *_: None)
        patch.setattr(views.grid, "draw_curves", lambda *_: None)
        patch.setattr(views.table, "score_table", lambda *_: ["no table"])
        train.main(argv)


def quick_script(argv):
    """The same as the script runs it, in a process of its own."""
    sys.argv, sys.orig_argv = ["train.py", *argv], ["python", "-u", "train.py", *argv]
    stop.run_script("train.py", lambda: quick_main(argv))


def logged(log, environment, target, args):
    """What a started process does: both outputs into a file, then target."""
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(ROOT)
    torch.set_num_threads(1)
    target(*args)


def start(log, target, *args, environment=None):
    """target(*args) in a process of its own, with both outputs in the file `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=logged, args=(str(log), environment or {}, target, args), daemon=True)
    with pytest.MonkeyPatch.context() as patch:  # the fork server finds modules by this alone
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        process.start()
    return process


def wait_for(fine, alive, seconds=300):
    """Until fine() holds, or a process is no longer alive()."""
    end = time.monotonic() + seconds
    while not fine() and alive():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


def figures(run) -> list[dict]:
    """metrics.jsonl without the times and the memory."""
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


class Malicious:
    """Opened by an unpickler that runs what it reads, this ends the tests."""
    def __reduce__(self):
        return pytest.exit, ("a pickle was opened",)


def contents(folder) -> dict:
    """{file: sha256} of all that lies below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_run(run, other):
    """Figures, checkpoints and final/ to the bit; the log is as long, and nothing is unfinished."""
    assert figures(run) == figures(other)
    kept = [{name: digest for name, digest in contents(one).items() if "/" in name} for one in (run, other)]
    assert kept[0] == kept[1] and not list(run.glob("*.part"))
