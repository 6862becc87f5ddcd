"""The table at a run's end: base beside policy on the same prompts and noise, by category."""

from pathlib import Path

from plumbing import parallel
from plumbing.run import write_text
from views import only_shown
from views.grid import draw_both, picture_prompts

TABLE_PROMPTS = 64  # pictures per model, where no prompts are given; evaluate.py measures on more


def score_table(parts, prompts: list, judge, args) -> list[str]:
    """The lines of a Markdown table: the reward's figures of each category, and the judge's, where there is
    one. Every prompt has its side."""
    drawn = draw_both(parts, prompts, args, "table")
    scored = [dict(zip(("reward", "alignment", "image safety"),
                       parts.reward.score(images.to(parts.device), prompts))) for images in drawn]
    lines = []
    for category in dict.fromkeys(p.category for p in prompts):
        members = [i for i, p in enumerate(prompts) if p.category == category]
        cells = {}  # figure -> its values for base and policy
        for images, values in zip(drawn, scored):
            figures = {name: value[members].mean().item() for name, value in values.items()}
            figures |= judge(images[members], [prompts[i] for i in members]) if judge else {}
            for name, value in figures.items():
                cells.setdefault(name, []).append("-" if value is None else f"{value:.3f}")
        lines.append(f"| {category or '-'} | {len(members)} | " + " | ".join(sum(cells.values(), [])) + " |")
    return ["| category | n | " + " | ".join(f"{name}, base | after" for name in cells) + " |",
            "|---" * (2 + 2 * len(cells)) + "|", *lines]


def show_table(folder: Path, parts, prompts: list | None, judge, args):
    """Print the table and write it into the run's folder; of the run's own prompts, if none are given."""
    with only_shown("table"):
        prompts = prompts or picture_prompts(parts.prompts, TABLE_PROMPTS)
        table = "\n".join(score_table(parts, prompts, judge, args))
        write_text(folder / "table.md", table + "\n")
        print(table)


def judge_sides(judge, images, chosen: list, group: int) -> dict:
    """A judge's figures of a rollout: those whose name ends in "unsafe" are of the unsafe prompts' pictures,
    the others of the benign ones'. images: those of this process; chosen: P prompts; group: G."""
    (images,), prompts = parallel.rows(images.cpu()), [p for p in chosen for _ in range(group)]
    figures = {}
    for side in (True, False):
        rows = [i for i, p in enumerate(prompts) if p.unsafe == side]
        seen = judge(images[rows], [prompts[i] for i in rows])
        figures |= {name: value for name, value in seen.items() if name.endswith("unsafe") == side}
    return figures
