"""One card in eight minutes, without a download: what a run of Stable Diffusion's shapes takes on it.

The figures of each step go into one JSON file at once, so that a command that is cut off leaves those before.
A step that fails leaves its error, and the next one begins. Stable Diffusion's weights are random.

    python -m bench.card                # writes runs/card/card.json; in 8 min at most: timeout -s KILL 8m ...
    python -m bench.card --small        # the same steps on the shapes world's networks; a CPU will do
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch

import evaluate
import shapes.train
import train
from bench import speed
from bench.sd14 import sd14_pipeline
from evaluation import results
from plumbing import log, run, stop
from plumbing.models import choose_device, load_pipeline

EPOCH = ["--prompts-per-rollout", "1", "--group", "16", "--steps", "10"]  # as docs/speed.md's
TINY = ["--prompts-per-rollout", "1", "--group", "4", "--steps", "4"]
VARIANTS = {"default": [], "micro-batch 8": ["--micro-batch", "8", "--sample-batch", "8"],
            "micro-batch 16": ["--micro-batch", "16", "--sample-batch", "16"],
            "no checkpointing": ["--no-checkpointing"], "lora-rank 16": ["--lora-rank", "16"]}


def an_epoch(own, words: list) -> dict:
    """bench.speed's figures of one epoch after one to warm up."""
    args = train.parse_args([*([*shapes.train.FLAGS, *TINY] if own.small else EPOCH), *words])
    choose_device(args)
    return speed.measure(args, speed.set_up(args, None if own.small else "sd14"), 1)


def a_run(own) -> dict:
    """train.py's own command: a checkpoint, the run resumed from it, and final/ opened."""
    start = load_pipeline(str(shapes.WEIGHTS)) if own.small else sd14_pipeline("cpu")
    start.save_pretrained(own.out / "model")
    words = ["--model", own.out / "model", "--clip", shapes.WEIGHTS / "text_encoder", "--keep", 1, *TINY,
             "--anchors", Path(shapes.__file__).parent / "anchors.txt", "--out", own.out / "run"]
    for more in (["--epochs", 1, "--overwrite"], ["--epochs", 2, "--resume"]):
        train.main([str(word) for word in [*words, *more]])
    opened = load_pipeline(str(own.out / "run" / "final"))
    return {"log": run.read_lines(own.out / "run" / "metrics.jsonl"), "weights": opened.unet.num_parameters()}


def drawn(own, dtype: str) -> dict:
    """A batch of evaluate.py's pictures by the model that the run started from: the first time, and again."""
    args = evaluate.parse(["--model", str(own.out / "model"), "--suite", "prompts", "--limit", "8", "--dtype",
                           dtype, "--prompts", train.parse_args([]).prompts[0]])
    rows, *_ = evaluate.SUITES[args.suite].rows(args)
    pipe, clock = results.load(args.model, args), log.Clock(torch.device(args.device))
    for name in ("first", "again"):
        with clock(name):
            results.draw(pipe, rows, "", args)
    return {"pictures": len(rows), "seconds_of": clock.seconds, "peak_gib": clock.peaks}


def shapes_run(own) -> dict:
    """The shapes world to its end, by its own command."""
    out = own.out / "shapes"
    shapes.train.main(["--out", str(out), "--overwrite", *(["--epochs", "2"] if own.small else [])])
    return {"log": run.read_lines(out / "metrics.jsonl"), "table": (out / "table.md").read_text()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="the shapes world's networks, to try the steps")
    parser.add_argument("--out", type=Path, default=Path("runs/card"), help="folder of card.json")
    own = parser.parse_args(argv)
    if not (own.small or torch.cuda.is_available()):
        raise ValueError("no GPU found; --small tries the steps on a CPU")
    steps = {f"epoch, {name}": (an_epoch, words) for name, words in VARIANTS.items()}
    steps |= {"run, resumed": (a_run,), "drawing, float32": (drawn, "float32"),
              "drawing, bfloat16": (drawn, "bfloat16"), "shapes world": (shapes_run,)}
    report = {"commit": log.commit(), "torch": torch.__version__, "steps": {},
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    own.out.mkdir(parents=True, exist_ok=True)
    for name, (step, *given) in steps.items():
        begun = time.monotonic()
        try:
            told = step(own, *given)
        except (Exception, SystemExit) as error:  # whatever it is, the other steps still tell something
            told = {"error": f"{type(error).__name__}: {error}"[:1000]}
        report["steps"][name] = told | {"seconds": time.monotonic() - begun}
        run.write_text(own.out / "card.json", json.dumps(report, indent=1, default=str) + "\n")
        print(f"card     {name}: {report['steps'][name]}", flush=True)
        gc.collect(), torch.cuda.empty_cache()


if __name__ == "__main__":
    stop.run_script("bench.card", main)
