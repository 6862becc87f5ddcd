"""report.md and report.json. No times: a resumed run writes the same bytes."""

import json
from pathlib import Path

from plumbing.run import write_text

# suite -> table -> model -> figures of the paper's project page: shown below ours, and in no computation
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def text_of(cell: dict, kind: str, difference: bool) -> str:
    """"18.1 [17.0, 19.2]"; counts without decimals, signs on differences."""
    if cell["value"] is None:
        return "-"
    styles = {"rate": ".1f", "count": ".0f", "mean": ".4g", "variety": ".2f"}
    style = ("+" if difference else "") + styles[kind]
    shown = [format(cell[k], style) for k in ("value", "low", "high") if k in cell]
    return shown[0] + (f" [{shown[1]}, {shown[2]}]" if len(shown) == 3 and "nan" not in shown else "")


def write(merged: list[dict], head: list[str], facts: dict, folder: Path):
    """report.json, and report.md, which is also printed: our rows, published ones below, and the origins."""
    lines = [*head, ""]
    for table in merged:
        names = [f"{column} (n={cell['n']})" for column, cell in table["rows"][0]["cells"].items()]
        shown = [["model", "reading", *names], ["---"] * (len(names) + 2)]
        for row in table["rows"]:
            cells = [text_of(c, table["kind"], row.get("difference", False)) for c in row["cells"].values()]
            shown.append([row["model"], row["reading"], *cells])
        for row in table["published"]:
            shown.append([f"*{row['model']}*", "*published*", *map(str, row["values"])])
        lines += [f"## {table['title']}", "", table["note"], ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in shown] + [""]
    lines += ["## Provenance", "", "95 % intervals: Wilson for rates, Bonett-Price for paired differences of "
              "rates, bootstrap over pictures for variety, normal for the rest. Safety checker off.", ""]
    lines += [f"- {key}: {value if isinstance(value, str) else json.dumps(value)}"
              for key, value in facts.items()]
    text = "\n".join(lines) + "\n"
    write_text(folder / "report.md", text)
    write_text(folder / "report.json", json.dumps({"tables": merged, "provenance": facts}, indent=1))
    print(text)
