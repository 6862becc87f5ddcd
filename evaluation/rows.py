"""What the models are asked to draw: every suite's prompts, as rows with a case number, a seed and a size.

I2P is read from its own CSV in either published format: the hub's (AIML-TUDA/i2p) or the repackaged one of
ESD, RECE and MACE. Both have the same 4,703 rows in the same order and give the same rows here. Row 2260 has
no prompt: empty in one, the word "Null" in the other, and "nan" in harnesses that read it with pandas; it is
drawn with the empty prompt.
"""

import csv
import random
from dataclasses import dataclass, replace
from pathlib import Path

import geneval
import shapes
from evaluation import judges, tables
from reward import read_prompts

I2P_HUB = ("AIML-TUDA/i2p", "i2p_benchmark.csv")
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


def csv_rows(path: Path, required: tuple, guidance, seed: int, notes: list) -> list[Row]:
    """The rows of a CSV with I2P's columns in either published format; `required` ones have to be there."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = {need: next((c for c in options if c in (reader.fieldnames or ())), None)
                 for need, options in COLUMNS.items()}
        missing = [" or ".join(COLUMNS[need]) for need in required if names[need] is None]
        if missing:
            there = ", ".join(reader.fieldnames or ["none"])
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {there}")
        lines = list(reader)
    rows = []
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
        groups = tuple(c for c in tables.I2P if c in fact.get("categories", ""))  # as substrings, as all do
        rows.append(Row(case, 0, text, groups, numbers.get("seed", seed + case), number,
                        numbers.get("width", 0), numbers.get("height", 0)))
    if len({row.case for row in rows}) < len(rows):
        raise ValueError(f"{path}: {names['case']} repeats a number; everything is joined by it")
    return rows


def shapes_rows(images: int, guidance: float, seed: int) -> list[Row]:
    """At least `images` pictures for each kind of prompt (harm trained on, held out, explicit, calm, benign),
    spread evenly over the kind's categories and over each category's captions."""
    held_out = tuple(c for c in shapes.HARM_WORDS if c not in shapes.TRAINED_ON)
    texts = {}
    for text, category in shapes.evaluation_prompts():
        texts.setdefault(category, []).append(text)
    picked = [(texts[category][i % len(texts[category])], category)
              for kind in (shapes.TRAINED_ON, held_out, ("explicit",), ("calm",), shapes.TASKS)
              for category in kind for i in range(-(-images // len(kind)))]
    return [Row(case, 0, text, (category,), seed + case, guidance)
            for case, (text, category) in enumerate(picked)]


def stratified(rows: list[Row], limit: int, seed: int) -> list[Row]:
    """A fixed draw of `limit` prompts, each group in proportion: every (n / limit)-th row of the rows sorted
    by group, in random order within a group. Kept in the order of the file."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: row.groups)  # stable: random within a group
    picked = {order[int((i + 0.5) * len(order) / limit)].case for i in range(min(limit, len(order)))}
    return [row for row in rows if row.case in picked]


def read_suite(args) -> tuple[list[Row], dict, list[str]]:
    """The rows of a suite, where they came from, and what has to be said about them."""
    notes, source, guidance = [], {}, args.guidance
    path = Path(args.prompts[0]) if args.prompts else None
    if args.suite == "shapes":
        rows = shapes_rows(args.images, guidance, args.seed)
    elif args.suite == "geneval":
        path = judges.fetch(geneval.URL, "" if path else geneval.SHA256, path, "--prompts", args.cache)
        rows = [Row(case, 0, m["prompt"], (m["tag"],), args.seed, guidance, facts=m)
                for case, m in enumerate(geneval.read_metadata(path))]
    elif args.suite == "prompts" and path and path.suffix != ".csv":
        rows = [Row(case, 0, p.text, (p.category,) if p.category else (), args.seed + case, guidance)
                for case, p in enumerate(read_prompts(args.prompts))]
        source["prompts"] = {str(p): judges.sha256(p) for p in args.prompts if Path(p).is_file()}
    else:
        if path is None and args.suite != "i2p":
            raise ValueError(f"--suite {args.suite} needs --prompts FILE.csv"
                             + " or FILE.txt" * (args.suite == "prompts"))
        if path is None:
            path, source["prompts_revision"] = hub_csv()
        required = ("prompt", "categories", "seed", "width", "height") if args.suite == "i2p" else ("prompt",)
        required += ("guidance",) * (guidance == "csv")
        rows = csv_rows(path, required, guidance, args.seed, notes)
    if path and "prompts" not in source:
        source["prompts"] = {path.name: judges.sha256(path)}
    if not rows:
        raise ValueError(f"{path}: no prompt in it")
    if args.limit:
        total, rows = len(rows), stratified(rows, args.limit, args.seed)
        notes.append(f"{len(rows)} of {total} prompts, a stratified draw with seed {args.seed}")
    if args.suite == "i2p":
        odd = sum((row.width, row.height) != (512, 512) for row in rows)
        none = sum(not row.groups for row in rows)
        notes += [f"{odd} of {len(rows)} rows are not 512 x 512"] * bool(odd)
        notes += [f"{none} rows are in none of the seven categories: they count in overall only"] * bool(none)
    return [replace(row, image=k) for row in rows for k in range(args.samples)], source, notes


def hub_csv() -> tuple[Path, str]:
    """I2P from the hub's cache or the hub, and its revision."""
    from huggingface_hub import hf_hub_download
    try:
        path = Path(hf_hub_download(*I2P_HUB, repo_type="dataset"))
    except OSError as error:
        raise OSError(f"cannot fetch {'/'.join(I2P_HUB)} from the hub ({str(error).splitlines()[0]}); get "
                      "the file on a connected machine and pass it with --prompts FILE.csv")
    return path, path.parent.name
