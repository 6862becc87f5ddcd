"""Every table and figure of docs/shapes.md from one command, which goes on where it was stopped.

    python -m shapes.study                                     # all that is missing, then tables and figures
    python -m shapes.study --list                              # the variants, their work, what is missing
    python -m shapes.study --variants default paper --seeds 0  # some of it
    python -m shapes.study --tables                            # tables and figures from docs/study.json alone

A variant is shapes.train with some flags changed; each of its seeds is a run in runs/study/VARIANT/seed-N,
trained and measured by the real command lines. Work is counted in default rollouts: a variant whose rollouts
cost the UNet less does more of them. The reports become docs/study.json, and that the tables between the
markers <!-- study: NAME --> and <!-- end --> of the documents, and the figures (which need matplotlib).
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

import numpy as np

from plumbing import output, stop
from shapes import WEIGHTS
from shapes.train import parse

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SEEDS, IMAGES, CELL_IMAGES = (0, 1, 2), 500, 80  # pictures for each kind of prompt: of a table, of a cell
WORLD = "runs/study/world-1"                       # the networks of another seed
PAPER = ("--alpha 0.5 --steer all --skip-last 1 --updates 16 --kl 0 --kl-benign 0 --divisor group "
         "--decay-epochs 0 --ema 0")
VARIANTS = {  # name: flags, and the work after which it is measured
    "default": ("", (16, 60, 90)),
    "paper": (PAPER, (16, 60)),
    # the KL weight with which the following change one thing more
    "more-kl": ("--kl 0.04", (16, 60)),
    "alpha-0": ("--kl 0.04 --alpha 0", (16,)),
    "alpha-0.25": ("--kl 0.04 --alpha 0.25", (16,)),
    "alpha-0.5": ("--kl 0.04 --alpha 0.5", (16,)),
    "alpha-2": ("--kl 0.04 --alpha 2", (16,)),
    "raw": ("--kl 0.04 --direction raw", (16,)),
    "steer-all": ("--kl 0.04 --steer all", (16,)),
    "compact": ("--kl 0.04 --anchors shapes/anchors_compact.txt", (16,)),
    "no-safe-anchors": ("--kl 0.04 --anchors shapes/anchors_negative.txt", (16,)),
    "divisor-group": ("--kl 0.04 --divisor group", (16,)),
    "one-kl": ("--kl 0.04 --kl-benign 0.04", (16,)),
    "world-1": (f"--model {WORLD} --clip {WORLD}/text_encoder", (60,))}
BASES = {"base": os.path.relpath(WEIGHTS, ROOT), "base-world-1": WORLD}
GUIDANCES = (2.75, 7.5)
SAMPLERS = {"DDIM, eta 1, 12 steps": "--sampler ddim --eta 1 --steps 12",
            "DDIM, eta 0, 50 steps": "--sampler ddim --eta 0 --steps 50",
            "PNDM, 50 steps": "--sampler pndm --steps 50", "DPM++, 20 steps": "--sampler dpm++ --steps 20",
            "Euler, 20 steps": "--sampler euler --steps 20",
            "Euler ancestral, 20 steps": "--sampler euler-a --steps 20"}
SAMPLED = {("base", 0), ("default", 60), ("more-kl", 60)}  # variant and work that are drawn with them
UNSAFE, ACCURACY = "Unsafe pictures, %", "Compositional accuracy, %"
MEASURES = {  # name in study.json: a report's table and column
    "trained": (UNSAFE, "harm, trained on"), "held out": (UNSAFE, "harm, held out"),
    "explicit": (UNSAFE, "explicit"), "calm and benign": (UNSAFE, "calm and benign"),
    "accuracy": (ACCURACY, "mean of six"),
    **{name: (ACCURACY, name) for name in ("single_object", "two_object", "counting", "colors", "position",
                                           "color_attr")},
    **{f"variety, {name}": ("Variety, effective number of colours", name)
       for name in ("single objects", "pairs", "both")}}
CURVES = {"exact_unsafe": "unsafe pictures of unsafe prompts, %",
          "exact_correct": "right pictures of benign prompts, %",
          "exact_variety": "colours on captions that name none"}
WINDOW = 5  # rollouts of a curve's running mean; one has 16 unsafe and 48 benign pictures


# -------------------------------------------------------------------------------- runs

def calls(args) -> int:
    """UNet evaluations of one rollout and its updates: guidance makes two of each, a backward pass counts as
    two, and the base's mean for the KL as one."""
    images = args.prompts_per_rollout * args.group
    trained = max(1, round((args.steps - args.skip_last) * args.timestep_fraction))
    return 2 * images * (args.steps + trained * (4 if args.kl or args.kl_benign else 3))


def rollouts(flags: str, work: int) -> int:
    """How many rollouts cost what `work` of the default do."""
    return round(work * calls(parse([])) / calls(parse(flags.split())))


def reports(variant: str):
    """What is measured of a run: (work, rollouts, cell, flags of evaluate.py), in order; a cell is a sampler
    and its guidance, or None."""
    flags, works = VARIANTS.get(variant, ("", (0,)))
    for work in works:
        yield work, rollouts(flags, work), None, ["--images", str(IMAGES)]
        if (variant, work) in SAMPLED:
            for name, words in SAMPLERS.items():
                for guidance in GUIDANCES:
                    yield work, rollouts(flags, work), [name, guidance], [
                        "--images", str(CELL_IMAGES), "--guidance", str(guidance), *words.split()]


def report_file(folder: Path, count: int, cell) -> Path:
    name = f"report-{count:03d}" + (f"-{cell[0]}-{cell[1]}" if cell else "")
    return folder / re.sub(r"[^\w.+-]+", "-", name) / "report.json"


def run(variant: str, seed: int, args):
    """Train and measure all that is missing of one run."""
    folder = args.out / variant / f"seed-{seed}"
    for _, count, cell, words in reports(variant):
        report = report_file(folder, count, cell)
        if report.is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        model, metrics = BASES.get(variant, folder / "run" / "final"), folder / "run" / "metrics.jsonl"
        if metrics.is_file() and len(metrics.read_text(encoding="utf-8").splitlines()) > count:
            raise ValueError(f"{report} is missing and its run has gone on: remove {folder}")
        if variant not in BASES and cell is None:  # the cells of a stage come after its main report
            resume = ["--resume"] if (folder / "run" / "flags.json").is_file() else []
            started(folder, args, "shapes.train", *VARIANTS[variant][0].split(), "--seed", seed, "--epochs",
                    count, "--out", folder / "run", *resume)
        started(folder, args, "evaluate", "--model", model, "--suite", "shapes", *words,
                "--out", report.parent)
        print(f"{variant}, seed {seed}: {report.parent.name}", flush=True)


def started(folder: Path, args, module: str, *words):
    """Run a program to its end, its output in the run's log. Raises ValueError where it fails."""
    command = [sys.executable, "-m", module, *map(str, words)]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": threads})
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}: see {folder / 'log.txt'}")


# -------------------------------------------------------------------------------- what was measured

def entry_of(variant: str, seed: int, args, work: int, count: int, cell) -> dict | None:
    """A report as a line of study.json; None where there is none yet."""
    folder = args.out / variant / f"seed-{seed}"
    path = report_file(folder, count, cell)
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    cells = {table["title"]: table["rows"][0]["cells"] for table in report["tables"]}
    figures = {name: [round(cells[title][column][key], 3) for key in ("value", "low", "high")]
               for name, (title, column) in MEASURES.items()}
    entry = dict(variant=variant, seed=seed, work=work, rollouts=count, cell=cell,
                 flags=VARIANTS.get(variant, ("",))[0], commit=report["provenance"]["commit"],
                 sha256=hashlib.sha256(path.read_bytes()).hexdigest(), figures=figures)
    if cell is None and variant in VARIANTS and work == VARIANTS[variant][1][-1]:
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        read = [json.loads(line) for line in lines[:count]]
        entry["curves"] = {name: [line[name] if line[name] is None else round(line[name], 3) for line in read]
                           for name in CURVES}
    return entry


def key_of(entry: dict) -> tuple:
    return entry["variant"], entry["seed"], entry["work"], str(entry["cell"])


def collect(args) -> list[dict]:
    """docs/study.json with the reports that lie in --out, which replace older ones, one entry a line."""
    file = args.docs / "study.json"
    known = {key_of(e): e for e in json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}
    for variant in (*BASES, *VARIANTS):
        for seed in SEEDS:
            for work, count, cell, _ in reports(variant):
                if entry := entry_of(variant, seed, args, work, count, cell):
                    known[key_of(entry)] = entry
    entries = [known[key] for key in sorted(known)]
    file.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
    return entries


# -------------------------------------------------------------------------------- tables

def shown(entries: list, measure: str, variant: str, work: int, cell=None) -> str:
    """A cell: the mean of the seeds and their range, or of a base its value and interval."""
    found = [e["figures"][measure] for e in entries
             if (e["variant"], e["work"], e["cell"]) == (variant, work, cell)]
    if not found:
        return "-"
    style = ".2f" if "variety" in measure else ".1f"
    values = [value for value, _, _ in found]
    if variant in BASES:
        return f"{values[0]:{style}} [{found[0][1]:{style}}, {found[0][2]:{style}}]"
    spread = f" ({min(values):{style}} to {max(values):{style}})" if len(values) > 1 else ""
    return f"{fmean(values):{style}}" + spread


def table(head: list, rows: list) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


ROWS = {"trained": "unsafe, harm words trained on", "held out": "unsafe, harm words never trained on",
        "explicit": "unsafe, explicit prompts", "calm and benign": "unsafe, calm and benign prompts",
        "accuracy": "compositional accuracy, mean of six tasks",
        "variety, both": "colours (effective number) where the caption names none"}
TASKS = {"single_object": "single object", "two_object": "two objects", "counting": "counting",
         "colors": "colours", "position": "position", "color_attr": "colour attribution",
         "variety, single objects": "colours of single objects", "variety, pairs": "colours of pairs"}
SHORT = dict(zip(ROWS, ("harm, trained on", "never trained on", "explicit", "calm and benign", "accuracy",
                        "colours")))


def by_measure(entries: list, columns: dict, rows: dict) -> list[str]:
    """A row for each measure, a column for each (variant, work)."""
    return table(["%", *columns], [[label, *(shown(entries, name, *at) for at in columns.values())]
                                   for name, label in rows.items()])


def by_variant(entries: list, rows: list) -> list[str]:
    """A row for each (label, variant, work) of which there is a report, with how many seeds."""
    found = [(label, at, {e["seed"]: e["rollouts"] for e in entries if (e["variant"], e["work"]) == at})
             for label, *at in rows for at in [tuple(at)]]
    return table(["%", "rollouts", "seeds", *SHORT.values()],
                 [[label, str(max(seeds.values())), str(len(seeds)),
                   *(shown(entries, name, *at) for name in SHORT)] for label, at, seeds in found if seeds])


def by_sampler(entries: list) -> list[str]:
    """Base and default by sampler and guidance; of the default the mean of the seeds and their range."""
    names = ("trained", "held out", "explicit", "accuracy")
    head = ["%", "guidance", *(f"{SHORT[name]}, {who}" for name in names for who in ("base", "after"))]
    short = lambda text: text.split(" [")[0]  # a base's interval would take the width of two columns
    return table(head, [[sampler, f"{guidance:g}",
                         *(short(shown(entries, name, *at, [sampler, guidance])) for name in names
                           for at in (("base", 0), ("default", 60)))]
                        for sampler in SAMPLERS for guidance in GUIDANCES])


def tables(entries: list) -> dict[str, list[str]]:
    """{marker: the lines of its table}."""
    columns = {"base": ("base", 0), "after 60 rollouts, the default": ("default", 60)}
    paper = {"the paper's choices, equal work": ("paper", 60)}
    label = lambda name: f"`{VARIANTS[name][0]}`"
    return {
        "readme": by_measure(entries, columns | paper, ROWS),
        "main": by_measure(entries, columns | {"after 90": ("default", 90)} | paper, ROWS | TASKS),
        "samplers": by_sampler(entries),
        "work": by_variant(entries, [("the default", "default", 16), ("the paper's choices", "paper", 16),
                                     ("the default", "default", 60), ("the paper's choices", "paper", 60)]),
        "changes": by_variant(entries, [("base", "base", 0), ("the default", "default", 16),
                                        *((label(name), name, 16) for name in VARIANTS
                                          if name not in ("default", "paper", "world-1"))]),
        "world": by_measure(entries, {
            "base, seed 0": ("base", 0), "after 60": ("default", 60),
            "base, seed 1": ("base-world-1", 0), "after 60 ": ("world-1", 60)}, ROWS)}


def write_tables(entries: list, files: list[Path]):
    """Put each table between its markers."""
    made = tables(entries)
    for file in files:
        text = file.read_text(encoding="utf-8")
        for name, lines in made.items():
            text = re.sub(rf"(<!-- study: {name} -->\n).*?(<!-- end -->)",
                          lambda m, lines=lines: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.DOTALL)
        file.write_text(text, encoding="utf-8")


# -------------------------------------------------------------------------------- figures

def smooth(values: list):
    """Running mean over WINDOW rollouts of those that have a value; (rollouts, means)."""
    values = np.array([np.nan if value is None else value for value in values], dtype=float)
    width = min(WINDOW, len(values))
    at = np.arange(width, len(values) + 1)
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    some = ~np.isnan(windows).all(1)
    return at[some], np.nanmean(windows[some], axis=1)


def draw_figure(entries: list, docs: Path):
    """curves.png: the default and the paper's choices by the work of the UNet."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("note: no figure: drawing needs the package matplotlib: pip install matplotlib")
        return
    lines = {"default": ("tab:blue", "the default"), "paper": ("tab:orange", "the paper's choices")}
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items()):
        for entry in entries:
            if "curves" in entry and entry["variant"] in lines:
                color, label = lines[entry["variant"]]
                at, means = smooth(entry["curves"][name])
                axis.plot(at * entry["work"] / entry["rollouts"], means * (1 if "variety" in name else 100),
                          color=color, alpha=0.8, label=None if entry["seed"] else label)
        axis.set(title=title, xlabel="work, in default rollouts",
                 ylim=(1, 5.1) if "variety" in name else (0, 100))
        axis.grid(alpha=0.3)
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.axes[0].legend(loc="upper right")
    figure.savefig(docs / "curves.png", dpi=110)


# -------------------------------------------------------------------------------- the script

def list_variants(args):
    """Print each variant's rollouts and their work in default ones, of one seed, and its missing reports."""
    one = calls(parse([]))
    print(f"{'variant':17} {'rollouts':>9} {'work':>6} {'missing':>8}  flags")
    for variant in (*BASES, *VARIANTS):
        flags, works = VARIANTS.get(variant, ("", (0,)))
        wanted = [report_file(args.out / variant / f"seed-{seed}", count, cell)
                  for seed in seeds_of(variant, args) for _, count, cell, _ in reports(variant)]
        missing = sum(not file.is_file() for file in wanted)
        count = rollouts(flags, works[-1])
        print(f"{variant:17} {count:9} {count * calls(parse(flags.split())) / one:6.1f} "
              f"{missing:3} of {len(wanted):<3}  {flags}")


def seeds_of(variant: str, args) -> tuple:
    return (0,) if variant in BASES else args.seeds


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=(*BASES, *VARIANTS), metavar="NAME",
                        default=(*BASES, *VARIANTS), help=f"from {', '.join((*BASES, *VARIANTS))}")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; they share the cores")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where study.json and the figures go")
    parser.add_argument("--list", action="store_true", help="only say what there is to do")
    parser.add_argument("--tables", action="store_true", help="only write tables and figures")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.list:
        return list_variants(args)
    if args.jobs < 1:
        raise ValueError("--jobs must be at least 1")
    print(output.heading(args.out))
    if not args.tables:
        built = (ROOT / WORLD / "model_index.json").is_file()
        if not built and any("world-1" in name for name in args.variants):
            (ROOT / WORLD).mkdir(parents=True, exist_ok=True)
            started(ROOT / WORLD, argparse.Namespace(jobs=1), "shapes.build", "--seed", 1, "--out", WORLD)
        # one seed of every variant before the next: a study that is stopped early compares all of them
        tasks = [(variant, seed) for seed in SEEDS for variant in args.variants
                 if seed in seeds_of(variant, args)]
        with ThreadPoolExecutor(args.jobs) as pool:
            for done in as_completed([pool.submit(run, *task, args) for task in tasks]):
                if done.exception():  # what runs now is ended first, and nothing more begun
                    print(f"stopping: {done.exception()}", flush=True)
                    pool.shutdown(cancel_futures=True)
                    done.result()
    entries = collect(args)
    write_tables(entries, [args.docs / "shapes.md", args.docs.parent / "README.md"])
    draw_figure(entries, args.docs)
    grid = args.out / "default" / "seed-0" / "run" / "pictures-000060.png"
    if grid.is_file():
        shutil.copy(grid, args.docs / "grid.png")


if __name__ == "__main__":
    stop.run_script("shapes.study", main)
