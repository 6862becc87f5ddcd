"""One model's pictures, drawn and judged by batches, and the file that a second start goes on from.

Every finished picture is one line of OUT/MODEL/rows.jsonl, below a header: what made it, by content. Several
processes take a batch each in every round, and the first writes for all.
"""

import json
import re
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from evaluation import samplers
from evaluation.rows import Row
from plumbing import models, parallel, run
from sample import autocast

# in a header for its reader: their weights are compared
NAMES = ("q16.clip", "clip.clip", ".detector", ".colours", ".name")


def slug(name: str) -> str:
    """A folder's name for a model: its last letters, of any script, and what every file system takes."""
    return re.sub(r"[^\w.]+", "-", name)[-80:].strip("-.") or "model"


def saved(folder: Path, row: Row) -> Path:
    """Where --save-images keeps a picture."""
    return folder / "pictures" / f"{row.key}.png"


def refuse_changes(path: Path, was: dict, now: dict):
    """Results that were made otherwise are never mixed, nor continued."""
    changed = [line for line in run.differences(was, now) if not line.partition(":")[0].endswith(NAMES)]
    if changed:
        raise ValueError(f"{path} was made with other settings ({'; '.join(changed)}): choose another --out, "
                         "or delete that file")


def open_results(name: str, trick: str, folder: Path, args, header: dict) -> tuple[Path, dict, dict]:
    """The file of a model's results, who the model is, and what an earlier start finished. With --rescore the
    file is a new one, and the model is who it was when the pictures were saved."""
    path = folder / "rows.jsonl"
    lines = run.read_lines(path)
    if args.rescore:
        if not lines:
            raise ValueError(f"--rescore: {path} is not there: run once with --save-images")
        refuse_changes(path, {"settings": lines[0]["settings"]}, {"settings": header["settings"]})
        path, model, lines = folder / "rescored.jsonl", lines[0]["model"], []  # all is judged again
    else:
        base, adapters = models.trace("--model", name)
        weights = run.content(base) | {adapter.name: run.content(adapter) for adapter in adapters}
        model = {"name": name, "trick": trick, "weights": weights}
    header = {**header, "model": model}
    if lines:
        refuse_changes(path, lines[0], header)
    elif not parallel.rank():
        folder.mkdir(parents=True, exist_ok=True)
        run.write_text(path, json.dumps(header) + "\n")
    return path, model, {line["key"]: line for line in lines[1:]}


def load(name: str, args):
    """The pipeline of a model, whose networks compute in --dtype."""
    pipe = models.load_pipeline(name, args.device)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        models.to_compute_type(network, getattr(torch, args.dtype))
    return pipe


def draw(pipe, rows: list[Row], trick: str, args):
    """samplers.draw under the flags. Only the networks run in autocast's precision; the steps are
    float32, but for diffusers' Euler ones, which take the networks' type."""
    with autocast(args.device, getattr(torch, args.dtype)):
        return samplers.draw(pipe, rows, args.sampler, args.steps, args.eta, trick, args.noise)


def batches_of(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows of one size and guidance together, in order, whatever was finished before: the same batches at
    every start, so that an interrupted run gives the same pictures to the last bit."""
    groups = {}
    for row in rows:
        groups.setdefault((row.width, row.height, row.guidance), []).append(row)
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


def pictures_of(pipe, trick: str, folder: Path, batch: list[Row], args) -> list[Image.Image]:
    """A batch's pictures, drawn and, with --save-images, saved; with --rescore read."""
    if args.rescore:
        return [Image.open(saved(folder, row)).convert("RGB") for row in batch]
    drawn = (draw(pipe, batch, trick, args) * 255).round().byte()  # (B, 3, H, W): what a PNG holds
    images = [Image.fromarray(pixels) for pixels in drawn.permute(0, 2, 3, 1).cpu().numpy()]
    if args.save_images:
        (folder / "pictures").mkdir(exist_ok=True)
        for row, image in zip(batch, images):
            image.save(saved(folder, row))
    return images


def finish(pipe, trick: str, path: Path, done: dict, rows: list[Row], args, chosen: list) -> dict:
    """Draw and judge what is not done, in rounds of a batch for each process. Returns key -> raw results, in
    the order of the rows. A batch of which a part is done is drawn again in full."""
    def results_of(batch: list[Row]) -> list[dict]:
        images = pictures_of(pipe, trick, path.parent, batch, args)
        lines = [{"key": row.key} for row in batch]
        for judge in chosen:
            lines = [line | found for line, found in zip(lines, judge(images, batch))]
        return lines

    todo = [batch for batch in batches_of(rows, args.batch)
            if not all(row.key in done for row in batch)
            or args.save_images and not all(saved(path.parent, row).is_file() for row in batch)]
    done, todo = parallel.gather((done, todo))[0]  # as the first process found it
    with tqdm(total=sum(map(len, todo)), desc=path.parent.name, disable=None) as bar:
        for first in range(0, len(todo), parallel.world()):
            mine = first + parallel.rank()  # the batch of this process, if there is one for it
            found = sum(parallel.gather(results_of(todo[mine]) if mine < len(todo) else []), [])
            fresh = {line["key"]: line for line in found if line["key"] not in done}
            done |= fresh
            bar.update(len(found))
            if not parallel.rank():
                with open(path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in fresh.values())
    if args.rescore and not parallel.rank():
        path.replace(path.with_name("rows.jsonl"))
    return {row.key: done[row.key] for row in rows}
