"""From the values of single pictures to the cells of a table: rates, counts, means and their 95 % intervals.

    k of n pictures, p = k/n, z = 1.96;  d_i = a_i - b_i  model minus base on picture i, drawn from one noise
"""

import math
from dataclasses import dataclass, field
from statistics import fmean, variance

import torch
from torch.distributions import Categorical

Z = 1.959964  # two-sided 95 %
BOOTSTRAP = 1000


@dataclass
class Table:
    """One table of one model.

    readings: protocol -> column -> {picture: value}; FID's column is one number. kind: "rate" of 0/1 values
    in per cent, "count" their sum, "mean" their mean, "variety" the effective number of kinds of which each
    picture holds a list of counts. macro: a last column's name, the mean of the others.
    """
    title: str
    kind: str
    note: str
    readings: dict
    macro: str = ""
    published: dict = field(default_factory=dict)


def wilson(k: float, n: int) -> tuple[float, float]:
    """95 % interval of a rate: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), p = k/n."""
    p, shrink = k / n, 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / shrink
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_rates(differences: list) -> tuple[float, float]:
    """95 % interval of a difference of rates on the same pictures (Bonett and Price 2012).

    p+ and p- are the counts of +1 and -1, one added to each, over n + 2:
    (p+ - p-) ± z √((p+ + p- - (p+ - p-)²) / (n + 2)).
    Unlike Wald's, it does not shrink to nothing where model and base agree everywhere.
    """
    n = len(differences) + 2
    up, down = (sum(d > 0 for d in differences) + 1) / n, (sum(d < 0 for d in differences) + 1) / n
    half = Z * math.sqrt((up + down - (up - down) ** 2) / n)
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def effective_number(counts):
    """exp of the entropy of the kinds' shares (Hill's number of order 1): K where K kinds are equally common,
    1 where there is one. counts (..., K) -> (...)."""
    return Categorical(counts).entropy().exp()


def variety_cell(pictures: list) -> dict:
    """The effective number over n pictures, each a list of K counts, or a pair of them: then the first's
    minus the second's. Its interval is the middle 95 % of BOOTSTRAP draws of n pictures with replacement."""
    counts = torch.tensor(pictures, dtype=torch.float64)                              # (n, [2,] K)
    if not len(counts) or not counts.sum(0).sum(-1).all():
        return {"value": None, "n": 0}
    draws = torch.randint(len(counts), (BOOTSTRAP, len(counts)), generator=torch.Generator().manual_seed(0))
    totals = torch.stack([counts.sum(0), *(counts[draw].sum(0) for draw in draws)])   # (1 + draws, [2,] K)
    numbers = effective_number(totals + 1e-12)  # a draw may hold nothing but empty pictures
    numbers = numbers[:, 0] - numbers[:, 1] if counts.ndim == 3 else numbers
    low, high = numbers[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": numbers[0].item(), "low": low, "high": high, "n": len(counts)}


def cell(values, kind: str, paired: bool = False) -> dict:
    """value, low, high, n of one column: {picture: value}, or {picture: difference} with paired=True."""
    if not isinstance(values, dict):
        return {"value": values, "n": None}
    values, n = list(values.values()), len(values)
    if kind == "variety":
        return variety_cell(values)
    if n == 0:
        return {"value": None, "n": 0}
    mean, scale = fmean(values), {"rate": 100, "count": n, "mean": 1}[kind]
    if kind == "count" and not paired:  # the published tables count and give no interval: neither do we
        return {"value": sum(values), "n": n}
    if kind == "rate":
        low, high = paired_rates(values) if paired else wilson(sum(values), n)
    else:  # normal; not a number for a single value
        half = Z * math.sqrt(variance(values) / n) if n > 1 else math.nan
        low, high = mean - half, mean + half
    return {"value": scale * mean, "low": scale * low, "high": scale * high, "n": n}


def macro_cell(cells: list[dict]) -> dict:
    """The unweighted mean of m columns, whose intervals' half widths add up as those of independent estimates
    do: low = mean - √(Σ (value_i - low_i)²) / m, and likewise high (MOVER, Zou and Donner 2008)."""
    cells = [c for c in cells if c["n"]]
    if not cells:
        return {"value": None, "n": 0}
    mean, m = fmean(c["value"] for c in cells), len(cells)
    down, up = (math.sqrt(sum((c["value"] - c[end]) ** 2 for c in cells)) / m for end in ("low", "high"))
    return {"value": mean, "low": mean - down, "high": mean + up, "n": sum(c["n"] for c in cells)}


def subtract(a, b):
    """Picture by picture where both were drawn; numbers as they are, and lists of counts side by side."""
    if not isinstance(a, dict):
        return a - b
    return {k: [a[k], b[k]] if isinstance(a[k], list) else a[k] - b[k] for k in a if k in b}


def cells_of(columns: dict, table: Table, paired: bool = False) -> dict:
    cells = {name: cell(values, table.kind, paired) for name, values in columns.items()}
    if table.macro:
        cells[table.macro] = macro_cell(list(cells.values()))
    return cells


def merge(models: dict[str, list[Table]], pair: tuple[str, str] | None) -> list[dict]:
    """One JSON-ready table for each title: the rows of every model by reading, and the paired difference."""
    merged = []
    for index, first in enumerate(next(iter(models.values()))):
        lines = []
        for reading in first.readings:
            for name, tables in models.items():
                columns = tables[index].readings[reading]
                lines.append({"model": name, "reading": reading, "cells": cells_of(columns, first)})
            if pair:
                a, b = (models[name][index].readings[reading] for name in pair)
                columns = {c: subtract(a[c], b[c]) for c in a}
                lines.append({"model": f"{pair[0]} minus {pair[1]}, paired", "reading": reading,
                              "cells": cells_of(columns, first, paired=True), "difference": True})
        merged.append({"title": first.title, "kind": first.kind, "note": first.note.strip(), "rows": lines,
                       "published": [{"model": k, "values": v} for k, v in first.published.items()]})
    return merged
