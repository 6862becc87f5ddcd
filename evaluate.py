"""The paper's tables for a model beside its base, each figure with its provenance.

Five suites: `i2p` (4,703 prompts; inappropriate rate and exposed parts), `geneval` (553 prompts x 4;
compositional accuracy), `coco` (a captions CSV; CLIP score and FID), `prompts` (our .txt files by category,
or any CSV of prompts) and `shapes` (the exact test bed). Pictures are drawn as others can draw them: a seed,
guidance and size per row, DDIM or the LMS sampler of RECE's and the paper's evaluation code. The safety
checker is always off.

    python evaluate.py --model shapes --suite shapes
    python evaluate.py --model runs/x/final --base CompVis/stable-diffusion-v1-4 --suite i2p
    python evaluate.py --model runs/x/final --base CompVis/stable-diffusion-v1-4 --suite i2p --also sld-medium

evaluation/suites.py says what is drawn, evaluation/samplers.py how, evaluation/judges.py and geneval.py what
is in the pictures, evaluation/tables.py what follows. Every finished picture is one line of
OUT/MODEL/rows.jsonl, joined by case number and never by position: the same command goes on where it was
stopped, and ends with the same report.

Departures. GenEval's own script samples with the pipeline's default scheduler (PNDM), and leaves the safety
checker on: here DDIM (or --sampler lms), and off. A CSV without a seed column gives every row its own seed,
where RECE's code gives all of them 42.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import geneval
import shapes
from evaluation import judges, tables
from evaluation.samplers import TRICKS, draw
from evaluation.suites import Row, read_suite
from report import blur
from sample import ALIASES, check_pipeline_folder, default_device, load_pipeline, save_grid
from train import SHAPES

# The suites' own settings. I2P, COCO and attack prompts as RECE's and R1's generate_images.py; GenEval as its
# generation/diffusers_generate.py (guidance 9, seed 42 for every prompt); shapes as train.py samples.
SUITES = {
    "i2p": dict(sampler="lms", steps=50, eta=0.0, guidance="csv", samples=1, judges="q16,nudenet"),
    "geneval": dict(sampler="ddim", steps=50, eta=0.0, guidance=9.0, samples=4, judges="geneval"),
    "coco": dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="clip"),
    "prompts": dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="q16,nudenet"),
    "shapes": dict(sampler="ddim", steps=SHAPES["steps"], eta=1.0, guidance=SHAPES["guidance"], samples=1,
                   judges="shapes")}
GRID = 15  # pictures of each model in the grid


def to_pil(images) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> 8-bit pictures, rounded: what a PNG would hold."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels]


def judge_shapes(images: list, rows: list[Row]) -> list[dict]:
    """The pixel detector: objects, red among them, unsafe, and whether a benign caption is satisfied."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    return [{"unsafe": bool(unsafe), "red": shapes.count_red(found),
             "correct": shapes.is_correct(row.prompt, found) if row.groups[0] in shapes.TASKS else None,
             "objects": [[o.color, o.shape, round(o.x, 1), round(o.y, 1), round(o.size, 1)] for o in found]}
            for row, found, unsafe in zip(rows, shapes.detect(pixels), shapes.is_unsafe(pixels))]


def make_judges(args, files: dict) -> tuple[list, dict]:
    """The judges asked for, in one list, and what they are: names, hashes, thresholds."""
    chosen, facts, clips = [], {}, {}

    def clip(name, flag):
        if name not in clips:
            clips[name] = judges.load_clip(name, args.device, flag)
        return clips[name]

    if "q16" in args.judges:
        vectors = {k: judges.q16_vectors(files[k].read_bytes(), k) for k in ("q16_original", "q16_finetuned")}
        chosen.append(judges.make_q16(clip(args.q16_clip, "--q16-clip")[0], vectors))
        hashes = {k: judges.sha256(files[k]) for k in vectors}
        facts["q16"] = {"clip": args.q16_clip, "rule": "arg-max", **hashes}
    if "nudenet" in args.judges:
        judge, digest = judges.make_nudenet(args.nudenet_onnx)
        chosen.append(judge)
        facts["nudenet"] = {"version": metadata.version("nudenet"), "onnx_sha256": digest,
                            "weights_of_3.0.8": digest == judges.NUDENET_SHA256, "cut": tables.PART_CUT}
    if "clip" in args.judges:
        chosen.append(judges.make_clip_score(*clip(args.score_clip, "--score-clip")))
        facts["clip"] = {"clip": args.score_clip, "scale": "cosine"}
    if "geneval" in args.judges:
        try:
            detector = geneval.Detector.from_pretrained(args.detector, use_safetensors=True)
        except OSError as error:
            raise OSError(f"cannot load {args.detector} ({str(error).splitlines()[0]}); with no network, "
                          "download it elsewhere and pass the folder with --detector")
        chosen.append(geneval.make_judge(detector.to(args.device).eval(), *clip(args.q16_clip, "--q16-clip"),
                                         args.device))
        facts["geneval"] = {"detector": args.detector, "colours": args.q16_clip, "cut": geneval.CUT,
                            "counting_cut": geneval.COUNTING_CUT, "official_detector": False}
    if "shapes" in args.judges:
        chosen.append(judge_shapes)
        facts["shapes"] = {"detector": "shapes.detect"}
    return chosen, facts


def weights_digest(pipe) -> str:
    """sha256 over the weights as loaded, the same for a folder, a hub id and a copy of either."""
    parts = []
    for name in ("unet", "text_encoder", "vae"):
        for key, value in sorted(getattr(pipe, name).state_dict().items()):
            data = value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            parts.append(judges.sha256(f"{name}.{key}".encode() + data))
    return judges.sha256("".join(parts).encode())


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


def batches_of(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows of one size and guidance together, in order, whatever was finished before: the same batches at
    every start, so that an interrupted run gives the same pictures to the last bit."""
    groups = {}
    for row in rows:
        groups.setdefault((row.width, row.height, row.guidance), []).append(row)
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


def open_model(name: str, trick: str, folder: Path, args, header: dict):
    """Load one model and read what an earlier start finished: pipeline, header, key -> raw results.

    With --rescore nothing is loaded; who the model was is what the run that saved the pictures wrote down."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    if args.rescore:
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline())
        refuse_changes(path, {"settings": header["settings"]}, first)
        (folder / "rescored.jsonl").unlink(missing_ok=True)
        header = {**header, "model": first["model"]}
        return None, header, read_results(folder / "rescored.jsonl", header)
    try:
        pipe = load_pipeline(name, args.device)
    except OSError as error:
        raise OSError(f"cannot load the model {name} ({str(error).splitlines()[0]}); with no network, "
                      "download it elsewhere and give the folder's path")
    header = {**header, "model": {"name": name, "trick": trick, "weights_sha256": weights_digest(pipe)}}
    return pipe, header, read_results(path, header)


def saved(folder: Path, row: Row) -> Path:
    """Where --save-images keeps a picture."""
    return folder / "pictures" / f"{row.key}.png"


def finish_model(pipe, trick: str, folder: Path, rows: list[Row], done: dict, args, chosen: list) -> dict:
    """Draw (with --rescore: read) and judge what is not done, by batches. Returns key -> raw results."""
    path = folder / ("rescored.jsonl" if args.rescore else "rows.jsonl")
    todo = [batch for batch in batches_of(rows, args.batch)
            if not all(row.key in done for row in batch)
            or args.save_images and not all(saved(folder, row).is_file() for row in batch)]
    finished = len(rows) - sum(map(len, todo))
    with open(path, "a", encoding="utf-8") as file, \
            tqdm(total=len(rows), initial=finished, desc=folder.name) as bar:
        for batch in todo:
            if args.rescore:
                images = [judges.open_picture(saved(folder, row)) for row in batch]
            else:
                images = to_pil(pictures(pipe, batch, trick, args))
            if args.save_images:
                (folder / "pictures").mkdir(exist_ok=True)
                for row, image in zip(batch, images):
                    image.save(saved(folder, row))
            results = [{} for _ in batch]
            for judge in chosen:
                results = [a | b for a, b in zip(results, judge(images, batch))]
            for row, result in zip(batch, results):
                if row.key not in done:  # a batch of which a part was written is drawn again in full
                    done[row.key] = result
                    file.write(json.dumps({"key": row.key, **result}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    if args.rescore:
        os.replace(path, folder / "rows.jsonl")
    return done


def pictures(pipe, rows: list[Row], trick: str, args):
    """samplers.draw under the flags. Only the networks run in autocast's precision; the steps are float32."""
    kind, dtype = args.device.split(":")[0], getattr(torch, args.dtype)
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        return draw(pipe, rows, args.sampler, args.steps, args.eta, trick, args.noise)


def grid_rows(rows: list[Row]) -> list[Row]:
    """The first picture of each group, up to GRID, of the first row's size: the same at every start."""
    size = rows[0].width, rows[0].height
    first = {row.groups: row for row in reversed(rows) if (row.width, row.height) == size}
    return sorted(first.values(), key=lambda row: row.case)[:GRID]


def save_strips(strips: list, names: list, shown: list[Row], args):
    """grid.png: the models' pictures of the same rows below each other, blurred unless they are harmless or
    asked for, and reduced to 256 pixels. strips: len(names) * len(shown) pictures (1, 3, H, W)."""
    hide = args.suite not in ("shapes", "geneval") and not args.show
    small = [F.avg_pool2d(p, max(1, p.shape[-1] // 256)) for p in strips]
    labels = [" ".join((*row.groups, str(row.case))) for row in shown]
    images = torch.cat([blur(p) if hide else p for p in small])
    save_grid(images, args.out / "grid.png", len(shown), names, labels)


# -------------------------------------------------------------------------------- program

def guidance_flag(text: str):
    return text if text == "csv" else float(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what").add_argument
    group("--model", required=True, help="folder, hub id, NAME:SUBFOLDER of either, or shapes")
    group("--base", help="drawn on the same noise, for paired differences")
    group("--also", action="append", default=[], help=f"further models, or {', '.join(TRICKS)} on the base")
    group("--suite", choices=SUITES, required=True)
    group("--prompts", nargs="+", metavar="FILE", help="CSV, JSONL or .txt; i2p and geneval fetch theirs")
    group("--limit", type=int, help="that many prompts, a fixed stratified draw")
    group("--images", type=int, default=200, help="shapes: pictures for each kind of prompt")
    group("--samples", type=int, help="pictures for each prompt (i2p 1, geneval 4)")
    group("--seed", type=int, default=42, help="of rows without one, and of --limit")
    group("--out", type=Path, help="default: runs/evaluate/SUITE-MODEL")
    group = parser.add_argument_group("how").add_argument
    group("--sampler", choices=("ddim", "lms"), help="lms: RECE's and the paper's; ddim: geneval and shapes")
    group("--steps", type=int)
    group("--eta", type=float, help="ddim only: 0 deterministic, 1 as in training")
    group("--guidance", type=guidance_flag, help="csv (each row's own: i2p's default) or one number")
    group("--noise", choices=("cpu", "cuda"), default="cpu", help="where noise is seeded; RECE and R1: cuda")
    group("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="autocast to that")
    group("--device", default=default_device())
    group("--batch", type=int, help="pictures drawn at once (shapes 128, else 8)")
    group = parser.add_argument_group("judges").add_argument
    group("--judges", help="from q16, nudenet, clip, geneval, shapes; the suite's own by default")
    group("--q16-clip", default="openai/clip-vit-large-patch14", help="for Q16 and for GenEval's colours")
    group("--q16-original", help="local prompts.p, in place of the download")
    group("--q16-finetuned", help="local prompts_finetuned.pt, in place of the download")
    group("--nudenet-onnx", help="other NudeNet weights, e.g. best_new.onnx")
    group("--score-clip", default="openai/clip-vit-base-patch32", help="for the CLIP score")
    group("--detector", default=geneval.DETECTOR, help="GenEval's detector")
    group("--fid", metavar="FOLDER", help="FID against these real pictures; needs --save-images")
    group("--inception", help="local inception-2015-12-05.pt, in place of the download")
    group("--inception-sha256", default="", help="what that file must hash to; its hash is reported anyway")
    group("--cache", type=Path, default=Path.home() / ".cache" / "safediffusion", help="of downloaded files")
    group = parser.add_argument_group("output").add_argument
    group("--save-images", action="store_true", help="keep every picture in OUT/MODEL/pictures")
    group("--rescore", action="store_true", help="judge saved pictures again, without generating")
    group("--show", action="store_true", help="do not blur the grid (shapes and geneval never are)")
    args = parser.parse_args(argv)
    args.nudenet_by_default = args.judges is None  # a default that is not installed is left out, and said so
    for name, value in SUITES[args.suite].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.judges = [name.strip() for name in args.judges.split(",")]
    args.batch = args.batch or (128 if args.suite == "shapes" else 8)
    args.out = args.out or Path("runs") / "evaluate" / f"{args.suite}-{slug(args.model)}"
    return args


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def check(args, models: dict) -> list[str]:
    """Refuse what cannot work, before anything is read or loaded. Returns what was left out."""
    known, notes = {"q16", "nudenet", "clip", "geneval", "shapes"}, []
    for name in args.judges:
        if name not in known:
            raise ValueError(f"--judges: {name} unknown; choose from {', '.join(sorted(known))}")
        if name in ("geneval", "shapes") and args.suite != name:
            raise ValueError(f"--judges {name} belongs to --suite {name}")
    for name in ("limit", "images", "samples", "steps", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta must lie between 0 and 1, not {args.eta}")
    if args.suite == "shapes" and (args.limit or args.prompts or args.samples > 1):
        raise ValueError("--suite shapes has its prompts: use --images, not --limit, --prompts or --samples")
    if args.suite in ("geneval", "shapes") and args.guidance == "csv":
        raise ValueError(f"--guidance csv: --suite {args.suite} has no guidance column; give a number")
    if "cuda" in (args.noise, args.device.split(":")[0]) and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: --device cpu and --noise cpu")
    for name, _ in models.values():
        path, _, subfolder = ALIASES.get(name, name).partition(":")
        if not args.rescore and (Path(path).exists() or path.startswith((".", "/"))):
            check_pipeline_folder(Path(path) / subfolder)
    if args.fid and not (args.save_images or args.rescore):
        raise ValueError("--fid reads the pictures from their files, as clean-fid does: add --save-images")
    if args.fid:
        judges.list_pictures(args.fid, "--fid")
    if "nudenet" in args.judges and (problem := judges.check_nudenet()):
        if not args.nudenet_by_default:
            raise ValueError(problem)
        args.judges.remove("nudenet")
        notes.append(f"no NudeNet figures: {problem.split(', or')[0]}")
    return notes


def check_saved(args, models: dict, rows: list[Row]):
    """Every picture that --rescore is to judge has to be there."""
    for label in models:
        missing = [row.key for row in rows if not saved(args.out / slug(label), row).is_file()]
        if missing:
            raise ValueError(f"--rescore: {len(missing)} of {len(rows)} pictures of {label} are not in "
                             f"{args.out} (first {missing[0]}.png): run once with --save-images")


def judge_files(args) -> dict[str, Path]:
    """The files that the judges need, local, cached or fetched, their hashes checked."""
    files = {}
    if "q16" in args.judges:
        for kind, local in (("q16_original", args.q16_original), ("q16_finetuned", args.q16_finetuned)):
            flag = "--" + kind.replace("_", "-")
            files[kind] = judges.fetch(*judges.FILES[kind], local, flag, args.cache)
    if args.fid:
        files["inception"] = judges.fetch(judges.FILES["inception"][0], args.inception_sha256, args.inception,
                                          "--inception", args.cache)
    return files


def make_report(args, rows: list[Row], raw: dict, models: dict, facts: dict, fids: dict):
    """report.md, report.json and, with matplotlib, bars_*.png. No times: a resumed run writes the same."""
    by_key = {row.key: row for row in rows}
    made = {label: tables.tables_of(args.suite, by_key, results, args.score_clip, fids.get(label))
            for label, results in raw.items()}
    labels = list(models)
    merged = tables.merge(made, (labels[0], labels[1]) if args.base else None)
    head = [f"# {args.suite}: {args.model}" + (f" beside {args.base}" if args.base else ""), "",
            f"{len(rows)} pictures a model, {args.sampler}, {args.steps} steps, guidance {args.guidance}"
            + (f", eta {args.eta}" if args.sampler == "ddim" else "")]
    text, whole = tables.markdown(merged, head, facts), {"tables": merged, "provenance": facts}
    (args.out / "report.md").write_text(text, encoding="utf-8")
    (args.out / "report.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    try:
        tables.bar_pictures(merged, args.out)
    except ImportError:
        print("no bar pictures: matplotlib is not installed", file=sys.stderr)
    print(text)


@contextmanager
def refusing():
    """Bad input ends the program with one line that says what to change. Not around the work itself, where
    the same exceptions would be mistakes of ours and deserve their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print("evaluate.py:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def name_models(args) -> dict:
    """label -> (model, trick): the model, its base, then --also, whose tricks are played on the base."""
    models = {name: (name, "") for name in (args.model, args.base) if name}
    for name in args.also:
        tricked = args.base or args.model
        models |= {f"{tricked} + {name}": (tricked, name)} if name in TRICKS else {name: (name, "")}
    if len({slug(label) for label in models}) < 1 + bool(args.base) + len(args.also):
        raise ValueError("--model, --base and --also name the same model twice")
    return models


def commit() -> str:
    """Of this repository, or "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv=None):
    args, started = parse(argv), time.time()
    with refusing():
        models = name_models(args)
        notes = check(args, models)
        rows, source, remarks = read_suite(args)
        if args.rescore:
            check_saved(args, models, rows)
        files = judge_files(args)
        chosen, judged = make_judges(args, files)
    notes += remarks
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    flags = ("suite", "sampler", "steps", "eta", "guidance", "noise", "dtype", "seed", "samples")
    flags += ("images",) * (args.suite == "shapes")
    settings = {**source, **{flag: getattr(args, flag) for flag in flags}}
    raw, strips, made, fids = {}, [], {}, {}
    for label, (name, trick) in models.items():
        folder = args.out / slug(label)
        with refusing():
            header = {"settings": settings, "judges": judged}
            pipe, header, done = open_model(name, trick, folder, args, header)
        made[label] = header["model"]
        if pipe is not None:
            strips += [pictures(pipe, [row], trick, args).cpu() for row in grid_rows(rows)]
        raw[label] = finish_model(pipe, trick, folder, rows, done, args, chosen)
        del pipe
    if strips:
        save_strips(strips, list(models), grid_rows(rows), args)
    if args.fid:
        inception = torch.jit.load(str(files["inception"]), map_location=args.device).eval()
        real = judges.inception_features(inception, judges.list_pictures(args.fid, "--fid"), args.device)
        for label in models:
            drawn = [saved(args.out / slug(label), row) for row in rows]
            features = judges.inception_features(inception, drawn, args.device)
            fids[label] = judges.frechet_distance(features, real)
        judged["fid"] = {"real_pictures": len(real), "resize": "clean",
                         "inception_sha256": judges.sha256(files["inception"]),
                         "hash_checked": bool(args.inception_sha256)}
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow")
    facts = {"models": made, **settings, "judges": judged, "notes": notes, "safety_checker": "off",
             "device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu", "commit": commit(),
             "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}}
    make_report(args, rows, raw, models, facts, fids)
    print(f"{args.out / 'report.md'}: {len(rows)} pictures of each of {len(models)} models, "
          f"{time.time() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; the same command goes on from here")
