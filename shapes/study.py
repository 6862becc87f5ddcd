"""Every table and figure of docs/shapes.md from one command, which goes on where it was stopped.

    python -m shapes.study                                     # all that is missing, then tables and figures
    python -m shapes.study --list                              # the reports that are missing
    python -m shapes.study --variants default paper --seeds 0  # some of it
    python -m shapes.study --tables                            # tables and figures from docs/study.json alone

study.toml says what is trained and measured. A variant is shapes.train with some flags changed; each of its
seeds is a run in runs/study/VARIANT/seed-N, by the real command lines. Their reports become docs/study.json;
figures, and tables between the documents' markers <!-- study: NAME --> and <!-- end -->, are made of that.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean

from plumbing import log, stop
from plumbing.run import read_lines, write_text
from views.plot import save_figure

ROOT = Path(__file__).parent.parent
PLAN = tomllib.loads((ROOT / "shapes" / "study.toml").read_text(encoding="utf-8"))
SEEDS, VARIANTS, BASES, MEASURES = (PLAN[name] for name in ("seeds", "variants", "bases", "measures"))
SHORT = {name: short for name, (*_, short) in MEASURES.items() if short}
CELLS = [[sampler, guidance] for sampler in PLAN["samplers"] for guidance in PLAN["guidances"]]
# Calls of the UNet that a picture of a rollout costs, guidance aside: 12 steps, and for each transition that
# is trained a forward and a backward pass, which counts as two, and the base's call for the KL.
DEFAULT_CALLS = 12 + 10 * (1 + 2 + 1)
PAPER_CALLS = 12 + 11 * (1 + 2)  # --skip-last 1, no KL
WINDOW = 5  # rollouts of a curve's running mean; one has 16 unsafe and 48 benign pictures


# -------------------------------------------------------------------------------- training and measuring

def reports(variants, seeds) -> list[tuple]:
    """(variant, seed, work, cell) of each report in the order in which they are made. A cell is a sampler and
    its guidance, or None for the training's own. A base has one seed, 0."""
    found = []
    for seed in seeds:
        for variant in variants:
            for work in VARIANTS[variant][1] if seed == 0 or variant not in BASES else ():
                cells = CELLS if [variant, work] in PLAN["sampled"] else []
                found += [(variant, seed, work, cell) for cell in (None, *cells)]
    return found


def rollouts(variant: str, work: int) -> int:
    """How many rollouts cost the UNet what `work` of the default do."""
    return round(work * DEFAULT_CALLS / PAPER_CALLS) if variant == "paper" else work


def file_of(out: Path, variant: str, seed: int, work: int, cell) -> Path:
    name = f"report-{rollouts(variant, work):03d}" + (f"-{cell[0]}-{cell[1]}" if cell else "")
    return out / variant / f"seed-{seed}" / re.sub(r"[^\w.+-]+", "-", name) / "report.json"


def measure(out: Path, variant: str, seed: int, work: int, cell):
    """Make one report. The first one after each work trains the run up to there."""
    folder, report = out / variant / f"seed-{seed}", file_of(out, variant, seed, work, cell).parent
    run, count = folder / "run", rollouts(variant, work)
    if (run / "metrics.jsonl").is_file() and len(read_lines(run / "metrics.jsonl")) > count:
        raise ValueError(f"{report} is missing and its run has gone on: remove {folder}")
    if cell is None and variant not in BASES:
        resume = ["--resume"] if (run / "flags.json").is_file() else []
        start(folder, "shapes.train", *VARIANTS[variant][0].split(), "--seed", seed, "--epochs", count,
              "--out", run, *resume)
    words = ["--images", PLAN["images"]]
    if cell:
        sampler, guidance = cell
        words = ["--images", PLAN["cell_images"], "--guidance", guidance, *PLAN["samplers"][sampler].split()]
    start(folder, "evaluate", "--model", BASES.get(variant, run / "final"), "--suite", "shapes", *words,
          "--out", report)
    print(f"{variant}, seed {seed}: {report.name}", flush=True)


def start(folder: Path, module: str, *words):
    """Run a program to its end, its output in folder/log.txt. Raises ValueError where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *map(str, words)]
    with open(folder / "log.txt", "a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}: see {folder / 'log.txt'}")


def entry_of(out: Path, variant: str, seed: int, work: int, cell) -> dict:
    """A report as a line of study.json."""
    file, count = file_of(out, variant, seed, work, cell), rollouts(variant, work)
    report = json.loads(file.read_text(encoding="utf-8"))
    cells = {table["title"]: table["rows"][0]["cells"] for table in report["tables"]}
    figures = {name: [round(cells[title][column][key], 3) for key in ("value", "low", "high")]
               for name, (title, column, *_) in MEASURES.items()}
    flags, works = VARIANTS[variant]
    entry = dict(variant=variant, seed=seed, work=work, rollouts=count, cell=cell, flags=flags,
                 commit=report["provenance"]["commit"], figures=figures)
    if cell is None and work == works[-1] and variant not in BASES:
        lines = read_lines(out / variant / f"seed-{seed}" / "run" / "metrics.jsonl")[:count]
        entry["curves"] = {name: [line[name] and round(line[name], 3) for line in lines]
                           for name in PLAN["curves"]}
    return entry


def collect(out: Path, file: Path) -> list[dict]:
    """study.json with the reports that lie in `out`, which replace older ones, one entry a line."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    made = [entry_of(out, *key) for key in reports(VARIANTS, SEEDS) if file_of(out, *key).is_file()]
    newest = {(e["variant"], e["seed"], e["work"], str(e["cell"])): e for e in known + made}
    entries = [newest[key] for key in sorted(newest)]
    write_text(file, "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    return entries


# -------------------------------------------------------------------------------- tables and figure

def shown(entries: list, name: str, variant: str, work: int, cell=None) -> str:
    """One measure: the mean of the seeds and their range, or of a base its value and interval."""
    found = [e["figures"][name] for e in entries
             if (e["variant"], e["work"], e["cell"]) == (variant, work, cell)]
    if not found:
        return "-"
    style = ".2f" if "variety" in name else ".1f"
    if variant in BASES:
        value, low, high = found[0]
        return f"{value:{style}} [{low:{style}}, {high:{style}}]"
    values = [value for value, _, _ in found]
    spread = f" ({min(values):{style}} to {max(values):{style}})" if len(values) > 1 else ""
    return f"{fmean(values):{style}}{spread}"


def table(head: list, rows: list) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *rows))


def by_measure(entries: list, columns: list, names) -> str:
    """A row for each measure, a column for each (label, variant, work)."""
    rows = [[MEASURES[name][2], *(shown(entries, name, *at) for _, *at in columns)] for name in names]
    return table(["%", *(label for label, *_ in columns)], rows)


def by_variant(entries: list, variants: list) -> str:
    """A row for each (label, variant, work), with its rollouts and the number of its seeds."""
    rows = []
    for label, variant, work in variants:
        seeds = {e["seed"] for e in entries if (e["variant"], e["work"]) == (variant, work)}
        figures = [shown(entries, name, variant, work) for name in SHORT]
        rows.append([label, str(rollouts(variant, work)), str(len(seeds)), *figures])
    return table(["%", "rollouts", "seeds", *SHORT.values()], rows)


def by_sampler(entries: list) -> str:
    """A row for each cell, columns for the base, without its interval, and for the default."""
    head, rows = ["%", "guidance"], [[sampler, f"{guidance:g}"] for sampler, guidance in CELLS]
    for name in ("trained", "held out", "explicit", "accuracy"):
        head += [f"{SHORT[name]}, base", f"{SHORT[name]}, after"]
        for row, cell in zip(rows, CELLS):
            base = shown(entries, name, "base", 0, cell).split(" [")[0]
            row += [base, shown(entries, name, "default", 60, cell)]
    return table(head, rows)


def tables(entries: list) -> dict[str, str]:
    """{marker: its table}."""
    changed = [[f"`{flags}`", name, 16] for name, (flags, _) in VARIANTS.items()
               if flags.startswith("--kl 0.04")]
    made = {name: by_measure(entries, columns, MEASURES if name == "main" else SHORT)
            for name, columns in PLAN["columns"].items()}
    return made | {"samplers": by_sampler(entries), "work": by_variant(entries, PLAN["rows"]["work"]),
                   "changes": by_variant(entries, PLAN["rows"]["changes"] + changed)}


def write_tables(entries: list, file: Path):
    """Put each table between its markers."""
    text, made = file.read_text(encoding="utf-8"), tables(entries)
    marked = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    write_text(file, marked.sub(lambda found: found[1] + made[found[2]] + found[3], text))


def smooth(values: list) -> dict:
    """Running mean over WINDOW rollouts of those that have a value: {rollouts: mean}."""
    ends = range(WINDOW, len(values) + 1)
    windows = {end: [value for value in values[end - WINDOW:end] if value is not None] for end in ends}
    return {end: sum(window) / len(window) for end, window in windows.items() if window}


def draw_curves(figure, entries: list):
    """The default and the released code's choices by the work of the UNet, a panel for each figure."""
    lines = {"default": ("tab:blue", "the default"), "paper": ("tab:orange", "the released code's choices")}
    panels = figure.subplots(1, len(PLAN["curves"]))
    for panel, (name, title) in zip(panels, PLAN["curves"].items()):
        scale, limits = (1, (1, 5.1)) if name == "exact_variety" else (100, (0, 100))
        for entry in entries:
            if entry["variant"] in lines and "curves" in entry:
                color, label = lines[entry["variant"]]
                means = smooth(entry["curves"][name])
                panel.plot([end * entry["work"] / entry["rollouts"] for end in means],
                           [scale * mean for mean in means.values()],
                           color=color, alpha=0.8, label=None if entry["seed"] else label)
        panel.set(title=title, xlabel="work, in default rollouts", ylim=limits)
        panel.grid(alpha=0.3)
    if panels[0].lines:
        panels[0].legend(loc="upper right")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--variants", nargs="+", choices=[*VARIANTS], metavar="NAME", default=[*VARIANTS],
        help=f"from {', '.join(VARIANTS)}")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    add("--out", type=Path, default=ROOT / "runs" / "study")
    add("--docs", type=Path, default=ROOT / "docs", help="where study.json and the figures go")
    add("--list", action="store_true", help="only say what is missing")
    add("--tables", action="store_true", help="only write tables and figures")
    args = parser.parse_args(argv)
    missing = [key for key in reports(args.variants, args.seeds) if not file_of(args.out, *key).is_file()]
    if args.list:
        print(*(file_of(args.out, *key) for key in missing), f"{len(missing)} reports are missing", sep="\n")
        return
    print(log.heading(args.out))
    world = ROOT / BASES["base-world-1"]
    for variant, *rest in [] if args.tables else missing:
        if "world-1" in variant and not (world / "model_index.json").is_file():
            start(world, "shapes.build", "--seed", 1, "--out", world)
        measure(args.out, variant, *rest)
    entries = collect(args.out, args.docs / "study.json")
    for file in (args.docs / "shapes.md", args.docs.parent / "README.md"):
        write_tables(entries, file)
    save_figure(args.docs / "curves.png", lambda figure: draw_curves(figure, entries), (12, 3.4), dpi=110)
    grid = args.out / "default" / "seed-0" / "run" / "pictures-000060.png"
    if grid.is_file():
        shutil.copy(grid, args.docs / "grid.png")


if __name__ == "__main__":
    stop.run_script("shapes.study", main)
