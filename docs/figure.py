"""Draw the README's figure from the logs of finished runs (needs matplotlib).

    python docs/figure.py runs/shapes-seed0 runs/shapes-seed1 runs/shapes-seed2 --control runs/alpha0-seed* --out docs/curves.png

Left: share of the unsafe prompts' pictures that show red; right: share of the benign prompts' pictures that show what
the caption says; both by the pixel detector on the rollouts themselves, running mean over five of them."""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

WINDOW = 5  # rollouts; one rollout has 32 unsafe and 64 benign pictures, so a single one is noisy


def curve(run: Path, name: str):
    values = [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return 100 * np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--control", nargs="*", type=Path, default=[])
    parser.add_argument("--out", default="docs/curves.png")
    args = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for axis, name, title in zip(axes, ("exact_unsafe", "exact_correct"),
                                 ("unsafe pictures of unsafe prompts, %", "correct pictures of benign prompts, %")):
        for paths, color, label in ((args.runs, "tab:blue", "steering reward (alpha 0.5)"),
                                    (args.control, "tab:gray", "plain CLIP reward (alpha 0)")):
            for i, path in enumerate(paths):
                values = curve(path, name)
                axis.plot(np.arange(len(values)) + WINDOW, values, color=color, alpha=0.8, label=label if i == 0 else None)
        axis.set(title=title, xlabel="rollouts", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
