"""Draw the figures of docs/shapes.md from the logs of finished runs (needs matplotlib).

    python -m shapes.study curves runs/seed? --control runs/alpha0-seed? --out docs/curves.png
    python -m shapes.study calls "all steps"=runs/a0,runs/a1 half=runs/b0,runs/b1 --out docs/calls.png

curves: share of the unsafe prompts' pictures that show red, and of the benign prompts' pictures that show
what the caption says, by the pixel detector on the rollouts themselves, running mean over WINDOW of them.
calls: the first of these against the work of the UNet, running mean over SPAN of it, mean of each setting's
runs and their range."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from plumbing import output

WINDOW = 5  # rollouts; one has 16 unsafe and 48 benign pictures, so a single one is noisy
SPAN = 33_000  # evaluations of the UNet, as many as five default rollouts take


def new_figure(columns: int, size):
    """(figure, its axes); matplotlib is needed only here."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("shapes.study: drawing needs the package matplotlib: pip install matplotlib")
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot
    return pyplot.subplots(1, columns, figsize=size)


def curve(run: Path, name: str, window: int = WINDOW):
    values = [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return 100 * np.convolve(values, np.ones(window) / window, "valid")


def calls(run: Path) -> float:
    """UNet evaluations of one rollout and its updates: guidance makes two of each, a backward pass counts as
    two, and the base's mean for the KL as one."""
    flags = json.loads((run / "flags.json").read_text())
    images = flags["prompts_per_rollout"] * flags["group"]
    trained = max(1, round((flags["steps"] - flags["skip_last"]) * flags["timestep_fraction"]))
    return 2 * images * (flags["steps"] + trained * (4 if flags["kl"] else 3))


def draw_curves(args):
    figure, axes = new_figure(2, (10, 3.4))
    panels = (("exact_unsafe", "unsafe pictures of unsafe prompts, %"),
              ("exact_correct", "correct pictures of benign prompts, %"))
    groups = ((args.runs, "tab:blue", "steering reward"),
              (args.control, "tab:gray", "plain CLIP reward (alpha 0)"))
    for axis, (name, title) in zip(axes, panels):
        for paths, color, label in groups:
            for i, path in enumerate(paths):
                values = curve(Path(path), name)
                axis.plot(np.arange(len(values)) + WINDOW, values, color=color, alpha=0.8,
                          label=label if i == 0 else None)
        axis.set(title=title, xlabel="rollouts", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right")
    return figure


def draw_calls(args):
    figure, axis = new_figure(1, (7, 4))
    for setting in args.runs:
        label, paths = setting.split("=")
        paths = [Path(p) for p in paths.split(",")]
        window = max(1, round(SPAN / calls(paths[0])))
        curves = [curve(p, "exact_unsafe", window) for p in paths]
        curves = np.stack([c[:min(map(len, curves))] for c in curves])
        work = calls(paths[0]) * (np.arange(curves.shape[1]) + window) / 1000
        [line] = axis.plot(work, curves.mean(0), label=label)
        axis.fill_between(work, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color())
    axis.set(xlabel="UNet evaluations of one picture, thousands",
             ylabel="unsafe pictures of unsafe prompts, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=("curves", "calls"))
    parser.add_argument("runs", nargs="+", help="run folders; for calls LABEL=FOLDER,FOLDER,...")
    parser.add_argument("--control", nargs="*", default=[], help="run folders drawn in gray")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    print(output.heading(args.out))
    figure = draw_curves(args) if args.figure == "curves" else draw_calls(args)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
