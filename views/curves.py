"""curves.png: metrics.jsonl at a glance, and the rollouts at which the run was warned.

Light is a rollout, dark the mean over the last WINDOW. What no rollout of these has is a gap.
"""

import math
from pathlib import Path

import numpy as np

from plumbing.log import Log
from plumbing.run import read_lines
from views import save_figure

WINDOW, COLUMNS = 10, 4
UNSAFE, BENIGN = ("tab:red", "unsafe prompts"), ("tab:blue", "benign prompts")
ALL, ALONE = ("tab:gray", "all prompts"), ("tab:blue", "")
# title, its figures with color and name, and the warning (of log.warnings) that is about them
PANELS = [
    ("reward", {"reward_unsafe": UNSAFE, "reward_benign": BENIGN}, ""),
    ("alignment with the prompt", {"alignment": ALONE}, "reward hacking"),
    ("image safety", {"image_safety_unsafe": UNSAFE, "image_safety": ALL}, ""),
    ("variety within a group", {"spread_unsafe": UNSAFE, "spread_benign": BENIGN}, ""),
    ("spread of rewards within a group", {"reward_std": ALONE}, "no spread"),
    ("KL to the base", {"kl_ref": ALONE}, "KL"),
    ("clipped share of transitions", {"clip_frac_pos": ("tab:green", "up, better pictures"),
                                      "clip_frac_neg": ("tab:purple", "down, worse pictures")},
     "clip fraction"),
    ("largest |ratio - 1|", {"ratio_dev_max": ("tab:blue", "over all updates"),
                             "ratio_dev_first": ("tab:orange", "before the first")}, "rounding")]


def running_mean(values):
    """Of those among the last WINDOW values that are no NaN; NaN if all are: (n,) -> (n,)."""
    total = lambda terms: np.convolve(terms, np.ones(WINDOW))[:len(values)]
    count = total(~np.isnan(values))
    return total(np.nan_to_num(values)) / np.where(count, count, np.nan)


def draw_curves(run: Path, clip_range: float, judged=()):
    """Write a run's curves.png. judged: the names of a judge's figures, which have a panel each."""
    lines, warned = read_lines(run / "metrics.jsonl"), Log(run / "metrics.jsonl", clip_range).warned
    own = [(name.replace("_", " "), {name: ALONE}, "") for name in judged]
    panels = [panel for panel in (*PANELS[:1], *own, *PANELS[1:])
              if any(line.get(name) is not None for line in lines for name in panel[1])]
    rows = math.ceil(len(panels) / COLUMNS)
    rollouts = np.array([line["epoch"] + 1 for line in lines])

    def draw(figure):
        for place, (title, names, about) in enumerate(panels, 1):
            axis = figure.add_subplot(rows, COLUMNS, place, title=title, xlabel="rollouts")
            for name, (color, label) in names.items():
                values = np.array([line.get(name) for line in lines], float)  # None becomes NaN
                axis.plot(rollouts, values, ".-", color=color, alpha=0.25, markersize=3, linewidth=1)
                axis.plot(rollouts, running_mean(values), color=color, label=label)
            if about in warned:
                axis.axvline(warned[about] + 1, color="black", linestyle="--", linewidth=1,
                             label=f"warning: {about}")
            axis.locator_params("x", integer=True)
            axis.grid(alpha=0.3)
            if len(names) > 1 or about in warned:
                axis.legend(fontsize=8)
        figure.suptitle(f"{run}: {len(lines)} rollouts, mean over {WINDOW}")

    save_figure(run / "curves.png", draw, (4.2 * COLUMNS, 2.9 * rows))
