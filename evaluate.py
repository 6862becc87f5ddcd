"""The paper's tables for a model beside its base, each figure with its provenance.

Five suites: `i2p` (4,703 prompts; inappropriate rate and exposed parts), `geneval` (553 prompts x 4;
compositional accuracy), `coco` (a captions CSV; CLIP score and FID), `prompts` (our .txt files by category,
or any CSV of prompts) and `shapes` (the exact test bed).

    python evaluate.py --model shapes/weights --suite shapes
    python evaluate.py --model runs/x/final --base CompVis/stable-diffusion-v1-4 --suite i2p --also sld-medium

evaluation/ has a module for each suite; samplers.py says how pictures are drawn, judges.py what is in them.
The same command continues where it was stopped, and ends with the same report, as do several processes
(results.py). Departures from the published harnesses: docs/evaluation.md.
"""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from evaluation import geneval, i2p, judges, prompts, report, results
from evaluation.results import saved, slug
from evaluation.samplers import SCHEDULERS, SLD, TRICKS, check_steps
from evaluation.statistics import merge
from evaluation.tables import safety_tables, utility_tables
from plumbing import log, parallel, run
from plumbing.flags import Parser, default_device, real, usable, whole
from plumbing.models import check_model
from plumbing.stop import run_script

MODULES = [i2p, geneval, prompts]
if (Path(__file__).parent / "shapes" / "__init__.py").is_file():  # a folder that may be deleted
    from evaluation import shapes
    MODULES.append(shapes)
SUITES = {name: module for module in MODULES for name in module.SETTINGS}
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")


def parse(argv=None):
    parser = Parser("evaluate.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("what").add_argument
    group("--model", required=True, help="folder, hub id, NAME:SUBFOLDER, or a run's checkpoint")
    group("--base", help="drawn on the same noise, for paired differences")
    group("--also", action="append", default=[], help=f"further models, or {', '.join(TRICKS)} on the base")
    group("--suite", choices=SUITES, required=True)
    group("--prompts", nargs="+", metavar="FILE", help="CSV, JSONL or .txt; i2p and geneval fetch theirs")
    group("--limit", type=whole(1), help="that many prompts, each category in proportion")
    group("--images", type=whole(1), help="shapes: pictures for each kind of prompt (200)")
    group("--samples", type=whole(1), help="pictures for each prompt (i2p 1, geneval 4)")
    group("--seed", type=whole(0), default=42, help="of rows without one")
    group("--out", type=Path, help="default: runs/evaluate/SUITE-MODEL")
    group = parser.add_argument_group("how").add_argument
    group("--sampler", choices=("ddim", "lms", *SCHEDULERS),
          help="lms: RECE's and the paper's; ddim: geneval and shapes; the others are diffusers' own")
    group("--steps", type=whole(1))
    group("--eta", type=real("[0, 1]"), help="ddim only: 0 deterministic, 1 as in training")
    group("--guidance", type=real("[0, 10000]"), help="one number; i2p's default: each row's own")
    group("--noise", choices=("cpu", "cuda"), default="cpu", help="where noise is seeded; RECE and R1: cuda")
    group("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
          help="of the networks' compute; on a GPU float32 has TF32; the others draw other details")
    group("--device", default=default_device())
    group("--batch", type=whole(1), help="pictures drawn at once (shapes 128, else 8)")
    group = parser.add_argument_group("judges").add_argument
    group("--judges", help="from q16, nudenet, safety-checker, clip, geneval, shapes; else the suite's")
    group("--q16-clip", default="openai/clip-vit-large-patch14", help="for Q16 and for GenEval's colours")
    group("--score-clip", default="openai/clip-vit-base-patch32", help="for the CLIP score")
    group("--safety-checker", default="CompVis/stable-diffusion-v1-4:safety_checker")
    group("--detector", default=geneval.DETECTOR, help="GenEval's detector")
    group("--fid", metavar="FOLDER", help="FID against these real pictures; needs --save-images")
    group("--cache", metavar="FOLDER", type=Path, default=Path(torch.hub.get_dir()) / "safediffusion",
          help="of downloads, which may lie there already: " + ", ".join(judges.FILES))
    group = parser.add_argument_group("output").add_argument
    group("--save-images", action="store_true", help="keep every picture in OUT/MODEL/pictures")
    group("--rescore", action="store_true", help="judge saved pictures again, without generating")
    args = parser.parse_args(argv)
    args.judges_by_default = args.judges is None  # a default that is not here is left out, and said so
    for name, value in SUITES[args.suite].SETTINGS[args.suite].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.judges = [name.strip() for name in args.judges.split(",")]
    args.out = args.out or Path("runs") / "evaluate" / f"{args.suite}-{slug(args.model)}"
    return args


def check(args) -> dict:
    """Refuse what cannot work, before anything is read or loaded. Returns label -> (model, trick): the model,
    its base, then --also, whose tricks are played on the base."""
    models = {name: (name, "") for name in (args.model, args.base) if name}
    for name in args.also:
        tricked = args.base or args.model
        models |= {f"{tricked} + {name}": (tricked, name)} if name in TRICKS else {name: (name, "")}
    if len({slug(label).casefold() for label in models}) < len(models):
        raise ValueError("two of --model, --base and --also would have one folder in --out: rename one")
    own = {args.suite} if hasattr(SUITES[args.suite], "make_judge") else set()
    if unknown := set(args.judges) - {*judges.JUDGES} - own:
        raise ValueError(f"--judges: {', '.join(sorted(unknown))} unknown to --suite {args.suite}; it has "
                         f"{', '.join(sorted({*judges.JUDGES, *own}))}")
    for device in (args.device, args.noise):
        usable(device)
    flags = {args.base: "--base", args.model: "--model"}
    for name, trick in models.values():
        if trick in SLD and args.sampler in SCHEDULERS:
            raise ValueError(f"--also {trick}: drawn by --sampler ddim or lms, not {args.sampler}")
        if not args.rescore:
            check_steps(args.sampler, check_model(flags.get(name, "--also"), name), args.steps, args.eta)
    if args.fid:
        if not (args.save_images or args.rescore):
            raise ValueError("--fid reads pictures from their files, as clean-fid does: add --save-images")
        judges.list_pictures(args.fid)
        judges.fetch(judges.INCEPTION, args.cache)
    return models


def main(argv=None):
    args = parse(argv)
    parallel.join()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as train.py
    suite, models = SUITES[args.suite], check(args)
    rows, source, notes = suite.rows(args)
    chosen, judged, notes = judges.make_judges(args, suite, notes)
    args.out.mkdir(parents=True, exist_ok=True)
    with run.locked(args.out):
        print(log.heading(args.out), *notes, sep="\n")
        header = parallel.gather(made_with(args, source, judged))[0]
        opened = {label: results.open_results(name, trick, args.out / slug(label), args, header)
                  for label, (name, trick) in models.items()}  # all, before the first is drawn
        raw = {}
        for label, (name, trick) in models.items():
            path, _, done = opened[label]
            pipe = None if args.rescore else results.load(name, args)
            raw[label] = results.finish(pipe, trick, path, done, rows, args, chosen)
            del pipe  # before the next one is loaded
        if parallel.rank():
            return
        made = {label: model for label, (_, model, _) in opened.items()}
        facts = {"models": made, "prompts": source, **header, "notes": notes,
                 "safety_checker": "off", "commit": log.commit()}
        fids = {}
        if args.fid:
            drawn = {label: [saved(args.out / slug(label), row) for row in rows] for label in models}
            fids, facts["judges"]["fid"] = judges.frechet_distances(args, drawn)
        by_key = {row.key: row for row in rows}
        tables = {}
        for label, found in raw.items():
            own = suite.tables(by_key, found) if hasattr(suite, "tables") else []
            tables[label] = [*safety_tables(by_key, found, getattr(suite, "CATEGORIES", ())), *own,
                             *utility_tables(by_key, found, args.score_clip, fids.get(label))]
        pair = (args.model, args.base) if args.base else None
        head = [f"# {args.suite}: {args.model}" + (f" beside {args.base}" if args.base else ""), "",
                f"{len(rows)} pictures a model, {args.sampler}, {args.steps} steps, guidance {args.guidance}"
                + (f", eta {args.eta}" if args.sampler == "ddim" else "")]
        report.write(merge(tables, pair, report.PUBLISHED.get(args.suite, {})), head, facts, args.out)
        print(args.out / "report.md")


def made_with(args, source: dict, judged: dict) -> dict:
    """What decides over the results: flags, what was read and who judges by content, device, versions."""
    flags = ("suite", "sampler", "steps", "eta", "guidance", "noise", "dtype", "seed", "samples", "images")
    settings = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    device = torch.cuda.get_device_name(args.device) if "cuda" in args.device else "cpu"
    versions = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    return {"settings": settings | {"prompts": list(source.values())}, "judges": judged, "device": device,
            "versions": versions}


if __name__ == "__main__":
    run_script("evaluate.py", main)
