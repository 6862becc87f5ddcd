"""One model's pictures, drawn and judged by batches, and the file that a second start goes on from.

Every finished picture is one line of OUT/MODEL/rows.jsonl, below a first line that says how it was made.
Of several processes (plumbing/parallel.py) each but the first has a file of its own, rows-1.jsonl and so on,
until all are done and the first joins them. The next start goes on from all of these files.
"""

import json
import os
import re
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from evaluation import samplers
from evaluation.judges import loading, open_picture, sha256
from evaluation.rows import Row
from plumbing import parallel
from plumbing.models import load_pipeline, to_compute_type
from sample import autocast

LONGEST = 80  # letters of a model's name in that of its folder; file systems take 255 bytes


def slug(name: str) -> str:
    """A folder's name for a model: its letters, of any script, and what is safe on every file system."""
    return re.sub(r"[^\w.]+", "-", name)[-LONGEST:].strip("-.") or "model"


def folders(labels) -> dict:
    """{label: folder's name}, which differ even where letter case does not count."""
    taken, named = set(), {}
    for label in labels:
        number, name = 1, slug(label)
        while name.casefold() in taken:
            number += 1
            name = f"{slug(label)}-{number}"
        taken.add(name.casefold())
        named[label] = name
    return named


def saved(folder: Path, row: Row) -> Path:
    """Where --save-images keeps a picture."""
    return folder / "pictures" / f"{row.key}.png"


def weights_digest(pipe) -> str:
    """sha256 over the weights as loaded, the same for a folder, a hub id and a copy of either."""
    parts = []
    for name in ("unet", "text_encoder", "vae"):
        for key, value in sorted(getattr(pipe, name).state_dict().items()):
            data = value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            parts.append(sha256(f"{name}.{key}".encode() + data))
    return sha256("".join(parts).encode())


def refuse_changes(path: Path, header: dict, first: dict):
    """Results made with other settings are never mixed, nor continued."""
    changed = [k for part in header for k in header[part] if first.get(part, {}).get(k) != header[part][k]]
    if changed:
        raise ValueError(f"{path} was made with other settings ({', '.join(changed)}): choose another --out, "
                         "or delete that file")


def read_results(path: Path, header: dict) -> dict:
    """Finished pictures of an earlier start: key -> raw results. A last line that was torn is cut away."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[:data.rfind(b"\n") + 1]
    if not whole:
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    first, *lines = map(json.loads, whole.decode().splitlines())
    refuse_changes(path, header, first)
    return {line.pop("key"): line for line in lines}


def join_results(path: Path, header: dict) -> dict:
    """read_results for all processes at once, after the first has moved into the file what the files of the
    others have beyond it, by key."""
    parallel.gather(None)  # all have written what they had to
    if not parallel.rank():
        done = read_results(path, header)
        for part in sorted(path.parent.glob(f"{path.stem}-*.jsonl")):
            more = {key: found for key, found in read_results(part, header).items() if key not in done}
            write_results(path, more)
            part.unlink()
            done |= more
    parallel.gather(None)
    return read_results(path, header) if parallel.rank() else done


def write_results(path: Path, results: dict):
    """Append finished pictures, and have the disk hold them before going on."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"key": key, **found}) + "\n" for key, found in results.items())
        file.flush()
        os.fsync(file.fileno())


def batches_of(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows of one size and guidance together, in order, whatever was finished before: the same batches at
    every start, so that an interrupted run gives the same pictures to the last bit."""
    groups = {}
    for row in rows:
        groups.setdefault((row.width, row.height, row.guidance), []).append(row)
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


def open_model(name: str, trick: str, folder: Path, args, header: dict):
    """Load one model and read what an earlier start finished: pipeline, who the model is, key -> results.

    With --rescore nothing is loaded; who the model was is what the run that saved the pictures wrote down."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    if args.rescore:
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline())
        refuse_changes(path, {"settings": header["settings"]}, first)
        pipe, model, path = None, first["model"], folder / "rescored.jsonl"
        for old in [] if parallel.rank() else folder.glob("rescored*.jsonl"):
            old.unlink()
    else:
        with loading(f"the model {name}", "give the folder's path"):
            pipe = load_pipeline(name, args.device)
        model = {"name": name, "trick": trick, "weights_sha256": weights_digest(pipe)}
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            to_compute_type(part, getattr(torch, args.dtype))
    return pipe, model, join_results(path, {**header, "model": model})


def draw(pipe, rows: list[Row], trick: str, args):
    """samplers.draw under the flags. Only the networks run in autocast's precision; the steps are float32."""
    with autocast(args.device, getattr(torch, args.dtype)):
        return samplers.draw(pipe, rows, args.sampler, args.steps, args.eta, trick, args.noise)


def to_pil(images) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> 8-bit pictures, rounded: what a PNG would hold."""
    return [Image.fromarray(p) for p in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def finish_model(pipe, trick: str, folder: Path, rows: list[Row], done: dict, args, chosen: list,
                 header: dict) -> dict:
    """Draw (with --rescore: read) and judge what is not done, by batches, of which several processes take
    turns. Returns key -> raw results, in the order of the rows."""
    path = folder / ("rescored.jsonl" if args.rescore else "rows.jsonl")
    own = path.with_stem(f"{path.stem}-{parallel.rank()}") if parallel.rank() else path
    read_results(own, header)
    mine = batches_of(rows, args.batch)[parallel.rank()::parallel.world()]
    todo = [batch for batch in mine
            if not all(row.key in done for row in batch)
            or args.save_images and not all(saved(folder, row).is_file() for row in batch)]
    total = sum(map(len, mine))
    with tqdm(total=total, initial=total - sum(map(len, todo)), desc=folder.name, disable=None) as bar:
        for batch in todo:
            if args.rescore:
                images = [open_picture(saved(folder, row)) for row in batch]
            else:
                images = to_pil(draw(pipe, batch, trick, args))
            if args.save_images:
                (folder / "pictures").mkdir(exist_ok=True)
                for row, image in zip(batch, images):
                    image.save(saved(folder, row))
            judged = [judge(images, batch) for judge in chosen]
            found = {row.key: {name: value for results in judged for name, value in results[k].items()}
                     for k, row in enumerate(batch)}
            # a batch of which a part was written is drawn again in full
            write_results(own, {key: results for key, results in found.items() if key not in done})
            bar.update(len(batch))
    done = join_results(path, header)
    if args.rescore and not parallel.rank():
        os.replace(path, folder / "rows.jsonl")
    return {row.key: done[row.key] for row in rows}
