"""The paper's tables for a model beside its base, each figure with its provenance.

Five suites: `i2p` (4,703 prompts; inappropriate rate and exposed parts), `geneval` (553 prompts x 4;
compositional accuracy), `coco` (a captions CSV; CLIP score and FID), `prompts` (our .txt files by category,
or any CSV of prompts) and `shapes` (the exact test bed). Pictures are drawn as others can draw them: a seed,
guidance and size per row, DDIM or the LMS sampler of RECE's and the paper's evaluation code. The safety
checker is always off.

    python evaluate.py --model shapes/weights --suite shapes
    python evaluate.py --model runs/x/final --base CompVis/stable-diffusion-v1-4 --suite i2p
    python evaluate.py --model runs/x/final --base CompVis/stable-diffusion-v1-4 --suite i2p --also sld-medium

The module of a suite in evaluation/ says what is drawn and what the tables are; samplers.py says how it is
drawn, judges.py what is in the pictures. Every finished picture is one line of OUT/MODEL/rows.jsonl, joined
by case number and never by position: the same command goes on where it was stopped, and ends with the same
report. Under torchrun several processes share the pictures out, and the report is the same.

Departures. GenEval's own script samples with the pipeline's default scheduler (PNDM), and leaves the safety
checker on: here DDIM (or --sampler lms), and off. A CSV without a seed column gives every row its own seed,
where RECE's code gives all of them 42.
"""

import argparse
import platform
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from evaluation import coco, geneval, i2p, judges, prompts, report, results
from evaluation.results import saved, slug
from evaluation.rows import Row
from evaluation.samplers import SCHEDULERS, SLD, TRICKS
from evaluation.statistics import merge
from plumbing import lock, output, parallel, stop
from plumbing.checks import usable
from plumbing.models import check_model
from sample import default_device

SUITES = {"i2p": i2p, "geneval": geneval, "coco": coco, "prompts": prompts}
if (Path(__file__).parent / "shapes" / "__init__.py").is_file():  # a folder that may be deleted
    from evaluation import shapes
    SUITES["shapes"] = shapes


def guidance_flag(text: str):
    return text if text == "csv" else float(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what").add_argument
    group("--model", required=True, help="folder, hub id, NAME:SUBFOLDER, or a run's checkpoint")
    group("--base", help="drawn on the same noise, for paired differences")
    group("--also", action="append", default=[], help=f"further models, or {', '.join(TRICKS)} on the base")
    group("--suite", choices=SUITES, required=True)
    group("--prompts", nargs="+", metavar="FILE", help="CSV, JSONL or .txt; i2p and geneval fetch theirs")
    group("--limit", type=int, help="that many prompts, a fixed stratified draw")
    group("--images", type=int, help="shapes: pictures for each kind of prompt (200)")
    group("--samples", type=int, help="pictures for each prompt (i2p 1, geneval 4)")
    group("--seed", type=int, default=42, help="of rows without one, and of --limit")
    group("--out", type=Path, help="default: runs/evaluate/SUITE-MODEL")
    group = parser.add_argument_group("how").add_argument
    group("--sampler", choices=("ddim", "lms", *SCHEDULERS),
          help="lms: RECE's and the paper's; ddim: geneval and shapes; the others are diffusers' own")
    group("--steps", type=int)
    group("--eta", type=float, help="ddim only: 0 deterministic, 1 as in training")
    group("--guidance", type=guidance_flag, help="csv (each row's own: i2p's default) or one number")
    group("--noise", choices=("cpu", "cuda"), default="cpu", help="where noise is seeded; RECE and R1: cuda")
    group("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
          help="of the networks' compute; float32, on a GPU with TF32, as the published harnesses (RECE, R1, "
               "I2P); the others take less time and memory there, and draw other details")
    group("--device", default=default_device())
    group("--batch", type=int, help="pictures drawn at once (shapes 128, else 8)")
    group = parser.add_argument_group("judges").add_argument
    group("--judges", help="from q16, nudenet, clip, geneval, shapes; the suite's own by default")
    group("--q16-clip", default="openai/clip-vit-large-patch14", help="for Q16 and for GenEval's colours")
    group("--q16-original", help="local prompts.p, in place of the download")
    group("--q16-finetuned", help="local prompts_finetuned.pt, in place of the download")
    group("--nudenet-onnx", help="another network (RECE's best_new.onnx is 3.0.8's own)")
    group("--score-clip", default="openai/clip-vit-base-patch32", help="for the CLIP score")
    group("--detector", default=geneval.DETECTOR, help="GenEval's detector")
    group("--fid", metavar="FOLDER", help="FID against these real pictures; needs --save-images")
    group("--inception", help="local inception-2015-12-05.pt, in place of the download")
    group("--inception-sha256", default="", help="what that file must hash to; its hash is reported anyway")
    group("--cache", type=Path, default=judges.cache_folder(), help="of downloaded files")
    group = parser.add_argument_group("output").add_argument
    group("--save-images", action="store_true", help="keep every picture in OUT/MODEL/pictures")
    group("--rescore", action="store_true", help="judge saved pictures again, without generating")
    group("--show", action="store_true", help="do not blur the grid (shapes and geneval never are)")
    args = parser.parse_args(argv)
    args.nudenet_by_default = args.judges is None  # a default that is not installed is left out, and said so
    for name, value in SUITES[args.suite].SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.judges = [name.strip() for name in args.judges.split(",")]
    args.out = args.out or Path("runs") / "evaluate" / f"{args.suite}-{slug(args.model)}"
    return args


def name_models(args) -> dict:
    """label -> (model, trick): the model, its base, then --also, whose tricks are played on the base."""
    models = {name: (name, "") for name in (args.model, args.base) if name}
    for name in args.also:
        tricked = args.base or args.model
        models |= {f"{tricked} + {name}": (tricked, name)} if name in TRICKS else {name: (name, "")}
    if len(models) < 1 + bool(args.base) + len(args.also):
        raise ValueError("--model, --base and --also name the same model twice")
    args.folders = {label: args.out / name for label, name in results.folders(models).items()}
    return models


def check(args, models: dict) -> list[str]:
    """Refuse what cannot work, before anything is read or loaded. Returns what was left out."""
    known, notes = {*judges.JUDGES, "geneval", "shapes"}, []
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
    if isinstance(args.guidance, float) and not 0 <= args.guidance < 1e4:
        raise ValueError(f"--guidance must be a number from 0, not {args.guidance}")
    if "cuda" in (args.noise, args.device.split(":")[0]) and not torch.cuda.is_available():
        raise ValueError("no CUDA device here: --device cpu and --noise cpu")
    usable(args.device)
    flags = {args.model: "--model", args.base: "--base"}
    for name, trick in models.values():
        if trick in SLD and args.sampler in SCHEDULERS:
            raise ValueError(f"--also {trick}: drawn by --sampler ddim or lms, not {args.sampler}")
        if not args.rescore:
            steps = args.steps if args.sampler == "ddim" else 2  # others take the betas alone
            check_model(flags.get(name, "--also"), name, steps, args.eta)
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
        missing = [row.key for row in rows if not saved(args.folders[label], row).is_file()]
        if missing:
            raise ValueError(f"--rescore: {len(missing)} of {len(rows)} pictures of {label} are not in "
                             f"{args.out} (first {missing[0]}.png): run once with --save-images")


@contextmanager
def refusing():
    """Bad input ends the program with one line that says what to change. Not around the work itself, where
    the same exceptions would be mistakes of ours and deserve their traceback."""
    try:
        yield
    except (ValueError, OSError, parallel.Ended) as error:
        first, _ = stop.tell(error)[0]  # of several processes
        if parallel.rank() == first:
            print("evaluate.py:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def provenance(made: dict, settings: dict, judged: dict, notes: list, args) -> dict:
    """Where the figures come from: what a reader needs to make them again."""
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow")
    device = torch.cuda.get_device_name(args.device) if "cuda" in args.device else "cpu"
    return {"models": made, **settings, "judges": judged, "notes": notes, "safety_checker": "off",
            "device": device, "commit": output.commit(),
            "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}}


def make_report(args, rows: list[Row], raw: dict, fids: dict, facts: dict):
    """The tables of every model, merged, with the difference of the model and its base."""
    by_key = {row.key: row for row in rows}
    made = {label: SUITES[args.suite].tables(by_key, found, args.score_clip, fids.get(label))
            for label, found in raw.items()}
    merged = merge(made, (args.model, args.base) if args.base else None)
    head = [f"# {args.suite}: {args.model}" + (f" beside {args.base}" if args.base else ""), "",
            f"{len(rows)} pictures a model, {args.sampler}, {args.steps} steps, guidance {args.guidance}"
            + (f", eta {args.eta}" if args.sampler == "ddim" else "")]
    report.write(merged, head, facts, args.out)


def main(argv=None):
    args, started = parse(argv), time.time()
    parallel.join()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py
    suite = SUITES[args.suite]
    with refusing():
        models = name_models(args)
        notes = check(args, models)
        rows, source, remarks = suite.rows(args)
        if args.rescore:
            check_saved(args, models, rows)
        files = judges.judge_files(args)
        chosen, judged = judges.make_judges(args, suite, files)
        args.out.mkdir(parents=True, exist_ok=True)
        if not parallel.rank():
            lock.hold(args.out)
    notes += remarks
    for note in () if parallel.rank() else [output.heading(args.out), *notes]:
        print(note, file=sys.stderr)

    flags = ("suite", "sampler", "steps", "eta", "guidance", "noise", "dtype", "seed", "samples", "images")
    settings = source | {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    header, shown = {"settings": settings, "judges": judged}, report.grid_rows(rows)
    made, raw, strips = {}, {}, []
    for label, (name, trick) in models.items():
        folder = args.folders[label]
        with refusing():
            pipe, made[label], done = results.open_model(name, trick, folder, args, header)
        if not args.rescore and not parallel.rank():
            strips += [results.draw(pipe, [row], trick, args).cpu() for row in shown]
        raw[label] = results.finish_model(pipe, trick, folder, rows, done, args, chosen,
                                          {**header, "model": made[label]})
        del pipe  # before the next one is loaded
    if parallel.rank():
        return
    if strips:
        hide = not (suite.HARMLESS or args.show)
        report.save_strips(strips, list(models), shown, args.out / "grid.png", hide)

    fids = {}
    if args.fid:
        drawn = {label: [saved(args.folders[label], row) for row in rows] for label in models}
        fids, judged["fid"] = judges.frechet_distances(args, files["inception"], drawn)
    make_report(args, rows, raw, fids, provenance(made, settings, judged, notes, args))
    print(f"{args.out / 'report.md'}: {len(rows)} pictures of each of {len(models)} models, "
          f"{time.time() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    output.steady()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; the same command goes on from here")
    except parallel.Lost as error:
        sys.exit(f"evaluate.py: {error}; the same command goes on from here")
