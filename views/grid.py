"""Labelled grids of pictures: those of a run, base above policy, and sample.py's, model below model."""

import json
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from plumbing import parallel
from plumbing.flags import Parser, default_device, real, usable, whole
from plumbing.log import heading
from plumbing.models import check_model, load_pipeline, to_compute_type, without_adapter
from plumbing.run import write_text
from sample import ddim_schedule, draw, image_generator
from views import only_shown
from views.curves import draw_curves

GRID_COLUMNS = 8        # pictures per prompt in a grid
EARLY = 1, 2, 5, 10, 20 # rollouts after which there is a grid, whatever --picture-every is
LABEL = 18              # letters in a line of a row's label
NARROW = 20             # width of a sheet at least, in heights of its letters


# -------------------------------------------------------------------------------- sheets

def save_grid(images, path, columns: int, row_labels=(), column_labels=(), captions=(), framed=None):
    """Write pictures (N, 3, H, W) in [0, 1] as one labelled PNG, row by row; small ones at 96 pixels.
    captions: each above its share of the rows. framed: (N,) bool, which pictures have a red frame."""
    zoom = max(1, round(96 / images.shape[-1]))
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, _, height, width = images.shape
    rows, edge, size = n // columns, max(2, height // 128), max(14, height // 18)
    font, gap, line = ImageFont.load_default(size), 2 * edge, size + 3
    row_labels = [textwrap.wrap(label, LABEL) for label in row_labels]
    left = gap + max((int(font.getlength(text)) + 8 for label in row_labels for text in label), default=0)
    whole = max(left + columns * (width + gap), NARROW * size)
    captions = [textwrap.wrap(caption, 3 * whole // (2 * size)) for caption in captions]  # even of capitals
    head, above = line + gap if column_labels else gap, [line * len(text) + size for text in captions]
    tops = [head + row * (height + gap) + sum(above[:1 + row * len(above) // rows]) for row in range(rows)]
    sheet = Image.new("RGB", (whole, tops[-1] + height + gap), "white")
    pen = ImageDraw.Draw(sheet)

    for column, label in enumerate(column_labels):
        pen.text((left + column * (width + gap), 2), label, "black", font)
    for number, caption in enumerate(captions):
        top = tops[number * rows // len(captions)] - above[number] + size // 2
        pen.text((4, top), "\n".join(caption), "black", font)
    for top, label in zip(tops, row_labels):
        pen.text((4, top + max(0, height - line * len(label)) // 2), "\n".join(label), "black", font)
    for i, pixels in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()):
        x, top = left + i % columns * (width + gap), tops[i // columns]
        if framed is not None and framed[i]:
            sheet.paste("red", (x - edge, top - edge, x + width + edge, top + height + edge))
        sheet.paste(Image.fromarray(pixels), (x, top))
    sheet.save(path)


def blur(images):
    """Average over blocks of an eighth of the width: colours and layout stay, content does not."""
    block = images.shape[-1] // 8
    small = torch.nn.functional.avg_pool2d(images, block)
    return torch.nn.functional.interpolate(small, images.shape[-2:], mode="nearest")


# -------------------------------------------------------------------------------- a run's grid

def picture_prompts(prompts, most: int = 8) -> list:
    """The first prompts of each category in turn: the same at every epoch."""
    groups = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    turns = [p for row in range(most) for group in groups.values()
             for p in group[row * len(group) // most:][:1]]
    return list(dict.fromkeys(turns))[:most]


def draw_both(parts, prompts: list, args, key: str) -> list:
    """Pictures (N, 3, H, W) on the CPU by base and by what is learnt, on one noise for `key` and number."""
    def drawn_by(unet):
        generators = [image_generator(args.seed, key, i) for i in range(len(prompts))]
        _, images = draw(parts.pipe, unet, parts.schedule, [p.text for p in prompts], generators,
                         args.guidance, args.sample_batch, parts.dtype, keep=False)
        return images.cpu()

    with without_adapter(parts.policy, parts.base):
        base = drawn_by(parts.base)
    return [base, drawn_by(parts.learnt)]


def is_due(done: int, args) -> bool:
    """Whether a run is looked at after so many rollouts."""
    return done == args.epochs or done % args.picture_every == 0 or done in EARLY


def show_run(folder: Path, done: int, parts, args, judge=None, judged=(), prompts=None):
    """The grid, of the run's own prompts, if none are given, and the curves of a run so far."""
    if parallel.rank():
        return
    with only_shown("grid of pictures"):
        draw_grid(folder, done, parts, args, judge, prompts)
    with only_shown("curves"):
        draw_curves(folder, args.clip_range, judged)


def draw_grid(folder: Path, done: int, parts, args, judge=None, prompts=None):
    """A grid of fixed prompts, half of them benign, and noise, base above policy. Pictures of unsafe prompts
    are blurred unless --show-unsafe asks for them; those of which the judge says so have a red frame, and a
    file beside the grid has their share of each unsafe prompt, of base and policy."""
    prompts = prompts or parts.prompts
    sides = [picture_prompts([p for p in prompts if p.unsafe == side]) for side in (True, False)]
    shown = [p for side in sides for p in side[:4 if all(sides) else 8]]
    repeated = [p for p in shown for _ in range(GRID_COLUMNS)]
    drawn = torch.stack(draw_both(parts, repeated, args, "grid"))  # (2, N, 3, H, W)
    framed = torch.tensor([[looks_unsafe(judge, image, p) for image, p in zip(images, repeated)]
                           for images in drawn])
    hidden = torch.tensor([p.unsafe and not args.show_unsafe for p in repeated]).view(-1, 1, 1, 1)
    drawn = torch.where(hidden, blur(drawn.flatten(0, 1)).view_as(drawn), drawn)
    by_prompt = lambda both: both.unflatten(1, (len(shown), -1)).transpose(0, 1).flatten(0, 2)
    save_grid(by_prompt(drawn), folder / f"pictures-{done:06d}.png", GRID_COLUMNS,
              ["base", f"after {done} rollout{'s' * (done > 1)}"] * len(shown),
              captions=[p.text for p in shown], framed=by_prompt(framed))
    shares = framed.float().unflatten(1, (len(shown), -1)).mean(2).T.tolist()
    judged = {p.text: share for p, share in zip(shown, shares) if p.unsafe} if judge else {}
    if judged:
        tqdm.write(f"unsafe after {done} (base): " + ", ".join(
            f"{text} {after:.0%} ({base:.0%})" for text, (base, after) in judged.items()))
        write_text(folder / f"pictures-{done:06d}.json", json.dumps(judged))


def looks_unsafe(judge, image, prompt) -> bool:
    """Whether a judge says so of a picture (3, H, W): by a figure whose name ends in "unsafe"."""
    seen = judge(image[None], [prompt]) if judge else {}
    return any(name.endswith("unsafe") and (value or 0) > 0.5 for name, value in seen.items())


# -------------------------------------------------------------------------------- sample.py's

def parse_args(argv=None):
    parser = Parser(prog="sample.py", description="Draw pictures from a checkpoint into one labelled grid.")
    add = parser.add_argument
    add("--model", default="CompVis/stable-diffusion-v1-4",
        help="folder, hub id, NAME:SUBFOLDER, or a run's checkpoint")
    add("--compare", nargs="+", action="extend", default=[], metavar="MODEL",
        help="more models, on the same noise, one below the other: a run's base and its checkpoints")
    add("--prompt", nargs="+", action="extend", required=True, help="may be given several times")
    add("--seed", type=int, nargs="+", default=[0], help="one picture per prompt and seed")
    add("--steps", type=whole(1), default=50)
    add("--eta", type=real("[0, 1]"), default=1.0, help="0: deterministic DDIM; training has 1")
    add("--guidance", type=real("[0, inf]"), default=5.0)
    add("--batch", type=whole(1), default=8, help="pictures drawn at once")
    add("--device", default=default_device())
    add("--out", default="grid.png")
    return parser.parse_args(argv)


def main(argv=None):
    """Pictures of --prompt and --seed by --model and each of --compare, as one grid. What cannot work is
    refused before any weights are read."""
    args = parse_args(argv)
    out, models = Path(args.out), [args.model, *args.compare]
    if out.suffix.lower() not in Image.registered_extensions() or out.is_dir():
        raise ValueError(f"--out {out}: has to be a file with the ending of a kind of picture, such as "
                         f"{out.name or 'grid'}.png")
    print(heading(out))
    device = usable(args.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--model", *["--compare"] * len(args.compare)]
    schedules = [ddim_schedule(check_model(flag, model), args.steps, args.eta).to(device)
                 for flag, model in zip(flags, models)]
    texts = [prompt for prompt in args.prompt for _ in args.seed]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for model, schedule in zip(models, schedules):
        pipe = load_pipeline(model, device)
        to_compute_type(pipe.unet, dtype), to_compute_type(pipe.vae, dtype)
        # the noise depends on the seed alone, so that models, and prompts, are compared on the same noise
        generators = [image_generator(seed, "sample") for _ in args.prompt for seed in args.seed]
        _, images = draw(pipe, pipe.unet, schedule, texts, generators, args.guidance, args.batch, dtype,
                         keep=False)
        rows.append(images.cpu().unflatten(0, (len(args.prompt), len(args.seed))))
        del pipe  # before the next one is loaded
    grid = torch.stack(rows, 1).flatten(0, 2)     # prompt by prompt, the models below each other
    names = ["/".join(Path(model).parts[-2:]) for model in models] * len(args.prompt) if args.compare else ()
    save_grid(grid, out, len(args.seed), names, [f"seed {seed}" for seed in args.seed], args.prompt)
    print(f"{out}: {len(grid)} pictures, {args.steps} steps, eta {args.eta}, guidance {args.guidance}, "
          "no safety checker")
