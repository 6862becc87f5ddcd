"""report.md, report.json, bars_*.png and grid.png. No times: a resumed run writes the same bytes."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluation.rows import Row
from plumbing.pictures import blur, save_grid

GRID = 15  # pictures of each model in the grid


def text_of(cell: dict, kind: str, difference: bool = False) -> str:
    """"18.1 [17.0, 19.2]"; counts without decimals, signs on differences."""
    if cell["value"] is None:
        return "-"
    styles = {"rate": ".1f", "count": ".0f", "mean": ".4g", "variety": ".2f"}
    style = ("+" if difference else "") + styles[kind]
    shown = [format(cell[k], style) for k in ("value", "low", "high") if k in cell]
    return shown[0] + (f" [{shown[1]}, {shown[2]}]" if len(shown) == 3 and "nan" not in shown else "")


def markdown(merged: list[dict], head: list[str], provenance: dict) -> str:
    """The report: our rows first, published rows below and marked so, then where every figure comes from."""
    lines = [*head, ""]
    for table in merged:
        columns = table["rows"][0]["cells"]
        names = [c + (f" (n={v['n']})" if v["n"] is not None else "") for c, v in columns.items()]
        lines += [f"## {table['title']}", "", table["note"], ""]
        lines += ["| " + " | ".join(["model", "reading", *names]) + " |", "|" + " --- |" * (len(names) + 2)]
        for row in table["rows"]:
            cells = [text_of(c, table["kind"], row.get("difference", False)) for c in row["cells"].values()]
            lines.append("| " + " | ".join([row["model"], row["reading"], *cells]) + " |")
        for row in table["published"]:
            published = [f"*{row['model']}*", "*published*", *map(str, row["values"])]
            lines.append("| " + " | ".join(published) + " |")
        lines.append("")
    lines += ["## Provenance", "", "95 % intervals: Wilson for rates, Bonett-Price for paired differences of "
              "rates, bootstrap over pictures for variety, normal for the rest. Safety checker off.", ""]
    for key, value in provenance.items():
        lines.append(f"- {key}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join(lines) + "\n"


def bar_pictures(merged: list[dict], folder: Path):
    """bars_1.png ...: one bar picture for each table, with intervals and the published rows hatched below."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for number, table in enumerate(merged, 1):
        rows = [r for r in table["rows"] if not r.get("difference")]
        names = list(rows[0]["cells"])
        bars = [(f"{r['model']}, {r['reading']}", list(r["cells"].values()), "") for r in rows]
        for r in table["published"]:
            bars.append((f"{r['model']}, published", [{"value": v} for v in r["values"]], "//"))
        figure, axes = plt.subplots(figsize=(max(7, 1.3 * len(names)), 4.5))
        for i, (label, cells, hatch) in enumerate(bars):
            values = [c["value"] or 0 for c in cells]
            spread = [[abs(v - c.get(end, v)) for v, c in zip(values, cells)] for end in ("low", "high")]
            places = [x + 0.8 * (i + 0.5) / len(bars) - 0.4 for x in range(len(names))]
            axes.bar(places, values, 0.8 / len(bars), yerr=spread, error_kw={"lw": 0.6}, label=label,
                     hatch=hatch)
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axes.set_title(table["title"])
        axes.legend(fontsize=6)
        figure.tight_layout()
        figure.savefig(folder / f"bars_{number}.png", dpi=120)
        plt.close(figure)


def grid_rows(rows: list[Row]) -> list[Row]:
    """The first picture of each group, up to GRID, of the first row's size: the same at every start."""
    size = rows[0].width, rows[0].height
    first = {row.groups: row for row in reversed(rows) if (row.width, row.height) == size}
    return sorted(first.values(), key=lambda row: row.case)[:GRID]


def save_strips(strips: list, names: list, shown: list[Row], path: Path, hide: bool):
    """The models' pictures of the same rows below each other, blurred with `hide`, and reduced to 256 pixels.
    strips: len(names) * len(shown) pictures (1, 3, H, W)."""
    small = [F.avg_pool2d(picture, max(1, picture.shape[-1] // 256)) for picture in strips]
    labels = [" ".join((*row.groups, str(row.case))) for row in shown]
    save_grid(torch.cat([blur(p) if hide else p for p in small]), path, len(shown), names, labels)


def write(merged: list[dict], head: list[str], facts: dict, folder: Path):
    """report.md, which is printed, report.json and, with matplotlib, the bars."""
    text, whole = markdown(merged, head, facts), {"tables": merged, "provenance": facts}
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    try:
        bar_pictures(merged, folder)
    except ImportError:
        print("no bar pictures: matplotlib is not installed", file=sys.stderr)
    print(text)
