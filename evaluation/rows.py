"""What every suite's reader shares: a row for each picture to draw, and a fixed part of the prompts.

A table has I2P's columns in either published format: the hub's (AIML-TUDA/i2p) or the repackaged one of ESD,
RECE and MACE. A row without a seed of its own has --seed plus its case: no two share their noise.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from plumbing.prompts import COLUMNS, Record, column, number, read_records


@dataclass(frozen=True)
class Row:
    """One picture to draw and judge."""
    case: int              # what everything is joined by, together with `image`
    image: int             # counts a prompt's pictures: picture k has draw k of the prompt's noise stream
    prompt: str
    groups: tuple          # the prompt's categories, or GenEval's task
    seed: int
    guidance: float
    width: int = 0         # 0: the model's own size
    height: int = 0
    facts: dict | None = None  # GenEval's clauses

    @property
    def key(self) -> str:
        return f"{self.case:05d}_{self.image}"


def read_files(paths: list, needs: tuple, args) -> tuple[list[Row], dict, list[str]]:
    """A row for each prompt of these files, each numbered on from the one before; {path: sha256}; notes.
    needs: which of COLUMNS a table has to have; where there are none, plain lines will do, too."""
    needs += ("guidance",) * (args.guidance == "csv")
    rows, source = [], {}
    if len({Path(path).stem for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))}: two of one name, by which they would be told apart")
    for path in paths:
        records, source[str(path)] = read_records(path)
        first = max((row.case for row in rows), default=-1) + 1
        rows += [to_row(path, record, first, index, needs, args) for index, record in enumerate(records)]
        if len({row.case for row in rows}) < len(rows):
            raise ValueError(f"{path}: case_number repeats a number; all is joined by it")
    if not rows:
        raise ValueError(f"{paths[0]}: no prompt in it")
    return rows, source, [f"case {row.case} has no prompt: drawn with ''" for row in rows if not row.prompt]


def to_row(path, record: Record, first: int, index: int, needs: tuple, args) -> Row:
    """A record's row. Its case is `first`, that of its file, and its own number, or else its index there."""
    missing = [" or ".join(COLUMNS[need]) for need in needs if column(record.fields, need) is None]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(record.fields)}")
    own, seed = number(path, record, "case"), number(path, record, "seed")
    case = first + (index if own is None else own)
    guidance = args.guidance
    if guidance == "csv":
        guidance = number(path, record, "guidance", float, high=1000)  # I2P's: 255
    sides = {side: number(path, record, side, high=8192) or 0 for side in ("width", "height")}
    if any(pixels % 8 for pixels in sides.values()):
        raise ValueError(f"{path}, line {record.line}: a side of {sides} is no multiple of 8 (the VAE's)")
    groups = record.categories or (Path(path).stem,) * (len(args.prompts or ()) > 1)  # as of an attack
    return Row(case, 0, record.text, tuple(dict.fromkeys(groups)),
               args.seed + case if seed is None else seed, guidance, **sides)


def finish(rows: list[Row], args, notes: list) -> list[Row]:
    """--limit: every (n / limit)-th row of those sorted by group. --samples: that many pictures of each."""
    n, limit = len(rows), args.limit
    if limit and limit < n:
        order = sorted(range(n), key=lambda i: rows[i].groups)
        rows = [rows[i] for i in sorted(order[int((k + 0.5) * n / limit)] for k in range(limit))]
        notes.append(f"{limit} of {n} prompts, spread evenly over the groups")
    return [replace(row, image=k) for row in rows for k in range(args.samples)]
