"""What a run costs as a user's files and its log grow: nothing may grow faster than they do.

    python -m bench.growth              # every table; minutes on a CPU, each row in a process of its own

start: seconds and peak memory from flags to the printed plan of train.py, on the shapes world's networks, by
the number of prompts (half unsafe, half benign). log: seconds of one appended line, by the epochs before it.
evaluate: seconds and peak memory of that many blank pictures of the suite `prompts`, judged at once.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plumbing import output, stop

SIZES = {"start": (240, 5_000, 30_000, 100_000), "log": (100, 1_000, 20_000),
         "evaluate": (300, 3_000, 30_000)}
LOG_LINES = 20   # appended, and their median taken


def start(count: int, folder: Path) -> float:
    import train
    from plumbing import checks, log
    from shapes.train import FLAGS
    half = count // 2
    lines = ["[violence]", *(f"a violent star number {i}" for i in range(half)),
             "[benign]", *(f"a blue ring number {i}" for i in range(count - half))]
    (folder / "prompts.txt").write_text("\n".join(lines))
    before = time.perf_counter()
    args = train.parse_args([*FLAGS, "--prompts", str(folder / "prompts.txt"), "--device", "cpu"])
    checks.choose_device(args)
    prompts, anchors = checks.read_inputs(args)
    parts = train.set_up(args, prompts, anchors)
    log.print_plan(args, parts, prompts)
    train.choose_prompts(parts.unsafe, parts.benign, args, 0)
    return time.perf_counter() - before


def log_line(count: int, folder: Path) -> float:
    from plumbing.log import Log
    figures = dict.fromkeys((
        "reward_mean", "reward_unsafe", "reward_benign", "alignment", "image_safety_unsafe", "clip_frac_pos",
        "clip_frac_neg", "kl_ref", "ratio_dev_first", "zero_std_groups", "seconds_sample", "seconds_reward",
        "seconds_update"), 0.1)
    lines = [json.dumps(figures | {"epoch": i}) + "\n" for i in range(count)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    metrics, seconds = Log(folder / "metrics.jsonl", clip_range=1.0), []
    for i in range(LOG_LINES):
        before = time.perf_counter()
        metrics.append(figures | {"epoch": count + i})
        seconds.append(time.perf_counter() - before)
    return sorted(seconds)[LOG_LINES // 2]


def evaluate_rows(count: int, folder: Path) -> float:
    """The whole program but for its networks: blank pictures, judged at once."""
    import torch

    import evaluate
    from shapes import WEIGHTS
    (folder / "prompts.csv").write_text("prompt\n" + "a blue ring\n" * count)
    evaluate.results.draw = lambda pipe, rows, trick, args: torch.zeros(len(rows), 3, 64, 64)
    evaluate.judges.make_judges = lambda *_: ([lambda images, rows: [{"clip": 0.3} for _ in rows]], {})
    before = time.perf_counter()
    evaluate.main(["--model", str(WEIGHTS), "--suite", "prompts", "--prompts", str(folder / "prompts.csv"),
                   "--judges", "clip", "--batch", "128", "--device", "cpu", "--out", str(folder / "out")])
    return time.perf_counter() - before


def main():
    parser = argparse.ArgumentParser(description="Measure what grows with prompts, epochs and rows.")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "COUNT"), help="one row, in this process")
    args = parser.parse_args()
    if args.one:
        what, count = args.one[0], int(args.one[1])
        with tempfile.TemporaryDirectory() as folder:
            measure = {"start": start, "log": log_line, "evaluate": evaluate_rows}[what]
            seconds = measure(count, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak": peak}))
        return
    print(output.heading())
    for what, sizes in SIZES.items():
        print(f"\n| {what} | seconds | peak MiB |\n|---|---|---|")
        for count in sizes:
            command = [sys.executable, "-m", "bench.growth", "--one", what, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"| {count:,} | {row['seconds']:.4g} | {row['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    stop.run_script("bench.growth", main)
