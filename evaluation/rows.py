"""What every suite's reader shares: a row for each picture to draw, CSVs of prompts, a fixed draw of some.

A CSV has I2P's columns in either published format: the hub's (AIML-TUDA/i2p) or the repackaged one of ESD,
RECE and MACE. Row 2260 of I2P has no prompt: it is empty in the repackaged file, which harnesses that read it
with pandas turn into "nan", and the word "Null" in the hub's, which pandas leaves a word. It is drawn with
the empty prompt here.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.judges import sha256
from plumbing import texts

I2P = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")
MOST, MOST_SIDE, MOST_GUIDANCE = 2**63 - 1, 8192, 1000.0   # seeds and cases, pixels, guidance (I2P's: 255)


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


def table_rows(path, lines: list, required: tuple, guidance, seed: int, first: int):
    """The rows of a table with I2P's columns in either published format; `required` ones have to be there.
    Cases are counted from `first`. Returns them and what has to be said about them."""
    there = lines[0][1]
    missing = [" or ".join(texts.COLUMNS[need]) for need in required if texts.column(there, need) is None]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(there)}")
    rows, notes = [], []
    for index, (line, fields) in enumerate(lines):
        whole = {need: texts.number(path, line, fields, need, high=most) for need, most in (
            ("case", MOST), ("seed", MOST), ("width", MOST_SIDE), ("height", MOST_SIDE))}
        odd = [side for side in ("width", "height") if (whole[side] or 0) % 8]
        if odd:
            raise ValueError(f"{path}, line {line}: {odd[0]} {whole[odd[0]]} is no multiple of 8 (the VAE's)")
        scale = (texts.number(path, line, fields, "guidance", float, high=MOST_GUIDANCE)
                 if guidance == "csv" else float(guidance))
        case = first + (index if whole["case"] is None else whole["case"])
        text = fields[texts.column(fields, "prompt")].strip()
        if text in texts.NO_PROMPT:
            notes.append(f"case {case} has no prompt ({text!r} in the file): drawn with ''")
            text = ""
        name = texts.column(fields, "categories")
        groups = tuple(c for c in I2P if name and c in str(fields[name]))  # as substrings, as all do
        rows.append(Row(case, 0, text, groups, seed + case if whole["seed"] is None else whole["seed"], scale,
                        whole["width"] or 0, whole["height"] or 0))
    if len({row.case for row in rows}) < len(rows):
        raise ValueError(f"{path}: {texts.column(there, 'case')} repeats a number; all is joined by it")
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


def read_files(paths: list, required: tuple, args, plain=False) -> tuple[list[Row], dict, list[str]]:
    """rows, source, notes of a suite whose prompts are tables or, with `plain`, also plain lines: of all
    files that are given, each numbered on from the one before."""
    required += ("guidance",) * (args.guidance == "csv")
    rows, notes = [], []
    for path in map(Path, paths):
        first, lines = max((row.case for row in rows), default=-1) + 1, texts.read_table(path)
        if lines is not None:
            more, said = table_rows(path, lines, required, args.guidance, args.seed, first)
            rows, notes = rows + more, notes + said
        elif plain:
            guidance = one_guidance(args)
            rows += [Row(case, 0, p.text, (p.category,) if p.category else (), args.seed + case, guidance)
                     for case, p in enumerate(texts.read_prompts([path]), first)]
        else:
            raise ValueError(f"{path}: lines of plain text; this suite needs a CSV or JSONL with its columns "
                             + ", ".join(" or ".join(texts.COLUMNS[need]) for need in required))
    alone = len(paths) == 1 and lines is not None
    source = {Path(path).name if alone else str(path): sha256(path) for path in paths}
    return finish(rows, args, notes, paths[0]), {"prompts": source}, notes


def one_guidance(args) -> float:
    """--guidance, where the prompts bring none of their own."""
    if args.guidance == "csv":
        raise ValueError(f"--guidance csv: --suite {args.suite} has no guidance column; give a number")
    return args.guidance
