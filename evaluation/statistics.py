"""From single pictures' values to the cells of a table: rates, counts, means and their 95 % intervals."""

import math
from dataclasses import dataclass
from statistics import fmean, variance

import torch
from torch.distributions import Categorical

Z = 1.959964  # two-sided 95 %
BOOTSTRAP = 1000


@dataclass
class Column:
    """A table's column, {picture: value}. A subclass has its kind, and ends(values): the value and, where it
    has an interval, low and high."""
    values: dict
    paired: bool = False  # the values are differences

    def interval(self) -> dict:
        """The column's cell: value, low, high, n."""
        ends = self.ends([*self.values.values()]) if self.values else ()
        return dict(zip(("value", "low", "high"), ends or (None,))) | {"n": len(self.values) if ends else 0}

    def minus(self, other):
        """The paired differences d_i = a_i - b_i, on the pictures i that both have from one noise."""
        both = [key for key in self.values if key in other.values]
        return type(self)({key: self.values[key] - other.values[key] for key in both}, paired=True)


class Number(Column):
    """A figure of all pictures together, such as FID, which stands for each of them: without an interval."""
    kind = "mean"

    def ends(self, values: list) -> tuple:
        return (values[0],)


class Means(Column):
    kind = "mean"

    def ends(self, values: list) -> tuple:
        """The mean and its normal interval, which is not a number for a single value."""
        half = Z * math.sqrt(variance(values) / len(values)) if len(values) > 1 else math.nan
        return fmean(values), fmean(values) - half, fmean(values) + half


class Rates(Column):
    """Of values 0 and 1, in per cent."""
    kind = "rate"

    def ends(self, values: list) -> tuple:
        low, high = paired_rates(values) if self.paired else wilson(sum(values), len(values))
        return 100 * fmean(values), 100 * low, 100 * high


class Counts(Means):
    """Sums. The published tables have no interval with them: neither have we, but with a difference."""
    kind = "count"

    def ends(self, values: list) -> tuple:
        if not self.paired:
            return (sum(values),)
        return tuple(len(values) * end for end in super().ends(values))


class Variety(Column):
    """The effective number of kinds, of K counts for each picture; paired, of two times K, whose numbers are
    subtracted. Interval: the middle 95 % of draws of n pictures with replacement."""
    kind = "variety"

    def minus(self, other):
        both = {key: (self.values[key], other.values[key]) for key in self.values if key in other.values}
        return Variety(both, paired=True)

    def ends(self, values: list) -> tuple:
        sides = list(zip(*values)) if self.paired else [values]
        if not all(any(map(any, side)) for side in sides):
            return ()
        numbers, *base = map(effective_numbers, sides)
        if self.paired:
            numbers = numbers - base[0]
        low, high = numbers[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return numbers[0].item(), low, high


def wilson(k: float, n: int) -> tuple[float, float]:
    """95 % interval of a rate, p = k/n: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    p, shrink = k / n, 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / shrink
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_rates(differences: list) -> tuple[float, float]:
    """95 % interval of a difference of rates on the same pictures (Bonett and Price 2012): with p+ and p- the
    counts of +1 and -1, one added to each, over n + 2: p+ - p- ± z √((p+ + p- - (p+ - p-)²) / (n + 2))."""
    n = len(differences) + 2
    up, down = (sum(d > 0 for d in differences) + 1) / n, (sum(d < 0 for d in differences) + 1) / n
    half = Z * math.sqrt((up + down - (up - down) ** 2) / n)
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def effective_numbers(pictures: list):
    """exp of the entropy of the kinds' shares (Hill's number of order 1): of n pictures, each K counts, then
    of BOOTSTRAP draws of n of them, the same draws for any n pictures -> (1 + BOOTSTRAP,)."""
    counts = torch.tensor(pictures, dtype=torch.float64)                              # (n, K)
    draws = torch.randint(len(counts), (BOOTSTRAP, len(counts)), generator=torch.Generator().manual_seed(0))
    totals = torch.stack([counts.sum(0), *(counts[draw].sum(0) for draw in draws)])
    return Categorical(totals + 1e-12).entropy().exp()  # a draw may hold nothing but empty pictures


def macro_cell(cells: list[dict]) -> dict:
    """The unweighted mean of m columns, whose intervals' half widths add up as those of independent estimates
    do: low = mean - √(Σ (value_i - low_i)²) / m, and likewise high (MOVER, Zou and Donner 2008)."""
    cells = [c for c in cells if c["n"]]
    mean, m = fmean(c["value"] for c in cells), len(cells)
    down, up = (math.sqrt(sum((c["value"] - c[end]) ** 2 for c in cells)) / m for end in ("low", "high"))
    return {"value": mean, "low": mean - down, "high": mean + up, "n": sum(c["n"] for c in cells)}


@dataclass
class Table:
    """One table of one model."""
    title: str
    note: str
    readings: dict   # protocol -> name -> column
    macro: str = ""  # the name of a last column, the mean of the others


def merge(models: dict[str, list[Table]], pair: tuple[str, str] | None, published: dict) -> list[dict]:
    """One JSON-ready table for each title: a line for every reading and model, and the paired difference.
    published: title -> rows of others, shown where they have a figure for each column."""
    merged = []
    for tables in zip(*models.values()):
        first, lines = tables[0], []
        for reading in first.readings:
            own = {model: table.readings[reading] for model, table in zip(models, tables)}
            if pair:
                ours, base = (own[model] for model in pair)
                own[f"{pair[0]} minus {pair[1]}, paired"] = {c: ours[c].minus(base[c]) for c in ours}
            for model, columns in own.items():
                cells = {name: column.interval() for name, column in columns.items()}
                if first.macro:
                    cells[first.macro] = macro_cell(list(cells.values()))
                lines.append({"model": model, "reading": reading, "cells": cells})
            if pair:
                lines[-1]["difference"] = True
        others = published.get(first.title, {}).items()
        shown = [{"model": model, "values": v} for model, v in others if len(v) == len(lines[0]["cells"])]
        note = f"{first.note} {published.get('remark', '')}".strip() if shown else first.note
        merged.append({"title": first.title, "kind": next(iter(columns.values())).kind, "note": note,
                       "rows": lines, "published": shown})
    return merged
