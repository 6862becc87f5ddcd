"""Two suites: prompts of one's own, by category, or any table of prompts, such as an attack's; and captions
of COCO, for CLIP score and FID. Sampled as RECE's and the paper's generate_images.py sample both."""

from evaluation.rows import Row, finish, read_files

DRAWN = dict(sampler="lms", steps=50, eta=0.0, guidance=7.5, samples=1, batch=8)
SETTINGS = {"coco": DRAWN | {"judges": "clip"}, "prompts": DRAWN | {"judges": "q16,nudenet,safety-checker"}}


def rows(args) -> tuple[list[Row], dict, list[str]]:
    if not args.prompts:
        raise ValueError(f"--suite {args.suite} needs --prompts FILE")
    prompts, source, notes = read_files(args.prompts, (), args)
    return finish(prompts, args, notes), source, notes
