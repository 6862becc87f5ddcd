"""The paper's tables for a model beside its base, each figure with its provenance.

Five suites: `i2p` (4,703 prompts, inappropriate rate and exposed parts), `geneval` (553 prompts x 4, compositional
accuracy), `coco` (CLIP score and FID for a captions CSV), `prompts` (our .txt files by category, or any CSV of
prompts) and `shapes` (the exact test bed). Pictures are drawn as others can draw them: a seed, guidance and size
per row, DDIM or the LMS sampler of RECE's and the paper's evaluation code. The safety checker is always off.

    python evaluate.py --model shapes --suite shapes
    python evaluate.py --model runs/x/final --base CompVis/stable-diffusion-v1-4 --suite i2p
    python evaluate.py --model runs/x/final --base CompVis/stable-diffusion-v1-4 --suite i2p --also sld-medium

judges.py turns pictures into raw figures, geneval.py is one more judge, tables.py makes the report. Every finished
picture is one line of OUT/MODEL/rows.jsonl, joined by case number: the same command goes on where it was stopped.

Departures. GenEval's own script samples with the pipeline's default scheduler (PNDM): here DDIM, or --sampler lms.
A CSV without a seed column gives every row its own seed, where RECE's code gives all of them 42. Row 2260 of I2P has
no prompt (the hub's copy says "Null", readers that use pandas draw "nan"): it is drawn with the empty prompt.
"""

import argparse
import csv
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import geneval
import judges
import shapes
import tables
from reward import read_prompts
from sample import ALIASES, check_pipeline_folder, default_device, load_pipeline, save_grid
from samplers import TRICKS, draw
from train import blur

I2P_HUB = ("AIML-TUDA/i2p", "i2p_benchmark.csv")
# The suites' own settings. I2P, COCO and attack prompts as RECE's and R1's generate_images.py; GenEval as its
# generation/diffusers_generate.py (guidance 9, seed 42 for every prompt); shapes as train.py samples.
SUITES = {
    "i2p": dict(sampler="lms", steps=50, eta=0.0, guidance="csv", samples=1, judges="q16,nudenet"),
    "geneval": dict(sampler="ddim", steps=50, eta=0.0, guidance=9.0, samples=4, judges="geneval"),
    "coco": dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="clip"),
    "prompts": dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, judges="q16,nudenet"),
    "shapes": dict(sampler="ddim", steps=20, eta=1.0, guidance=3.0, samples=1, judges="shapes")}
# What a row needs -> the columns that may hold it: the hub's names and those of the repackaged ESD file. An attack's
# CSV has its prompts in adv_prompt, as R1's evaluator reads it.
COLUMNS = {"prompt": ("adv_prompt", "prompt", "caption"), "categories": ("categories",),
           "seed": ("evaluation_seed", "sd_seed"), "guidance": ("evaluation_guidance", "sd_guidance_scale"),
           "width": ("sd_image_width",), "height": ("sd_image_height",), "case": ("case_number",)}
GRID = 15  # pictures of each model in the grid


@dataclass(frozen=True)
class Row:
    """One picture to draw and judge."""
    case: int              # what everything is joined by, with `image`
    image: int             # the how-manieth picture of its prompt: the how-manieth draw of the prompt's noise stream
    prompt: str
    groups: tuple          # I2P's categories, GenEval's task, a prompt file's category
    seed: int
    guidance: float
    width: int = 0         # 0: the model's own size
    height: int = 0
    facts: dict | None = None  # GenEval's clauses

    @property
    def key(self) -> str:
        return f"{self.case:05d}_{self.image}"


# ------------------------------------------------------------------------------------------------------------ suites

def csv_rows(path: Path, required: tuple, guidance, seed: int, notes: list) -> list[Row]:
    """The rows of a CSV with I2P's columns in either published format, or with fewer where `required` says so."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = {need: next((c for c in options if c in (reader.fieldnames or ())), None)
                 for need, options in COLUMNS.items()}
        missing = [" or ".join(COLUMNS[need]) for need in required if names[need] is None]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}")
        lines = list(reader)
    rows = []
    for index, line in enumerate(lines):
        fact = {need: line[name] for need, name in names.items() if name is not None}
        try:
            numbers = {need: int(fact[need]) for need in ("case", "seed", "width", "height") if need in fact}
            number = float(fact["guidance"] if guidance == "csv" else guidance)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, row {index}: {error}; seed, size and case number must be whole numbers")
        if any(numbers.get(side, 0) % 8 for side in ("width", "height")):
            raise ValueError(f"{path}, row {index}: width and height must be multiples of 8, the VAE's factor")
        case, text = numbers.get("case", index), fact["prompt"].strip()
        if text in ("", "Null"):
            notes.append(f"case {case} has no prompt ({fact['prompt']!r} in the file): drawn with the empty prompt")
            text = ""
        rows.append(Row(case, 0, text, tuple(c for c in tables.I2P if c in fact.get("categories", "")),
                        numbers.get("seed", seed + case), number, numbers.get("width", 0), numbers.get("height", 0)))
    if len({row.case for row in rows}) < len(rows):
        raise ValueError(f"{path}: the same {names['case']} stands in several rows; everything is joined by it")
    return rows


def shapes_rows(images: int, guidance: float, seed: int) -> list[Row]:
    """At least `images` pictures for each kind of prompt (harm trained on, held out, explicit, calm, benign), spread
    evenly over the kind's categories and over each category's captions."""
    held_out = tuple(c for c in shapes.HARM_WORDS if c not in shapes.TRAINED_ON)
    texts = {}
    for text, category in shapes.evaluation_prompts():
        texts.setdefault(category, []).append(text)
    picked = [(texts[category][i % len(texts[category])], category)
              for kind in (shapes.TRAINED_ON, held_out, ("explicit",), ("calm",), shapes.TASKS)
              for category in kind for i in range(-(-images // len(kind)))]
    return [Row(case, 0, text, (category,), seed + case, guidance) for case, (text, category) in enumerate(picked)]


def stratified(rows: list[Row], limit: int, seed: int) -> list[Row]:
    """A fixed draw of `limit` prompts, each group in proportion: every (n / limit)-th row of the rows sorted by group,
    in random order within a group. Kept in the order of the file."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: row.groups)  # stable: random within a group
    picked = {order[int((i + 0.5) * len(order) / limit)].case for i in range(min(limit, len(order)))}
    return [row for row in rows if row.case in picked]


def read_suite(args) -> tuple[list[Row], dict, list[str]]:
    """The rows of a suite, where they came from, and what has to be said about them."""
    notes, source, guidance = [], {}, args.guidance
    path = Path(args.prompts[0]) if args.prompts else None
    if args.suite == "shapes":
        rows = shapes_rows(args.images, guidance, args.seed)
    elif args.suite == "geneval":
        path = judges.fetch(geneval.URL, "" if path else geneval.SHA256, path, "--prompts", args.cache)
        rows = [Row(case, 0, m["prompt"], (m["tag"],), args.seed, guidance, facts=m)
                for case, m in enumerate(geneval.read_metadata(path))]
    elif args.suite == "prompts" and path and path.suffix != ".csv":
        rows = [Row(case, 0, p.text, (p.category,) if p.category else (), args.seed + case, guidance)
                for case, p in enumerate(read_prompts(args.prompts))]
        source["prompts"] = {str(p): judges.sha256(p) for p in args.prompts if Path(p).is_file()}
    else:
        if path is None and args.suite != "i2p":
            raise ValueError(f"--suite {args.suite} needs --prompts FILE.csv" + " or FILE.txt" * (args.suite == "prompts"))
        if path is None:
            path, source["prompts_revision"] = hub_csv()
        required = ("prompt", "categories", "seed", "width", "height") if args.suite == "i2p" else ("prompt",)
        required += ("guidance",) * (guidance == "csv")
        rows = csv_rows(path, required, guidance, args.seed, notes)
    if path and "prompts" not in source:
        source["prompts"] = {path.name: judges.sha256(path)}
    if not rows:
        raise ValueError(f"{path}: no prompt in it")
    if args.limit:
        total, rows = len(rows), stratified(rows, args.limit, args.seed)
        notes.append(f"{len(rows)} of {total} prompts, a stratified draw with seed {args.seed}")
    uncategorised = sum(not row.groups for row in rows)
    if args.suite == "i2p" and uncategorised:
        notes.append(f"{uncategorised} rows are in none of I2P's seven categories and count in overall only")
    return [Row(**{**vars(row), "image": k}) for row in rows for k in range(args.samples)], source, notes


def hub_csv() -> tuple[Path, str]:
    """I2P from the hub's cache or the hub, and its revision."""
    from huggingface_hub import hf_hub_download
    try:
        path = Path(hf_hub_download(*I2P_HUB, repo_type="dataset"))
    except OSError as error:
        raise OSError(f"cannot fetch {'/'.join(I2P_HUB)} from the hub ({str(error).splitlines()[0]}); get the file on a "
                      "connected machine and pass it with --prompts FILE.csv")
    return path, path.parent.name


# ------------------------------------------------------------------------------------------------ one model, resumable

def to_pil(images) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> 8-bit pictures, rounded: what a PNG would hold."""
    return [Image.fromarray(np.ascontiguousarray(p)) for p in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


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
        vectors = {kind: judges.q16_vectors(files[kind].read_bytes(), kind) for kind in ("q16_original", "q16_finetuned")}
        chosen.append(judges.make_q16(clip(args.q16_clip, "--q16-clip")[0], vectors))
        facts["q16"] = {"clip": args.q16_clip, "rule": "arg-max", **{k: judges.sha256(files[k]) for k in vectors}}
    if "nudenet" in args.judges:
        judge, digest = judges.make_nudenet(args.nudenet_onnx)
        chosen.append(judge)
        facts["nudenet"] = {"version": metadata.version("nudenet"), "onnx_sha256": digest, "cut": tables.PART_CUT,
                            "published_weights": digest == judges.NUDENET_SHA256}
    if "clip" in args.judges:
        chosen.append(judges.make_clip_score(*clip(args.score_clip, "--score-clip")))
        facts["clip"] = {"clip": args.score_clip, "scale": "cosine"}
    if "geneval" in args.judges:
        try:
            detector = geneval.Detector.from_pretrained(args.detector, use_safetensors=True).to(args.device).eval()
        except OSError as error:
            raise OSError(f"cannot load {args.detector} ({str(error).splitlines()[0]}); with no network, download it "
                          "elsewhere and pass the folder with --detector")
        judge = geneval.make_judge(detector, *clip(args.q16_clip, "--q16-clip"), args.device)
        chosen.append(lambda images, rows: [{"geneval": r} for r in judge(images, [row.facts for row in rows])])
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
            parts.append(judges.sha256(f"{name}.{key}".encode() + value.cpu().contiguous().view(-1).view(torch.uint8)
                                       .numpy().tobytes()))
    return judges.sha256("".join(parts).encode())


def read_results(path: Path, header: dict) -> dict:
    """Finished pictures of an earlier start: key -> raw results. A last line that was torn off is cut away."""
    if not path.is_file() or not (data := path.read_bytes()).count(b"\n"):
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return {}
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    first, *lines = map(json.loads, whole.decode().splitlines())
    changed = [k for part in header for k in header[part] if first.get(part, {}).get(k) != header[part][k]]
    if changed:
        raise ValueError(f"{path} was made with other settings ({', '.join(changed)}): choose another --out, or delete it")
    return {line.pop("key"): line for line in lines}


def batches_of(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows of one size and guidance together, in order, whatever was finished before: the same batches at every start,
    so that an interrupted run gives the same pictures to the last bit."""
    groups = {}
    for row in rows:
        groups.setdefault((row.width, row.height, row.guidance), []).append(row)
    return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]


def open_model(name: str, trick: str, folder: Path, args, header: dict):
    """Load one model and read what an earlier start finished: pipeline, header, key -> raw results. With --rescore
    nothing is loaded, and the header's word on the model is that of the run that saved the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    if args.rescore:
        with open(folder / "rows.jsonl", encoding="utf-8") as file:
            header = {**header, "model": json.loads(file.readline())["model"]}
        (folder / "rescored.jsonl").unlink(missing_ok=True)
        return None, header, read_results(folder / "rescored.jsonl", header)
    pipe = load_pipeline(name, args.device)
    header = {**header, "model": {"name": name, "trick": trick, "weights_sha256": weights_digest(pipe)}}
    return pipe, header, read_results(folder / "rows.jsonl", header)


def finish_model(pipe, trick: str, folder: Path, rows: list[Row], done: dict, args, chosen: list) -> dict:
    """Draw (with --rescore: read) and judge what is not done, a batch at a time. Returns key -> raw results."""
    saved, path = folder / "pictures", folder / ("rescored.jsonl" if args.rescore else "rows.jsonl")
    saved.mkdir(exist_ok=True) if args.save_images else None
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(rows), desc=folder.name) as bar:
        for batch in batches_of(rows, args.batch):
            bar.update(len(batch))
            if all(row.key in done for row in batch):
                continue
            if args.rescore:
                images = [judges.open_picture(saved / f"{row.key}.png") for row in batch]
            else:
                images = to_pil(pictures(pipe, batch, trick, args))
            for row, image in zip(batch, images if args.save_images else ()):
                image.save(saved / f"{row.key}.png")
            results = [{} for _ in batch]
            for judge in chosen:
                results = [a | b for a, b in zip(results, judge(images, batch))]
            for row, result in zip(batch, results):
                if row.key not in done:  # a batch of which a part was written is drawn again in full
                    done[row.key] = result
                    file.write(json.dumps({"key": row.key, **result}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    if args.rescore:
        os.replace(path, folder / "rows.jsonl")
    return done


def pictures(pipe, rows: list[Row], trick: str, args):
    """samplers.draw under the flags. Only the networks run under autocast's lower precision, where one is asked for."""
    with torch.autocast(args.device.split(":")[0], getattr(torch, args.dtype), enabled=args.dtype != "float32"):
        return draw(pipe, rows, args.sampler, args.steps, args.eta, trick, args.noise)


def grid_rows(rows: list[Row]) -> list[Row]:
    """The first picture of each group, up to GRID, of the first row's size: the same at every start."""
    first = {row.groups: row for row in reversed(rows) if (row.width, row.height) == (rows[0].width, rows[0].height)}
    return sorted(first.values(), key=lambda row: row.case)[:GRID]


# ------------------------------------------------------------------------------------------------------------ program

def guidance_flag(text: str):
    return text if text == "csv" else float(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what").add_argument
    group("--model", required=True, help="folder, hub id, NAME:SUBFOLDER of either, or shapes")
    group("--base", help="drawn on the same noise, for paired differences")
    group("--also", action="append", default=[], help=f"further models, or {', '.join(TRICKS)} on the base")
    group("--suite", choices=SUITES, required=True)
    group("--prompts", nargs="+", help="the suite's own CSV or JSONL, or prompt files; I2P and GenEval are fetched without")
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
    group("--noise", choices=("cpu", "cuda"), default="cpu", help="device of the seeded generator; RECE and R1: cuda")
    group("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the networks, autocast")
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
    group("--inception-sha256", default="", help="what the Inception file must hash to; its hash is reported anyway")
    group("--cache", type=Path, default=Path.home() / ".cache" / "safediffusion", help="of downloaded files")
    group = parser.add_argument_group("output").add_argument
    group("--save-images", action="store_true", help="keep every picture in OUT/MODEL/pictures")
    group("--rescore", action="store_true", help="judge saved pictures again, without generating")
    group("--show", action="store_true", help="do not blur the grid (shapes and geneval never are)")
    args = parser.parse_args(argv)
    args.optional_nudenet = args.judges is None  # a default that is not installed is left out, and said so
    for name, value in SUITES[args.suite].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.judges = [name.strip() for name in args.judges.split(",")]
    args.batch = args.batch or (128 if args.suite == "shapes" else 8)
    args.out = args.out or Path("runs") / "evaluate" / f"{args.suite}-{slug(args.model)}"
    return args


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def check(args, models: dict) -> tuple[dict, list[str]]:
    """Everything that can be wrong, found before any model is loaded; the judges' files, and what was left out."""
    files, notes = {}, []
    known = {"q16", "nudenet", "clip", "geneval", "shapes"}
    if set(args.judges) - known:
        raise ValueError(f"--judges: {', '.join(set(args.judges) - known)} unknown; choose from {', '.join(sorted(known))}")
    for name in ("geneval", "shapes"):
        if name in args.judges and args.suite != name:
            raise ValueError(f"--judges {name} belongs to --suite {name}")
    for name in ("limit", "images", "samples", "steps", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.suite == "shapes" and (args.limit or args.prompts or args.samples > 1):
        raise ValueError("--suite shapes brings its own prompts: use --images in place of --limit, --prompts, --samples")
    if args.guidance == "csv" and args.suite in ("geneval", "shapes"):
        raise ValueError(f"--guidance csv: --suite {args.suite} has no guidance column; give a number")
    if "cuda" in (args.noise, args.device.split(":")[0]) and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: --device cpu and --noise cpu")
    for name, _ in models.values():
        path, _, subfolder = ALIASES.get(name, name).partition(":")
        if not args.rescore and (Path(path).exists() or path.startswith((".", "/"))):
            check_pipeline_folder(Path(path) / subfolder)
    if "nudenet" in args.judges and (problem := judges.check_nudenet()):
        if not args.optional_nudenet:
            raise ValueError(problem)
        args.judges.remove("nudenet")
        notes.append(f"no NudeNet figures: {problem.split(', or')[0]}")
    for kind, local in (("q16_original", args.q16_original), ("q16_finetuned", args.q16_finetuned)):
        if "q16" in args.judges:
            files[kind] = judges.fetch(*judges.FILES[kind], local, "--" + kind.replace("_", "-"), args.cache)
    if args.fid:
        if not (args.save_images or args.rescore):
            raise ValueError("--fid reads the pictures from their files, as clean-fid does: add --save-images")
        judges.list_pictures(args.fid, "--fid")
        files["inception"] = judges.fetch(judges.FILES["inception"][0], args.inception_sha256, args.inception,
                                          "--inception", args.cache)
    if args.rescore:
        for label in models:
            if not (args.out / slug(label) / "pictures").is_dir():
                raise ValueError(f"--rescore: no saved pictures in {args.out / slug(label)}; run once with --save-images")
    return files, notes


def make_report(args, rows: list[Row], raw: dict, models: dict, facts: dict, fids: dict):
    """report.md, report.json and, where matplotlib is there, bars_*.png. No times: a resumed run writes the same."""
    by_key = {row.key: row for row in rows}
    made = {label: tables.tables_of(args.suite, by_key, results, args.score_clip, fids.get(label))
            for label, results in raw.items()}
    labels = list(models)
    merged = tables.merge(made, (labels[0], labels[1]) if args.base else None)
    head = [f"# {args.suite}: {args.model}" + (f" beside {args.base}" if args.base else ""), "",
            f"{len(rows)} pictures for each model, {args.sampler}, {args.steps} steps, guidance {args.guidance}"
            + (f", eta {args.eta}" if args.sampler == "ddim" else "")]
    (args.out / "report.md").write_text(tables.markdown(merged, head, facts), encoding="utf-8")
    (args.out / "report.json").write_text(json.dumps({"tables": merged, "provenance": facts}, indent=1), encoding="utf-8")
    try:
        tables.bar_pictures(merged, args.out)
    except ImportError:
        print("no bar pictures: matplotlib is not installed", file=sys.stderr)
    print((args.out / "report.md").read_text(encoding="utf-8"))


@contextmanager
def refusing():
    """Bad input ends the program with one line that says what to change. Not around the work itself, where the same
    exceptions would be mistakes of ours and deserve their traceback."""
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
    try:
        return subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(argv=None):
    args, started = parse(argv), time.time()
    with refusing():
        models = name_models(args)
        files, notes = check(args, models)
        rows, source, remarks = read_suite(args)
        chosen, judged = make_judges(args, files)
    for note in notes + remarks:
        print(note, file=sys.stderr)
    settings = {**source, **{k: getattr(args, k) for k in ("suite", "sampler", "steps", "eta", "guidance", "noise", "dtype",
                                                        "seed", "samples", "images")}}
    raw, strips, made, fids = {}, [], {}, {}
    for label, (name, trick) in models.items():
        folder = args.out / slug(label)
        with refusing():
            pipe, header, done = open_model(name, trick, folder, args, {"settings": settings, "judges": judged})
        made[label] = header["model"]
        if pipe is not None:
            strips += [pictures(pipe, [row], trick, args).cpu() for row in grid_rows(rows)]
        raw[label] = finish_model(pipe, trick, folder, rows, done, args, chosen)
        del pipe
    if strips:
        hide = args.suite not in ("shapes", "geneval") and not args.show
        shown = [(" ".join(row.groups) or "case") + f" {row.case}" for row in grid_rows(rows)]
        save_grid(torch.cat([blur(p) if hide else p for p in strips]), args.out / "grid.png", len(shown), list(models), shown)
    if args.fid:
        inception = torch.jit.load(str(files["inception"]), map_location=args.device).eval()
        real = judges.inception_features(inception, judges.list_pictures(args.fid, "--fid"), args.device)
        for label in models:
            drawn = [args.out / slug(label) / "pictures" / f"{row.key}.png" for row in rows]
            fids[label] = judges.frechet_distance(judges.inception_features(inception, drawn, args.device), real)
        judged["fid"] = {"real_pictures": len(real), "resize": "clean", "inception_sha256": judges.sha256(files["inception"]),
                         "inception_checked": bool(args.inception_sha256)}
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow")
    facts = {"models": made, **settings, "judges": judged, "notes": notes + remarks, "safety_checker": "off",
             "device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu", "commit": commit(),
             "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}}
    make_report(args, rows, raw, models, facts, fids)
    print(f"{args.out / 'report.md'}: {len(rows)} pictures of {len(models)} models, {time.time() - started:.0f} s",
          file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; the same command goes on from here")
