"""Prompt and anchor files, told by their content: CSV (commas, tabs or semicolons), JSONL, and plain lines.

A table has a column of prompts, by one of the names that published files use. Every row has the header's
field count and quoting is strict, so that nothing that was not understood becomes a prompt. Errors name file
and line.
"""

import csv
import io
import json
import re
from pathlib import Path

from reward import Prompt

# What a row needs -> the columns that may hold it: the hub's names of I2P and those of the repackaged ESD
# file. An attack's CSV has its prompts in adv_prompt, as R1's evaluator reads it.
COLUMNS = {"prompt": ("adv_prompt", "prompt", "caption"), "categories": ("categories", "category"),
           "seed": ("evaluation_seed", "sd_seed"), "guidance": ("evaluation_guidance", "sd_guidance_scale"),
           "width": ("sd_image_width",), "height": ("sd_image_height",), "case": ("case_number",)}
NAMES = {name for names in COLUMNS.values() for name in names}
ENDINGS = {".csv": ",", ".tsv": "\t"}  # which say that a file is a table, whatever its header is
NO_PROMPT = ("", "Null")               # I2P's row 2260, in either published file


def read_text(path) -> str:
    """A text file. Raises ValueError or OSError naming the file and what to change."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    odd = next((c for c in text if c < " " and c not in "\t\n\f\v"), None)
    if odd:
        line = text[:text.index(odd)].count("\n") + 1
        raise ValueError(f"{path}, line {line}: holds the control character {odd!r}; is it a text file?")
    return text


def parse_prompts(path, text: str) -> list[Prompt]:
    """One prompt a line, `#` starts a comment line, `[name]` sets the category below it. A line ends with its
    newline and nothing else: form feeds and Unicode's separators stand within prompts."""
    prompts, category = [], ""
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if line.startswith("[") and line.endswith("]"):
            category = line[1:-1].strip().lower()
        elif line.startswith("[") and "]" not in line:
            raise ValueError(f"{path}, line {number}: [ without ]; a category's line is [name]")
        elif line and not line.startswith("#"):
            prompts.append(Prompt(line, category))
    if not prompts:
        raise ValueError(f"{path}: no prompt in it (one prompt a line; # starts a comment)")
    return prompts


def column(row: dict, need: str) -> str | None:
    """The name under which a table's row has what is needed."""
    return next((name for name in COLUMNS[need] if name in row), None)


def read_table(path) -> list[tuple[int, dict]] | None:
    """The rows of a CSV or JSONL as (line, {column: value}), or None for a file of plain lines. Raises
    ValueError naming file and line, or OSError."""
    path = Path(path)
    text = read_text(path)
    first = text.lstrip().partition("\n")[0].rstrip("\r")
    if first.startswith("{") or path.suffix.lower() in (".json", ".jsonl"):
        return read_objects(path, text)
    delimiter = max(",\t;", key=lambda mark: len(NAMES & set(header(first, mark))) * 1000 + first.count(mark))
    if NAMES & set(header(first, delimiter)) or "\t" in first or path.suffix.lower() in ENDINGS:
        return read_csv(path, text, delimiter)
    return None


def header(line: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"').strip().lower() for name in line.split(delimiter)]


def read_csv(path: Path, text: str, delimiter: str) -> list[tuple[int, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, names, line = [], [], 1
    try:
        for fields in reader:
            if fields and not names:
                names = [name.strip().lower() for name in fields]
                named = [name for name in names if name]
                if len(set(named)) < len(named):
                    raise ValueError(f"{path}, line {line}: two columns of one name in {', '.join(named)}")
            elif fields:
                if len(fields) != len(names):
                    raise ValueError(f"{path}, line {line}: {len(fields)} fields, but the header has "
                                     f"{len(names)}: {', '.join(names)}; quote a field that holds "
                                     f"{delimiter!r} or a quote")
                rows.append((line, dict(zip(names, fields))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not a CSV row ({error}); quote a field that holds "
                         f"{delimiter!r} or a line's end, and double the quotes in it") from None
    return checked(path, rows, names)


def read_objects(path: Path, text: str) -> list[tuple[int, dict]]:
    rows = []
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {line}: not JSON ({error}); expected one object a line"
                                 ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: a JSON {type(row).__name__}; "
                                 "expected one object a line")
            if rows and (lost := [n for n in rows[0][1] if n in NAMES and n not in row]):
                raise ValueError(f"{path}, line {line}: no {lost[0]}, which line {rows[0][0]} has")
            rows.append((line, row))
    return checked(path, rows, list(rows[0][1]) if rows else [])


def checked(path: Path, rows: list, names: list) -> list[tuple[int, dict]]:
    """The rows, whose prompts are there and are text."""
    name = column(dict.fromkeys(names), "prompt")
    if name is None:
        raise ValueError(f"{path}: no column {' or '.join(COLUMNS['prompt'])}; "
                         f"it has {', '.join(names) or 'none'}")
    for line, row in rows:
        if not isinstance(row[name], str):
            raise ValueError(f"{path}, line {line}: {name} is {row[name]!r}, not text")
    if not rows:
        raise ValueError(f"{path}: no prompt in it")
    return rows


def number(path, line: int, row: dict, need: str, kind=int, low: float = 0, high: float = 2**63 - 1):
    """A row's number, within bounds, or None if the file has no such column."""
    name = column(row, need)
    if name is None:
        return None
    try:
        if isinstance(row[name], bool) or not re.fullmatch(r"\s*[-+.\deE]+\s*", str(row[name]), re.ASCII):
            raise ValueError
        value = kind(row[name] if kind is float else str(row[name]))
        if not low <= value <= high:
            raise ValueError
        return value
    except ValueError:
        raise ValueError(f"{path}, line {line}: {name} is {row[name]!r}; it has to be a "
                         f"{'whole ' if kind is int else ''}number from {low} to {high:g}") from None


def read_prompts(paths) -> list[Prompt]:
    """The prompts of files of any of the formats. A table's row has the first of its `categories`; one
    without a prompt is left out, and said so. Raises ValueError or OSError naming file and line."""
    prompts = []
    for path in paths:
        rows, before = read_table(path), len(prompts)
        if rows is None:
            prompts += parse_prompts(path, read_text(path))
            continue
        for line, row in rows:
            name, kept = column(row, "categories"), row[column(row, "prompt")].strip()
            category = str(row[name] or "").split(",")[0].strip().lower() if name else ""
            if kept in NO_PROMPT:
                print(f"note: {path}, line {line}: no prompt; left out")
            else:
                prompts.append(Prompt(kept, category))
        if len(prompts) == before:
            raise ValueError(f"{path}: no prompt in it")
    return prompts


def read_anchors(path) -> tuple[list[str], list[str]]:
    """Read an anchors file, sections [safe] and [unsafe] -> (safe phrases, unsafe phrases); there may be no
    safe ones. Raises ValueError or OSError naming the file and what to change."""
    phrases = read_prompts([path])
    safe, unsafe = ([p.text for p in phrases if p.category == name] for name in ("safe", "unsafe"))
    other = {p.category for p in phrases} - {"safe", "unsafe"}
    if other or not unsafe:
        raise ValueError(f"{path}: anchors need phrases under [unsafe], best also under [safe], and no others"
                         + (f"; found {sorted(other)}" if other else ""))
    if set(safe) == set(unsafe):
        raise ValueError(f"{path}: safe and unsafe anchors are the same: the safety direction would be zero")
    return safe, unsafe
