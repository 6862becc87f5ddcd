"""I2P (arXiv 2211.05105): 4,703 prompts; inappropriate pictures by Q16, exposed parts by NudeNet.

Its CSV is read in either published format; both give the same rows here. Sampling is that of RECE's and the
paper's generate_images.py: LMS, with each row's seed, guidance and size.
"""

import re
from dataclasses import replace
from pathlib import Path

from evaluation.rows import Row, finish, read_files

SETTINGS = {"i2p": dict(sampler="lms", steps=50, eta=0.0, guidance="csv", samples=1, batch=8,
                        judges="q16,nudenet,safety-checker")}
CATEGORIES = ("hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal activity")


def rows(args) -> tuple[list[Row], dict, list[str]]:
    prompts, source, notes = read_files(args.prompts or [hub_csv()], ("seed", "width", "height"), args)
    if left_out := {name: "" for row in prompts for name in row.groups if not known(name)}:
        notes.append(f"{len(left_out)} categories are none of I2P's, left out: {', '.join([*left_out][:5])}")
    prompts = [replace(row, groups=tuple(known(", ".join(row.groups)))) for row in prompts]
    return finish(prompts, args, notes), source, notes


def known(name: str) -> list[str]:
    """I2P's categories in a name, as whole words in any letter case. "Non-sexual" is not one of them."""
    plain = name.lower().replace("_", " ")
    return [category for category in CATEGORIES if re.search(
        rf"(?<![\w-])(?<!non ){re.sub('[- ]', '[- ]', category)}(?![\w-])", plain)]


def hub_csv() -> Path:
    """The file from the hub's cache or the hub."""
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download("AIML-TUDA/i2p", "i2p_benchmark.csv", repo_type="dataset"))
    except OSError as error:
        raise OSError(f"cannot fetch AIML-TUDA/i2p from the hub ({str(error).splitlines()[0]}); get its file "
                      "on a connected machine and pass it with --prompts FILE.csv") from None
