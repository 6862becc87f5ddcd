"""Pictures that a run leaves: labelled grids, and the table of base beside policy at its end.

`networks` is {name: (network, context in which it is itself)}, as train.both gives it. Nothing here touches
what is learnt.
"""

import math
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from plumbing import curves, parallel
from reward import BENIGN, Prompt
from sample import draw, image_generator

GRID_COLUMNS = 8    # pictures per prompt in a grid
TABLE_PROMPTS = 64  # pictures per model in the table at the end; evaluate.py measures on as many as one likes
WIDE, NARROW = 12, 20   # of a row's label at most, of a sheet at least; in heights of its letters
FONT = ImageFont.load_default(14)


def legible(label: str) -> str:
    """A label in letters that the font has: others lose their accents, or become their code."""
    missing = bytes(FONT.getmask("\U0010ffff"))
    has = lambda c: c == " " or bytes(FONT.getmask(c)) != missing
    plain = (c if has(c) else unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
             or c.encode("ascii", "backslashreplace").decode() for c in " ".join(label.split()))
    return "".join(plain)


def wrapped(label: str, width: int, font=FONT) -> list[str]:
    """A label in lines of so many pixels at most."""
    text = legible(label)
    letters = len(text) + 1
    while max(map(font.getlength, lines := textwrap.wrap(text, letters) or [""])) > width:
        letters -= 1
    return lines


def short_names(models: list[str]) -> list[str]:
    """A checkpoint's folder, of others the last two parts; all in full where two models would be one."""
    names = [path.name if path.name.startswith("checkpoint-") else "/".join(path.parts[-2:]) or str(path)
             for path in map(Path, models)]
    return names if len(set(names)) == len(set(models)) else models


def save_grid(images, path, columns: int, row_labels=(), column_labels=(), captions=(), framed=None):
    """Write pictures (N, 3, H, W) in [0, 1] as one labelled PNG, row by row; small ones at 96 pixels.
    captions: each above its share of the rows. framed: (N,) bool, which pictures have a red frame."""
    zoom = max(1, round(96 / images.shape[-1]))
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, _, height, width = images.shape
    rows, edge, size = math.ceil(n / columns), max(2, height // 128), max(14, height // 18)
    font, gap, line = FONT.font_variant(size=size), 2 * edge, size + 3
    row_labels = [wrapped(label, WIDE * size, font) for label in row_labels]
    left = gap + max((int(font.getlength(text)) + 8 for label in row_labels for text in label), default=0)
    whole = max(left + columns * (width + gap), NARROW * size)
    captions = [wrapped(caption, whole - 8, font) for caption in captions]
    head, above = line + gap if column_labels else gap, [line * len(text) + size for text in captions]
    sheet = Image.new("RGB", (whole, head + sum(above) + rows * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)

    def write(x, y, lines):
        for number, text in enumerate(lines):
            pen.text((x, y + number * line), text, "black", font)

    for column, label in enumerate(column_labels):
        write(left + column * (width + gap), 2, [legible(label)])
    top = head
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for row in range(rows):
        if captions and row % (rows // len(captions)) == 0:
            number = row * len(captions) // rows
            write(4, top + size // 2, captions[number])
            top += above[number]
        if row_labels:
            write(4, top + max(0, height - line * len(row_labels[row])) // 2, row_labels[row])
        for column, i in enumerate(range(row * columns, min(n, (row + 1) * columns))):
            x = left + column * (width + gap)
            sheet.paste(Image.fromarray(np.ascontiguousarray(pixels[i])), (x, top))
            if framed is not None and framed[i]:
                pen.rectangle((x - edge, top - edge, x + width + edge - 1, top + height + edge - 1), None,
                              "red", edge)
        top += height + gap
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


def draw_grid(run, done: int, networks, parts, prompts, args, judge=None):
    """A grid of fixed prompts and noise, base above policy, and the curves, every --picture-every epochs and
    at the end. Pictures of unsafe prompts are blurred unless --show-unsafe asks for them; those of which the
    judge says so have a red frame."""
    if parallel.rank() or done != args.epochs and done % args.picture_every:
        return
    shown = picture_prompts(prompts)
    repeated = [p for p in shown for _ in range(GRID_COLUMNS)]
    drawn = draw_both(networks, parts, [p.text for p in repeated], args, "grid")
    drawn = torch.stack(list(drawn.values()))  # (2, N, 3, H, W)
    framed = torch.tensor([[looks_unsafe(judge, *pair) for pair in zip(images, repeated)]
                           for images in drawn])
    hidden = torch.tensor([parts.is_unsafe[p] and not args.show_unsafe for p in repeated]).view(-1, 1, 1, 1)
    drawn = torch.where(hidden, blur(drawn.flatten(0, 1)).view_as(drawn), drawn)
    by_prompt = lambda both: both.unflatten(1, (len(shown), -1)).transpose(0, 1).flatten(0, 2)
    save_grid(by_prompt(drawn), run / f"pictures-{done:06d}.png", GRID_COLUMNS,
              ["base", f"after {done} rollouts"] * len(shown), captions=[p.text for p in shown],
              framed=by_prompt(framed))
    curves.draw_curves(run, args.clip_range)


def looks_unsafe(judge, image, prompt) -> bool:
    """Whether a judge says so of a picture (3, H, W): by a figure whose name ends in "unsafe"."""
    seen = judge(image[None], [prompt], torch.tensor([True])) if judge else {}
    return any(name.endswith("unsafe") and (value or 0) > 0.5 for name, value in seen.items())


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
