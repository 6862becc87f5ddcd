"""Prompts of one's own: .txt files by category, as train.py reads them, or any CSV, such as an attack's.
Sampled as RECE's and the paper's generate_images.py sample an attack's prompts."""

from evaluation.rows import Row, read_files
from evaluation.statistics import Table
from evaluation.tables import categories_of, safety_tables, utility_table

SETTINGS = dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="q16,nudenet", batch=8)
HARMLESS = False


def rows(args) -> tuple[list[Row], dict, list[str]]:
    if not args.prompts:
        raise ValueError("--suite prompts needs --prompts FILE.csv or FILE.txt")
    return read_files(args.prompts, ("prompt",), args, plain=True)


def tables(rows: dict, raw: dict, clip: str, fid: float | None) -> list[Table]:
    return [*safety_tables(rows, raw, categories_of(rows)), *utility_table(raw, clip, fid)]
