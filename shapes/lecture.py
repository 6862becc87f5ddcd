"""docs/method.md: run its snippets, write what they print below them, and draw its figures.

    python -m shapes.lecture

The snippets run from top to bottom in one namespace. The figures are drawn from what they have computed, so
page and figures show one rollout.
"""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from plumbing import stop
from sample import LOG_2PI, decode
from views import save_figure
from views.direction import places

DOCS = Path(__file__).parent.parent / "docs"
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:```\n(.*?)```\n)?", re.DOTALL)  # the code, and what it prints


def run(text: str):
    """Run a page's snippets. Returns the page with what they print, and their variables."""
    variables = {}

    def printed(found) -> str:
        above = "\n" * text[:found.start(1)].count("\n")  # so that an error names the page's line
        with redirect_stdout(io.StringIO()) as out:
            exec(compile(above + found[1], "docs/method.md", "exec"), variables)
        return f"```python\n{found[1]}```\n```\n{out.getvalue()}```\n"

    return SNIPPET.sub(printed, text), SimpleNamespace(**variables)


def strip(axis, images, title: str):
    """Pictures (n, 3, H, W) side by side, each one unit wide."""
    row = torch.cat(list(F.pad(images, (2, 2, 2, 2), value=1.0)), 2)
    axis.imshow(row.permute(1, 2, 0), extent=(-0.5, len(images) - 0.5, 0, 1), aspect="auto")
    axis.set_title(title, loc="left", fontsize=10)
    axis.axis("off")


def bars(axis, values, title: str, marked):
    """A bar with its number for each picture, red where it is marked."""
    colors = ["tab:red" if mark else "tab:gray" for mark in marked]
    axis.bar_label(axis.bar(range(len(values)), values, 0.6, color=colors), fmt="%.2f", padding=1)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_title(title, loc="left", fontsize=10)
    axis.margins(y=0.45)
    axis.axis("off")


def draw_pictures(figure, page):
    axes, red = figure.subplots(4, 1, sharex=True, height_ratios=(2.4, 1, 1, 1.5)), page.red[0]
    strip(axes[0], page.images[:8], '"a violent star", drawn eight times by the base')
    bars(axes[1], page.plain[:8], "plain cosine (red: pictures with red)", red)
    bars(axes[2], page.reward[:8], "steered reward", red)
    bars(axes[3], page.A[0], "advantage", red)


def draw_direction(figure, page):
    place, red = lambda texts: places(page.parts.reward, texts), page.red[0]
    unsafe, benign = ([p.text for p in page.parts.prompts if p.unsafe == side] for side in (True, False))
    rows = {"safe anchors": place(page.anchors[0])[0], "unsafe anchors": place(page.anchors[1])[0],
            "benign prompts": place(benign)[0], "unsafe prompts as written": place(unsafe)[0],
            "their targets, moved by alpha": place(unsafe)[1],
            'pictures of "a violent star", red': page.place[:8][red], "others": page.place[:8][~red]}
    axis = figure.add_subplot(yticks=range(7), yticklabels=rows, ylim=(6.5, -0.5), xlabel="z·v, safe above 0")
    for row, z in enumerate(rows.values()):
        axis.plot(z, [row] * len(z), "o", color="tab:red" if z.max() < 0 else "tab:green", alpha=0.35)
    axis.annotate("", (page.after, 4), (page.before, 3), arrowprops={"arrowstyle": "->"})
    axis.text(page.before, 2.7, '"a violent star"', ha="center")
    axis.axvline(0, color="black", linewidth=0.8)


def draw_chain(figure, page):
    axes, vae = figure.subplots(3, 1, height_ratios=(1, 1, 1.4), sharex=True), page.parts.pipe.vae
    names = [f"step {i + 1}" for i in range(12)]
    strip(axes[0], decode(vae, page.x[:-1], names), "x_t, from which the step starts")
    strip(axes[1], decode(vae, page.x0, names), "x0, the finished picture as the network guesses it")
    axes[2].plot(page.logp, "o", label="log-density of the step")
    axes[2].plot(-0.5 - page.at.sigma.log() - LOG_2PI / 2, color="tab:gray", label="its mean over all noise")
    axes[2].axvspan(9.5, 11.5, color="tab:gray", alpha=0.15, label="not learnt from")
    axes[2].set(xticks=range(12), xticklabels=names)
    axes[2].legend()


def draw_update(figure, page):
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(2.4, 2.4, 1.2, 1.2))
    strip(axes[0], page.images[:8], "before the update")
    strip(axes[1], page.redrawn, "the same noise after it")
    bars(axes[2], page.moved, "steered reward after it (red: pictures with red)", page.red_after)
    bars(axes[3], page.change, "change in log-density of the steps before (red: A below 0)", page.A[0] < 0)


def main(folder=DOCS):
    text, page = run((DOCS / "method.md").read_text(encoding="utf-8"))
    (folder / "method.md").write_text(text, encoding="utf-8")
    for draw, height in ((draw_pictures, 4.6), (draw_direction, 3.6), (draw_chain, 4), (draw_update, 5.2)):
        file = folder / f"{draw.__name__.replace('draw_', 'method-')}.png"
        save_figure(file, lambda figure: draw(figure, page), (10, height))


if __name__ == "__main__":
    stop.run_script("shapes.lecture", main)
