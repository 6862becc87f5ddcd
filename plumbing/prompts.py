"""Prompt, and the one reader of prompt, anchor and table files: .csv, .tsv, .jsonl, else a prompt a line.

What is hashed is what was read. What is not understood becomes no prompt: errors name file and line. What is
left out, or kept with a doubt, is a printed note.
"""

import ast
import csv
import io
import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

BENIGN = "benign"                                  # the one category whose prompts are not unsafe
HARMLESS = ("safe", "harmless", "neutral", "sfw")  # what other files call it
MISSING = ("", "null", "nan", "none", "n/a")       # a cell without a value, as the prompt of I2P's row 2260
# Need -> the columns that may hold it, the first that is there: I2P's, in two published forms, and attacks'.
COLUMNS = {"prompt": ("adv_prompt", "sensitive_prompt", "prompt", "caption", "text"),
           "categories": ("categories", "category", "class"),
           "seed": ("evaluation_seed", "sd_seed"), "guidance": ("evaluation_guidance", "sd_guidance_scale"),
           "width": ("sd_image_width",), "height": ("sd_image_height",), "case": ("case_number",)}
NOT_READ = ".json .ipynb .yaml .yml .md .html .py .js .pdf .docx .xlsx .parquet .pkl .gz .zip".split()
# [name]: up to five words, no article, no mark of SYNTAX; a prompt in brackets is not to become a category.
CATEGORY = r"\[ *(?!(?:an?|An?|[Tt]he) )([^\W\d_][\w&/'.+-]*(?: +[\w&/'.+()-]+){,4}) *\]"
FORMATS = {  # what no line of prompts looks like, once its margins are cut
    "JSON": r"""^[\[{]$|^[\]}],?;?$|^\[ *["'{]|^\{ *["']|^"[^"\n]+" *: *["\d]""",
    "YAML": r"(?i)^(- *)?((negative )?prompt|target|caption|text|category|seed|steps)s? *:|^[\w.-]+:$|^---$",
    "Markdown": r"^\|.*\|$|^[-*+•] (?!.* [-*+•]$)|^(```|~~~|> |!\[)|^[-=*_|:+ ]{3,}$|^1[.)] .*\n+2[.)] ",
    "HTML or XML": r"(?i)^<[!?]|^<(html|body|p|div|[uo]l|li|tr|td|br)\b[^<>:\n]*>|</[a-z][\w-]*>",
    "a program": r"^import [\w.]+( as \w+)?;?$|^from [\w.]+ import |^def \w+\(|^class \w+(\(.*\))?:$"
                 r"""|^((const|let|var) )?[\w.]+ *\+?= *["'`\[{(\d]|[\[({](?<![:;].)$|^\)[,;]?$"""
                 r"""|^["'].*["'],$|^("{3}|'{3}|//|/\*|print\(|\\\w+\{)""",
    "an option or an error": r"^(--\w|https?://\S+$|version https://git|40\d: |Entry not found$|[<>]{7})",
    "another encoding, by its control characters": r"[\0-\x08\x0e-\x1f\x7f]",
    "a category's line, which is [name]": rf"^(?!{CATEGORY}$)([［【]|\[([^\]\n]*|.*\]\W*(#.*)?)$)"}
HEADLESS = (r"^\d+[,;\t]", r"\D[,;\t]\d+$", r"\t")  # a table's rows, where every line is so
# What other programs give a meaning: choices, weights, networks, wildcards, options, entities.
SYNTAX = re.compile(r"\{[^{}]*\}|\([^()]+:\d*\.?\d+\)|\(\([^()]+\)\)|\[[^\[\]:|]*[:|][^\[\]]*\]|\[\[|::-?\d"
                    r"|<[\w-]+(:[^<>]*)?>|(?<!\S)__[\w/-]+__|(?<=\s)--[a-zA-Z]\w*|&(amp|quot|lt|gt|#\d+);")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the category it stands under ("" for none)."""
    text: str
    category: str = ""
    unsafe: bool | None = None  # by its category; None without one, until reward.decide has looked


@dataclass(frozen=True)
class Record:
    """What a file says of one prompt."""
    line: int                    # where it begins
    text: str                    # "" where the file has none
    categories: tuple[str, ...]  # as they are written
    fields: dict                 # a table's other cells, by the column's name


def read_records(path, used: tuple = tuple(COLUMNS)) -> tuple[list[Record], str]:
    """All that a file holds, and the sha256 of the bytes that were read. used: the needs or columns that the
    caller looks at; a note names a table's others. Raises ValueError, with file and line, or OSError."""
    if (suffix := Path(path).suffix.lower()) in NOT_READ:
        raise ValueError(f"{path}: no {suffix} is read; give a .csv, .jsonl or .txt (a prompt a line)")
    data = Path(path).read_bytes()
    try:
        text = data.decode().replace("\ufeff", "").replace("\r\n", "\n")
        if suffix in (".csv", ".tsv", ".jsonl"):
            records = table_records(path, read_objects(text) if suffix == ".jsonl" else read_csv(text), used)
        else:
            records = plain_records(text.replace("\r", "\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    doubts = [f"line {r.line}: {found[0][:40]!r}" for r in records if (found := SYNTAX.search(r.text))]
    if doubts:
        print(f"note: {path}, {doubts[0]} means something elsewhere; here it is text ({len(doubts)} in all)")
    return records, sha256(data).hexdigest()


def plain_records(text: str) -> list[Record]:
    """One prompt a line, `#` starts a comment line, `[name]` sets the category below it. A line ends with its
    newline and nothing else: form feeds and Unicode's separators stand within prompts."""
    lines = ["" if line.strip().startswith("#") else line.strip() for line in text.split("\n")]
    refuse_other_formats(lines)
    records, categories = [], ()
    for number, line in enumerate(lines, 1):
        if name := re.fullmatch(CATEGORY, line):
            categories = (name[1],)
        elif line:
            records.append(Record(number, line, categories, {}))
    return records


def refuse_other_formats(lines: list[str]) -> None:
    """Raises ValueError for the first of the lines that looks like something else."""
    body, kept = "\n".join(lines), [line for line in lines if line] or [""]
    found = [(match.start(), what) for what, pattern in FORMATS.items()
             if (match := re.search(pattern, body, re.MULTILINE))]
    cells = {column_name(cell) for cell in re.split("[,;\t]", kept[0])}
    titled = cells & set(COLUMNS["prompt"][:3 if ", " in kept[0] else None])  # "text, logo" is a prompt
    if titled or len(kept) > 2 and any(all(re.search(mark, line) for line in kept) for mark in HEADLESS):
        found.append((body.index(kept[0]), "a table, to be named .csv or .tsv, with columns' names above it"))
    if found:
        place, what = min(found, key=lambda item: item[0])
        number = body.count("\n", 0, place) + 1
        raise ValueError(f"line {number}: {lines[number - 1][:60]!r} looks like {what}; a .jsonl takes all")


def column_name(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip(" \t\"'").lower())  # "Sensitive Prompt" is sensitive_prompt


def read_csv(text: str):
    """The rows as (line, [(column, cell), ...]). What separates cells is the header's most frequent mark."""
    mark = max(",;\t", key=text.lstrip().partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=True)
    header, line = [], 1
    try:
        for cells in reader:
            if cells and header:  # below it, and no empty line
                if len(cells) != len(header):
                    raise csv.Error(f"{len(cells)} fields, the header has {len(header)}: {header}")
                yield line, list(zip(header, cells))
            header, line = header or cells, reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}; quote a field that holds {mark!r} or a quote") from None


def read_objects(text: str):
    """The objects of a JSONL as (line, [(name, value), ...])."""
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                yield line, list(json.loads(content, strict=False).items())
            except (ValueError, RecursionError, AttributeError) as error:
                raise ValueError(f"line {line}: not JSON ({error}); expected one object a line") from None


def table_records(path, rows, used: tuple) -> list[Record]:
    """A table's records. A column that is known is there in every row; its cell may be empty."""
    table = []
    for line, cells in rows:
        cells = [(column_name(name), value) for name, value in cells if name.strip()]
        table.append((line, dict(cells)))
        if len(dict(cells)) < len(cells):
            raise ValueError(f"line {line}: two columns of one name in {[name for name, _ in cells]}")
    names = dict.fromkeys(name for _, row in table for name in row)
    held = {need: column(names, need) for need in COLUMNS}
    prompt, category = held["prompt"], held["categories"]
    if table and not prompt:
        raise ValueError(f"line 1: no column {' or '.join(COLUMNS['prompt'])}; it has {', '.join(names)!r}")
    looked_at = {prompt, category, *(held.get(need, need) for need in used)}
    if unused := [name for name in names if name not in looked_at]:
        print(f"note: {path}: reads {prompt}, {category or 'no category'}; not used: {', '.join(unused)}")
    records = []
    for line, row in table:
        if lost := [name for name in held.values() if name and name not in row]:
            raise ValueError(f"line {line}: no {lost[0]}, which other lines have")
        text, categories = row.pop(prompt), split_categories(line, row.pop(category, None))
        if not isinstance(text, str | None):
            raise ValueError(f"line {line}: {prompt} is {text!r}, not text")
        text = (text or "").strip()
        records.append(Record(line, "" if text.lower() in MISSING else text, categories, row))
    return records


def split_categories(line: int, value) -> tuple[str, ...]:
    """A cell's categories: names with commas, or a list, in JSON or as Python and numpy print one."""
    if isinstance(value, str) and re.fullmatch(r"[\[({].*[\])}]", value.strip(), re.DOTALL):
        try:
            value = ast.literal_eval(re.sub(r"(['\"])\s+(?=['\"])", r"\1, ", value.strip()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it may raise
            value = value.strip()[1:-1]  # [hate, shocking], without quotes
    value = re.split("[,;|]", value) if isinstance(value, str) else () if value is None else value
    if not isinstance(value, list | tuple) or any(re.fullmatch(r"[-+.\d]+|True|False|{.*", str(name).strip())
                                                  or not isinstance(name, str) for name in value):
        raise ValueError(f"line {line}: the category is {value!r}; expected names ({BENIGN} if harmless)")
    return tuple(name.strip() for name in value if name.strip().lower() not in MISSING)


def column(fields: dict, need: str) -> str | None:
    """The name under which a table has what is needed."""
    return next((name for name in COLUMNS[need] if name in fields), None)


def number(path, record: Record, need: str, kind=int, low: float = 0, high: float = 2**63 - 1):
    """A record's number, within bounds, or None if the file has no such column."""
    if (name := column(record.fields, need)) is None:
        return None
    value = str(record.fields[name]).strip()
    form = r"[-+]?\d{1,20}" if kind is int else r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?"
    if not re.fullmatch(form, value, re.ASCII | re.IGNORECASE) or not low <= kind(value) <= high:
        said = f"{path}, line {record.line}: {name} is {record.fields[name]!r}, not"
        raise ValueError(f"{said} a {'whole ' if kind is int else ''}number from {low} to {high:g}")
    return kind(value)


def read_prompts(paths, category: str = "") -> tuple[list[Prompt], list[str]]:
    """The prompts of files, each under its first category, or `category` if it has none, and their sha256."""
    prompts, hashes = [], []
    for path in paths:
        records, digest = read_records(path, used=())
        if not any(record.text for record in records):
            raise ValueError(f"{path}: no prompt in it")
        for record in records:
            name = record.categories[0] if record.categories else category
            if not record.text:
                print(f"note: {path}, line {record.line}: no prompt; left out")
            elif name.lower() in HARMLESS:
                raise ValueError(f"{path}, line {record.line}: {name} would count as unsafe; write {BENIGN}")
            else:
                prompts.append(Prompt(record.text, name, name.lower() != BENIGN if name else None))
        hashes.append(digest)
    return prompts, hashes


def read_anchors(path) -> tuple[tuple[list[str], list[str]], str]:
    """(safe, unsafe) phrases, and the file's sha256: sections [safe], which may be missing, and [unsafe]."""
    records, digest = read_records(path)
    safe, unsafe = ([record.text for record in records if [c.lower() for c in record.categories] == [side]]
                    for side in ("safe", "unsafe"))
    if not unsafe or set(safe) == set(unsafe) or len(safe) + len(unsafe) < len(records):
        raise ValueError(f"{path}: anchors need phrases under [unsafe], best others under [safe], no more")
    return (safe, unsafe), digest
