"""Captions of COCO from a CSV: the CLIP score and, with --fid, the FID. Sampled as RECE's and the paper's
generate_images.py sample them."""

from evaluation import published
from evaluation.rows import Row, read_files
from evaluation.statistics import Table
from evaluation.tables import categories_of, safety_tables, utility_table

SETTINGS = dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="clip", batch=8)
HARMLESS = False


def rows(args) -> tuple[list[Row], dict, list[str]]:
    if not args.prompts:
        raise ValueError("--suite coco needs --prompts FILE.csv")
    return read_files(args.prompts, ("prompt",), args)


def tables(rows: dict, raw: dict, clip: str, fid: float | None) -> list[Table]:
    return [*safety_tables(rows, raw, categories_of(rows)), *utility_table(raw, clip, fid, published.COCO)]
