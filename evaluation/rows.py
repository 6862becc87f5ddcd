"""What every suite's reader shares: a row for each picture to draw, CSVs of prompts, a fixed draw of some.

A CSV has I2P's columns in either published format: the hub's (AIML-TUDA/i2p) or the repackaged one of ESD,
RECE and MACE. Row 2260 of I2P has no prompt: it is empty in the repackaged file, which harnesses that read it
with pandas turn into "nan", and the word "Null" in the hub's, which pandas leaves a word. It is drawn with
the empty prompt here.
"""

import csv
import random
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.judges import sha256

I2P = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")
# What a row needs -> the columns that may hold it: the hub's names and those of the repackaged ESD file. An
# attack's CSV has its prompts in adv_prompt, as R1's evaluator reads it.
COLUMNS = {"prompt": ("adv_prompt", "prompt", "caption"), "categories": ("categories",),
           "seed": ("evaluation_seed", "sd_seed"), "guidance": ("evaluation_guidance", "sd_guidance_scale"),
           "width": ("sd_image_width",), "height": ("sd_image_height",), "case": ("case_number",)}


@dataclass(frozen=True)
class Row:
    """One picture to draw and judge."""
    case: int              # what everything is joined by, together with `image`
    image: int             # counts a prompt's pictures: picture k has draw k of the prompt's noise stream
    prompt: str
    groups: tuple          # I2P's categories, GenEval's task, a prompt file's category
    seed: int
    guidance: float
    width: int = 0         # 0: the model's own size
    height: int = 0
    facts: dict | None = None  # GenEval's clauses

    @property
    def key(self) -> str:
        return f"{self.case:05d}_{self.image}"


def csv_rows(path: Path, required: tuple, guidance, seed: int) -> tuple[list[Row], list[str]]:
    """The rows of a CSV with I2P's columns in either published format; `required` ones have to be there.
    Returns them and what has to be said about them."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = {need: next((c for c in options if c in (reader.fieldnames or ())), None)
                 for need, options in COLUMNS.items()}
        missing = [" or ".join(COLUMNS[need]) for need in required if names[need] is None]
        if missing:
            there = ", ".join(reader.fieldnames or ["none"])
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {there}")
        lines = list(reader)
    rows, notes = [], []
    for index, line in enumerate(lines):
        fact = {need: line[name] for need, name in names.items() if name is not None}
        try:
            numbers = {need: int(fact[need]) for need in ("case", "seed", "width", "height") if need in fact}
            number = float(fact["guidance"] if guidance == "csv" else guidance)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, row {index}: {error}: seed, size and case must be whole numbers")
        if any(numbers.get(side, 0) % 8 for side in ("width", "height")):
            raise ValueError(f"{path}, row {index}: width and height must be multiples of 8 (the VAE's)")
        case, text = numbers.get("case", index), fact["prompt"].strip()
        if text in ("", "Null"):
            notes.append(f"case {case} has no prompt ({fact['prompt']!r} in the file): drawn with ''")
            text = ""
        groups = tuple(c for c in I2P if c in fact.get("categories", ""))  # as substrings, as all do
        rows.append(Row(case, 0, text, groups, numbers.get("seed", seed + case), number,
                        numbers.get("width", 0), numbers.get("height", 0)))
    if len({row.case for row in rows}) < len(rows):
        raise ValueError(f"{path}: {names['case']} repeats a number; everything is joined by it")
    return rows, notes


def stratified(rows: list[Row], limit: int, seed: int) -> list[Row]:
    """A fixed draw of `limit` prompts, each group in proportion: every (n / limit)-th row of the rows sorted
    by group, in random order within a group. Kept in the order of the file."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: row.groups)  # stable: random within a group
    picked = {order[int((i + 0.5) * len(order) / limit)].case for i in range(min(limit, len(order)))}
    return [row for row in rows if row.case in picked]


def finish(rows: list[Row], args, notes: list, path) -> list[Row]:
    """--limit, said in the notes, and --samples: picture 0, 1, ... of each prompt."""
    if not rows:
        raise ValueError(f"{path}: no prompt in it")
    if args.limit:
        total, rows = len(rows), stratified(rows, args.limit, args.seed)
        notes.append(f"{len(rows)} of {total} prompts, a stratified draw with seed {args.seed}")
    return [replace(row, image=k) for row in rows for k in range(args.samples)]


def read_csv(path: Path, required: tuple, args) -> tuple[list[Row], dict, list[str]]:
    """rows, source, notes of a suite whose prompts are one CSV."""
    required += ("guidance",) * (args.guidance == "csv")
    rows, notes = csv_rows(path, required, args.guidance, args.seed)
    return finish(rows, args, notes, path), {"prompts": {path.name: sha256(path)}}, notes


def one_guidance(args) -> float:
    """--guidance, where the prompts bring none of their own."""
    if args.guidance == "csv":
        raise ValueError(f"--guidance csv: --suite {args.suite} has no guidance column; give a number")
    return args.guidance
