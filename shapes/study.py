"""Every table of docs/shapes.md, and its curves, from one command, which goes on where it was stopped.

    python -m shapes.study                                     # all that is missing, then tables and curves
    python -m shapes.study --variants default paper --seeds 0  # some of it
    python -m shapes.study --tables                            # tables and curves from docs/study.json alone

study.toml says what is trained and measured. A variant is shapes.train with some flags changed; each of its
seeds is a run in runs/study/VARIANT/seed-N, by the real command lines. Their reports become docs/study.json;
curves, and tables between the documents' markers <!-- study: NAME --> and <!-- end -->, are made of that.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean

import numpy as np

from plumbing import log, stop
from plumbing.run import read_lines, write_text
from views import save_figure
from views.curves import running_mean

ROOT = Path(__file__).parent.parent
PLAN = tomllib.loads((ROOT / "shapes" / "study.toml").read_text(encoding="utf-8"))
VARIANTS, WORLDS, HIDDEN, MEASURES = (PLAN[name] for name in ("variants", "worlds", "hidden", "measures"))
SHORT = {name: short for name, (*_, short) in MEASURES.items() if short}
CELLS = [[sampler, guidance] for sampler in PLAN["samplers"] for guidance in PLAN["guidances"]]


# -------------------------------------------------------------------------------- training and measuring

def reports(variants, seeds=None) -> list[tuple]:
    """(variant, seed, cell) of each report. A cell is None for the training's own sampler; the first
    PLAN["cell_seeds"] seeds have others: a sampler and its guidance, or what PLAN["hidden"] names."""
    found = []
    for variant in variants:
        more = [*CELLS * (variant in PLAN["sampled"]), *(c for c in HIDDEN if variant in PLAN["attacked"][c])]
        for n, seed in enumerate(VARIANTS[variant]["seeds"]):
            cells = [None, *more] if n < PLAN["cell_seeds"] else [None]
            found += [(variant, seed, cell) for cell in cells if seeds is None or seed in seeds]
    return found


def file_of(out: Path, variant: str, seed: int, cell) -> Path:
    name, file = f"report-{cell[0]}-{cell[1]}" if cell else "report", "report"
    if isinstance(cell, str):
        name, file = cell, HIDDEN[cell].split()[0].rpartition(".")[2]
    return out / variant / f"seed-{seed}" / re.sub(r"[^\w.+-]+", "-", name) / f"{file}.json"


def measure(out: Path, variant: str, seed: int, cell):
    """Make one report. The first one of a seed trains the run, or goes on with it."""
    report, plan = file_of(out, variant, seed, cell).parent, VARIANTS[variant]
    folder, run = report.parent, report.parent / "run"
    model = plan.get("model", run / "final")
    if plan["rollouts"] and not model.is_dir():
        resume = ["--resume"] if (run / "flags.json").is_file() else []
        start(folder, "shapes.train", *plan["flags"].split(), "--seed", seed, "--epochs", plan["rollouts"],
              "--out", run, *resume)
    program = f"evaluate --suite shapes --images {PLAN['cell_images' if cell else 'images']}"
    if isinstance(cell, str):
        program = HIDDEN[cell]
    elif cell:
        program += f" --guidance {cell[1]} {PLAN['samplers'][cell[0]]}"
    part = report.with_name(report.name + ".part")
    start(folder, *program.split(), "--model", model, "--out", part)
    part.rename(report)  # whole or absent
    print(f"{variant}, seed {seed}: {report.name}", flush=True)


def start(folder: Path, module: str, *words):
    """Run a program to its end, its output in folder/log.txt. Raises ValueError where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *map(str, words)]
    with open(folder / "log.txt", "a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}: see {folder / 'log.txt'}")


def entry_of(out: Path, variant: str, seed: int, cell) -> dict:
    """A report as a line of study.json."""
    plan, file = VARIANTS[variant], file_of(out, variant, seed, cell)
    report = json.loads(file.read_text(encoding="utf-8"))
    entry = dict(variant=variant, seed=seed, cell=cell, flags=plan["flags"], rollouts=plan["rollouts"],
                 commit=report.get("provenance", report)["commit"], figures=figures_of(report))
    if cell is None and plan["rollouts"]:
        run = file.parent.parent / "run"
        lines = read_lines(run / "metrics.jsonl")
        for path in run.glob("pictures-*.json"):  # of the grids: prompt -> share of base and policy
            shown_then = json.loads(path.read_text(encoding="utf-8"))
            lines[int(path.stem[-6:]) - 1] |= {text: after for text, (_, after) in shown_then.items()}
        entry["curves"] = {name: [line.get(name) and round(line[name], 3) for line in lines]
                           for name in PLAN["curves"]}
    return entry


def figures_of(report: dict) -> dict:
    """{measure: value, low, high} of evaluate's; of the others {model: {row: {column: value}}}."""
    if "tables" in report:
        cells = {table["title"]: table["rows"][0]["cells"] for table in report["tables"]}
        return {name: [round(cells[title][column][key], 3) for key in ("value", "low", "high")]
                for name, (title, column, *_) in MEASURES.items()}
    if "curves" in report:  # of relearn
        return {model: {kind: {str(point["step"]): round(point["rates"][kind]["value"], 1) for point in curve}
                        for kind in curve[0]["rates"]} for model, curve in report["curves"].items()}
    return {model: {"captions without a colour": {kind: round(report[model][kind]["value"], 1)
                                                  for kind in ("plain", "words", "free")}}
            for model in ("base", "model")}


def collect(out: Path, file: Path) -> list[dict]:
    """study.json, an entry a line: new reports replace older ones; what study.toml has no more is dropped."""
    known, planned = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else [], reports(VARIANTS)
    known = [e for e in known if (e["variant"], e["seed"], e["cell"]) in planned]
    made = [entry_of(out, *key) for key in planned if file_of(out, *key).is_file()]
    newest = {(e["variant"], e["seed"], str(e["cell"])): e for e in known + made}
    entries = [newest[key] for key in sorted(newest)]
    write_text(file, "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    return entries


# -------------------------------------------------------------------------------- tables and curves

def shown(entries: list, name: str, variant: str, cell=None) -> str:
    """One measure: the mean of the seeds and their range, or of a base its value and interval."""
    found = [e["figures"][name] for e in entries if (e["variant"], e["cell"]) == (variant, cell)]
    if not found:
        return "-"
    style = ".2f" if "variety" in name else ".1f"
    if not VARIANTS[variant]["rollouts"]:
        value, low, high = found[0]
        return f"{value:{style}} [{low:{style}}, {high:{style}}]"
    return mean_and_range([value for value, _, _ in found], style)


def mean_and_range(values: list, style: str = ".1f") -> str:
    spread = f" ({min(values):{style}} to {max(values):{style}})" if max(values) > min(values) else ""
    return f"{fmean(values):{style}}{spread}"


def table(head: list, rows: list) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *rows))


def by_measure(entries: list, columns: list, names) -> str:
    """A row for each measure, a column for each (label, variant)."""
    rows = [[MEASURES[name][2], *(shown(entries, name, variant) for _, variant in columns)] for name in names]
    return table(["%", *(label for label, _ in columns)], rows)


def by_sampler(entries: list) -> str:
    """A row for each cell, columns for the base, without its interval, and for the default."""
    head, rows = ["%", "guidance"], [[sampler, f"{guidance:g}"] for sampler, guidance in CELLS]
    for name in PLAN["by_sampler"]:
        head += [f"{SHORT[name]}, base", f"{SHORT[name]}, after"]
        for row, cell in zip(rows, CELLS):
            row += [shown(entries, name, "base", cell).split(" [")[0], shown(entries, name, "default", cell)]
    return table(head, rows)


def by_input(entries: list, cell: str) -> str:
    """What is brought back: a row for each model and kind of prompt, a column for each step or attack. The
    base is the same beside every variant."""
    rows, head = [], ["%", ""]
    for variant in PLAN["attacked"][cell]:
        plan = VARIANTS[variant]
        label = f"`{plan['flags']}`" if plan["flags"] else f"after {plan['rollouts']} rollouts"
        found = [e["figures"] for e in entries if (e["variant"], e["cell"]) == (variant, cell)]
        for model in ("model",) if rows else ("base", "model"):
            for kind, cells in found[0][model].items() if found else [("-", ())]:
                head[2:] = head[2:] or cells
                rows.append([model if model == "base" else label, kind,
                             *(mean_and_range([one[model][kind][column] for one in found])
                               for column in cells)])
    return table(head, rows)


def tables(entries: list) -> dict[str, str]:
    """{marker: its table} of those whose every cell is measured."""
    made = {name: by_measure(entries, columns, MEASURES if name == "main" else SHORT)
            for name, columns in PLAN["columns"].items()}
    made |= {cell: by_input(entries, cell) for cell in HIDDEN} | {"samplers": by_sampler(entries)}
    return {name: text for name, text in made.items() if "| - |" not in text}


def draw_curves(figure, entries: list):
    """Some variants over a run of equal work, a panel for each figure."""
    panels, handles = figure.subplots(1, len(PLAN["curves"])), {}
    for panel, (name, (title, scale, *limits)) in zip(panels, PLAN["curves"].items()):
        for entry in entries:
            if entry["variant"] in PLAN["drawn"] and "curves" in entry:
                color, label = PLAN["drawn"][entry["variant"]]
                values = np.array(entry["curves"][name], float)  # None becomes NaN
                rollouts = np.linspace(0, 100, len(values) + 1)[1:]  # in % of the run
                [handles[label]] = panel.plot(rollouts, scale * running_mean(values), color=color, alpha=0.6)
        panel.set(title=title, xlabel="% of the run", ylim=limits)
        panel.grid(alpha=0.3)
    panels[0].legend(handles.values(), handles, loc="upper right")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", default=VARIANTS, help=", ".join(VARIANTS))
    add("--seeds", nargs="+", type=int, help="of those that study.toml gives a variant; default: all")
    add("--out", type=Path, default=ROOT / "runs" / "study")
    add("--docs", type=Path, default=ROOT / "docs", help="where study.json and the curves go")
    add("--tables", action="store_true", help="only write tables and curves")
    args = parser.parse_args(argv)
    missing = [key for key in reports(args.variants, args.seeds) if not file_of(args.out, *key).is_file()]
    print(log.heading(args.out), f"{len(missing)} reports are missing", sep="\n")
    for variant, *rest in [] if args.tables else missing:
        folder, seed = WORLDS.get(variant, ("shapes/weights", 0))
        if not (ROOT / folder / "model_index.json").is_file():
            start(ROOT / folder, "shapes.build", "--seed", seed, "--out", folder)
        measure(args.out, variant, *rest)
    entries = collect(args.out, args.docs / "study.json")
    for file in (args.docs / "shapes.md", args.docs.parent / "README.md"):
        text = file.read_text(encoding="utf-8")
        for name, content in tables(entries).items():
            text = re.sub(rf"(<!-- study: {name} -->\n).*?(<!-- end -->)",
                          lambda found: found[1] + content + found[2], text, flags=re.DOTALL)
        write_text(file, text)
    save_figure(args.docs / "curves.png", lambda figure: draw_curves(figure, entries), (16, 3.4), dpi=110)


if __name__ == "__main__":
    stop.run_script("shapes.study", main)
