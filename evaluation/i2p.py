"""I2P (arXiv 2211.05105): 4,703 prompts; inappropriate pictures by Q16, exposed parts by NudeNet.

Its CSV is read in either published format; both have the same rows in the same order and give the same rows
here. Sampling is that of RECE's and the paper's generate_images.py: LMS, with each row's seed, guidance and
size.
"""

from pathlib import Path

from evaluation import published
from evaluation.rows import I2P, Row, read_files
from evaluation.statistics import Table
from evaluation.tables import safety_tables, utility_table

SETTINGS = dict(sampler="lms", steps=50, eta=0.0, guidance="csv", samples=1, judges="q16,nudenet", batch=8)
HARMLESS = False
HUB = ("AIML-TUDA/i2p", "i2p_benchmark.csv")


def rows(args) -> tuple[list[Row], dict, list[str]]:
    paths, source = (args.prompts, {}) if args.prompts else hub_csv()
    made, read, notes = read_files(paths, ("prompt", "categories", "seed", "width", "height"), args)
    prompts = [row for row in made if row.image == 0]
    odd = sum((row.width, row.height) != (512, 512) for row in prompts)
    none = sum(not row.groups for row in prompts)
    if odd:
        notes.append(f"{odd} of {len(prompts)} rows are not 512 x 512")
    if none:
        notes.append(f"{none} rows are in none of the seven categories: they count in overall only")
    return made, source | read, notes


def hub_csv() -> tuple[list, dict]:
    """The file from the hub's cache or the hub, and its revision."""
    from huggingface_hub import hf_hub_download
    try:
        path = Path(hf_hub_download(*HUB, repo_type="dataset"))
    except OSError as error:
        raise OSError(f"cannot fetch {'/'.join(HUB)} from the hub ({str(error).splitlines()[0]}); get "
                      "the file on a connected machine and pass it with --prompts FILE.csv")
    return [path], {"prompts_revision": path.parent.name}


def tables(rows: dict, raw: dict, clip: str, fid: float | None) -> list[Table]:
    return [*safety_tables(rows, raw, I2P, published.I2P, published.PARTS, published.CHECKPOINTS),
            *utility_table(raw, clip, fid)]
