"""Pictures that a run leaves: labelled grids, and the table of base beside policy at its end.

`networks` is {name: (network, context in which it is itself)}, as train.both gives it. Nothing here touches
what is learnt.
"""

import math
import textwrap
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from plumbing import parallel
from reward import BENIGN, Prompt
from sample import draw, image_generator

GRID_COLUMNS = 8    # pictures per prompt in a grid
TABLE_PROMPTS = 64  # pictures per model in the table at the end; evaluate.py measures on as many as one likes
LINE, WIDE = 16, 48     # height of a label's line in pixels, and its letters
FONT = ImageFont.load_default(14)


def legible(label: str) -> str:
    """A label in letters that the font has: others lose their accents, or become their code."""
    missing = bytes(FONT.getmask("\U0010ffff"))
    has = lambda c: c == " " or bytes(FONT.getmask(c)) != missing
    plain = (c if has(c) else unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
             or c.encode("ascii", "backslashreplace").decode() for c in " ".join(label.split()))
    return "".join(plain)


def wrapped(label: str, most: int) -> list[str]:
    """A label in lines of WIDE letters, `most` of them at most."""
    return textwrap.wrap(label, WIDE, max_lines=most, placeholder=" ...") or [""]


def save_grid(images, path, columns: int, row_labels=None, column_labels=None):
    """Write pictures (N, 3, H, W) in [0, 1] as one labelled PNG, row by row; small ones at 96 pixels."""
    zoom = max(1, round(96 / images.shape[-1]))
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, _, height, width = images.shape
    rows, gap, head = math.ceil(n / columns), 2, 22 if column_labels else 0
    row_labels = [wrapped(legible(label), max(1, (height + gap) // LINE)) for label in row_labels or []]
    column_labels = [legible(label) for label in column_labels or []]
    left = 8 + max((int(FONT.getlength(line)) for label in row_labels for line in label), default=-8)
    sheet = Image.new("RGB", (left + columns * (width + gap), head + rows * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, pixels in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        row, col = divmod(i, columns)
        sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)),
                    (left + col * (width + gap), head + row * (height + gap)))
    for row, label in enumerate(row_labels):
        top = head + row * (height + gap) + max(0, height // 2 - 8 * len(label))
        for number, line in enumerate(label):
            pen.text((4, top + number * LINE), line, "black", FONT)
    for col, label in enumerate(column_labels):
        pen.text((left + col * (width + gap) + 4, 3), label, "black", FONT)
    sheet.save(path)


def blur(images):
    """Average over blocks of an eighth of the width: colours and layout stay, content does not."""
    block = images.shape[-1] // 8
    small = torch.nn.functional.avg_pool2d(images, block)
    return torch.nn.functional.interpolate(small, images.shape[-2:], mode="nearest")


def picture_prompts(prompts, most: int = 8) -> list:
    """The first prompts of each category in turn, for the grids: the same at every epoch."""
    groups = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    turns = [p for row in range(most) for group in groups.values()
             for p in group[row * len(group) // most:][:1]]
    return list(dict.fromkeys(turns))[:most]


def draw_both(networks, parts, texts, args, key) -> dict:
    """{name: pictures (N, 3, H, W) on the CPU}, on noise that depends on `key` and the picture's number."""
    drawn = {}
    for name, (unet, context) in networks.items():
        generators = [image_generator(args.seed, key, i) for i in range(len(texts))]
        with context():
            _, images = draw(parts.pipe, unet, parts.schedule, texts, generators, args.guidance,
                             args.sample_batch, parts.dtype)
        drawn[name] = images.cpu()
    return drawn


def draw_grid(run, done: int, networks, parts, prompts, args):
    """A grid of fixed prompts and noise, base above policy, every --picture-every epochs and at the end.
    Pictures of unsafe prompts are blurred unless --show-unsafe asks for them."""
    if parallel.rank() or done != args.epochs and done % args.picture_every:
        return
    shown = picture_prompts(prompts)
    texts = [p.text for p in shown for _ in range(GRID_COLUMNS)]
    rows = []
    for images in draw_both(networks, parts, texts, args, "grid").values():
        groups = images.unflatten(0, (len(shown), GRID_COLUMNS))
        rows.append(torch.stack([blur(group) if parts.is_unsafe[p] and not args.show_unsafe else group
                                 for p, group in zip(shown, groups)]))
    grid = torch.stack(rows, 1).flatten(0, 2)  # prompt by prompt, base above policy
    labels = [f"{p.text[:40]} ({name})" for p in shown for name in networks]
    save_grid(grid, run / f"pictures-{done:06d}.png", GRID_COLUMNS, labels)


def score_table(networks, parts, table_prompts, judge, args) -> list[str]:
    """Base and policy on the same prompts and noise, by category, as the lines of a Markdown table: the
    reward's figures, and the judge's, where there is one.

    table_prompts: (Prompt, whether it is unsafe) pairs."""
    prompts = [p for p, _ in table_prompts]
    scored = [p if unsafe else Prompt(p.text, BENIGN) for p, unsafe in table_prompts]
    columns = {}   # figure -> category -> one value for each network
    for images in draw_both(networks, parts, [p.text for p in prompts], args, "table").values():
        values = dict(zip(("reward", "alignment", "image safety"),
                          parts.reward.score(images.to(parts.device), scored)))
        for category in dict.fromkeys(p.category for p in prompts):
            rows = [i for i, p in enumerate(prompts) if p.category == category]
            shown = {name: f"{figure[rows].mean().item():.3f}" for name, figure in values.items()}
            shown |= judged(judge, images[rows], [prompts[i] for i in rows])
            for name, text in shown.items():
                columns.setdefault(name, {}).setdefault(category, []).append(text)
    lines = ["| category | n | " + " | ".join(f"{name}, base | after" for name in columns) + " |",
             "|---" * (2 + 2 * len(columns)) + "|"]
    for category in columns["reward"]:
        n = sum(p.category == category for p in prompts)
        cells = [text for figure in columns.values() for text in figure.get(category, ["-"] * len(networks))]
        lines.append(f"| {category or '-'} | {n} | " + " | ".join(cells) + " |")
    return lines


def judged(judge, images, prompts) -> dict:
    """A judge's figures for one category. It reports on unsafe and on benign prompts apart, so
    it is asked twice: as if all were the ones, and as if all were the others."""
    shown = {}
    for side in (True, False):
        if judge is not None:
            for name, value in judge(images, prompts, torch.full((len(prompts),), side)).items():
                if value is not None:
                    shown[name] = f"{value:.3f}"
    return shown
