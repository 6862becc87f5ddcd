"""Prompts of one's own: .txt files by category, as train.py reads them, or any CSV, such as an attack's.
Sampled as RECE's and the paper's generate_images.py sample an attack's prompts."""

from pathlib import Path

from evaluation.judges import sha256
from evaluation.rows import Row, finish, one_guidance, table_rows
from evaluation.statistics import Table
from evaluation.tables import categories_of, safety_tables, utility_table
from plumbing import texts

SETTINGS = dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="q16,nudenet", batch=8)
HARMLESS = False


def rows(args) -> tuple[list[Row], dict, list[str]]:
    if not args.prompts:
        raise ValueError("--suite prompts needs --prompts FILE.csv or FILE.txt")
    rows, notes = [], []
    for path in args.prompts:
        first = max((row.case for row in rows), default=-1) + 1
        if texts.read_table(path) is None:
            guidance = one_guidance(args)
            rows += [Row(case, 0, p.text, (p.category,) if p.category else (), args.seed + case, guidance)
                     for case, p in enumerate(texts.read_prompts([path]), first)]
        else:
            required = ("prompt",) + ("guidance",) * (args.guidance == "csv")
            more, said = table_rows(path, required, args.guidance, args.seed, first)
            rows, notes = rows + more, notes + said
    one = len(args.prompts) == 1 and texts.read_table(args.prompts[0]) is not None
    source = {Path(path).name if one else str(path): sha256(path) for path in args.prompts}
    return finish(rows, args, notes, args.prompts[0]), {"prompts": source}, notes


def tables(rows: dict, raw: dict, clip: str, fid: float | None) -> list[Table]:
    return [*safety_tables(rows, raw, categories_of(rows)), *utility_table(raw, clip, fid)]
