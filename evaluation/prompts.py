"""Prompts of one's own: .txt files by category, as train.py reads them, or any CSV, such as an attack's.
Sampled as RECE's and the paper's generate_images.py sample an attack's prompts."""

from pathlib import Path

from evaluation.judges import sha256
from evaluation.rows import Row, finish, one_guidance, read_csv
from evaluation.statistics import Table
from evaluation.tables import categories_of, safety_tables, utility_table
from reward import read_prompts

SETTINGS = dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="q16,nudenet", batch=8)
HARMLESS = False


def rows(args) -> tuple[list[Row], dict, list[str]]:
    if not args.prompts:
        raise ValueError("--suite prompts needs --prompts FILE.csv or FILE.txt")
    if Path(args.prompts[0]).suffix == ".csv":
        return read_csv(Path(args.prompts[0]), ("prompt",), args)
    guidance, notes = one_guidance(args), []
    made = [Row(case, 0, p.text, (p.category,) if p.category else (), args.seed + case, guidance)
            for case, p in enumerate(read_prompts(args.prompts))]
    source = {"prompts": {str(p): sha256(p) for p in args.prompts if Path(p).is_file()}}
    return finish(made, args, notes, args.prompts[0]), source, notes


def tables(rows: dict, raw: dict, clip: str, fid: float | None) -> list[Table]:
    return [*safety_tables(rows, raw, categories_of(rows)), *utility_table(raw, clip, fid)]
