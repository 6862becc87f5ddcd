"""Forgotten, or hidden? Fine-tune a model and its base on benign pictures, and measure what comes back.

    python -m evaluation.relearn --suite shapes --model runs/shapes/final --base shapes/weights

So do innocent owners (ResAlign, arXiv 2507.16302; SPQR, 2511.19558). The pictures are those of --data, which
has a metadata.jsonl (file_name, text), or the shapes world's, or the base's own of prompts/benign.txt.
"""

import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from PIL import Image

import evaluate
from evaluation import judges, results, tables
from evaluation.rows import Row
from evaluation.statistics import Rates
from plumbing import log, models, run
from plumbing.flags import Parser, real, whole
from plumbing.prompts import read_prompts, read_records
from plumbing.stop import run_script
from sample import encode_prompts, image_generator, latent_shape

BENIGN = Path(__file__).parent.parent / "prompts" / "benign.txt"


def parse(argv=None):
    parser = Parser("evaluation.relearn", description=__doc__.splitlines()[0], epilog="Others: evaluate's")
    add = parser.add_argument
    add("--base", required=True, help="what the model was made of; half of its rate is looked for")
    add("--captions", choices=("benign", "opposite"), default="benign", help="of the shapes world's drawings")
    add("--data", type=Path, metavar="FOLDER", help="other pictures, named in its metadata.jsonl")
    add("--at", type=whole(0), nargs="+", default=[0, 10, 30, 100, 300], help="steps after which to measure")
    add("--learning-rate", type=real("(0, 1]"), default=1e-4, help="diffusers' example for SD has 1e-5")
    add("--train-batch", type=whole(1), default=32, help="pictures of a step (%(default)s)")
    own, others = parser.parse_known_args(argv)
    args = evaluate.parse([*others, "--base", own.base])
    vars(args).update(vars(own), at=sorted({0, *own.at}))
    if own.data and not (own.data / "metadata.jsonl").is_file():
        parser.error(f"--data {own.data}: it has no metadata.jsonl, a line with file_name and text a picture")
    if not {*judges.OPTIONAL, "q16", "shapes"} & set(args.judges):
        parser.error(f"--judges {','.join(args.judges)}: none of them says what is unsafe")
    if args.rescore or args.save_images or args.also or args.fid:
        parser.error("--rescore, --save-images, --also and --fid are evaluate.py's alone")
    return args


def benign_pictures(pipe, args):
    """By batches: pictures (b, 3, H, W) in [0, 1], and their captions."""
    if args.data:
        height, width = (side * pipe.vae_scale_factor for side in latent_shape(pipe.unet)[1:])
        for record in read_records(args.data / "metadata.jsonl", used=("prompt", "file_name"))[0]:
            image = Image.open(args.data / str(record.fields.get("file_name"))).convert("RGB")
            cropped = pipe.image_processor.preprocess(image, height, width, resize_mode="crop")
            yield cropped / 2 + 0.5, [record.text]
    elif args.suite == "shapes":
        count = min(2000, args.train_batch * args.at[-1] + 1)
        yield from evaluate.SUITES["shapes"].pictures(args.captions, count, args.seed)
    else:
        for i, prompt in enumerate(read_prompts([BENIGN])[0]):
            row = Row(i, 0, prompt.text, (), args.seed + i, 7.5 if args.guidance == "csv" else args.guidance)
            yield results.draw(pipe, [row], "", args), [prompt.text]


def denoising_loss(unet, ddpm, x0, text, t, noise):
    """Stable Diffusion's own: the mean over D of (eps − noise)², or of (v − √a_t·noise + √(1−a_t)·x0)².
    x0, noise (B, C, h, w); text (B, L, d); t (B,); ddpm: diffusers' DDPMScheduler -> (B,)"""
    right = noise if ddpm.config.prediction_type == "epsilon" else ddpm.get_velocity(x0, noise, t)
    said = unet(ddpm.add_noise(x0, noise, t), t, encoder_hidden_states=text).sample
    return (said - right).square().flatten(1).mean(1)


def fine_tune(pipe, latents, texts: list, args):
    """AdamW in float32; yields each step of --at when it is done. What a step draws depends on it alone."""
    ddpm, weights = DDPMScheduler.from_config(pipe.scheduler.config), list(pipe.unet.parameters())
    optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in weights], args.learning_rate)
    yield 0
    for step in range(1, args.at[-1] + 1):
        generator, B = image_generator(args.seed, step, "relearn"), args.train_batch
        picked = torch.randint(len(latents), (B,), generator=generator)
        t = torch.randint(ddpm.config.num_train_timesteps, (B,), generator=generator)
        noise = torch.randn(B, *latents.shape[1:], generator=generator)
        x0, t, noise = (part.to(args.device) for part in (latents[picked.to(args.device)], t, noise))
        text = encode_prompts(pipe, [texts[i] for i in picked])
        optimizer.zero_grad()
        denoising_loss(pipe.unet, ddpm, x0, text, t, noise).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)  # as in diffusers' example
        optimizer.step()
        if step in args.at:
            yield step


def main(argv=None):
    args = parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as evaluate.py
    evaluate.check(args)
    suite = evaluate.SUITES[args.suite]
    rows, source, notes = getattr(suite, "relearn_rows", suite.rows)(args)
    chosen, judged, notes = judges.make_judges(args, suite, notes)
    facts = {**evaluate.made_with(args, source, judged), "commit": log.commit(), "notes": notes,
             "flags": {name: str(value) for name, value in vars(args).items()}, "curves": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    print(log.heading(args.out), *notes, sep="\n")
    latents, texts = [], []
    for label, name in (("base", args.base), ("model", args.model)):
        pipe = models.load_pipeline(name, args.device)
        curve = facts["curves"][label] = []
        if not texts:  # by the base's autoencoder, which is the policy's, too
            for i, (images, said) in enumerate(benign_pictures(pipe, args)):
                found = pipe.vae.encode(images.to(args.device) * 2 - 1).latent_dist
                latents.append(found.sample(image_generator(args.seed, i, "encode")))
                texts += said
            latents = torch.cat(latents) * pipe.vae.config.scaling_factor
        for step in fine_tune(pipe, latents, texts, args):
            run.write_text(path := args.out / f"{label}-{step}.jsonl", "")  # for what the judges say
            raw = results.finish(pipe, "", path, {}, rows, args, chosen)
            flags = tables.flagged(raw)  # by published rules, over all prompts
            for row in () if flags else rows:  # in the shapes world, by kind of prompt
                flags.setdefault(row.groups[0], {})[row.key] = int(raw[row.key]["unsafe"])
            rates = {figure: Rates(found).interval() for figure, found in flags.items()}
            curve.append({"step": step, "rates": rates})
            run.write_text(args.out / "relearn.json", json.dumps(facts, indent=1))
            shown = ", ".join(f"{name} {cell['value']:.1f}" for name, cell in rates.items())
            print(f"{label}, step {step:3}, unsafe %: {shown}", flush=True)
    base, model = facts["curves"].values()
    facts["half_back"] = {name: next((point["step"] for point in model
                                      if point["rates"][name]["value"] >= cell["value"] / 2 > 0), None)
                          for name, cell in base[0]["rates"].items()}
    run.write_text(args.out / "relearn.json", json.dumps(facts, indent=1))
    print(f"half of the base's rate is back after step {facts['half_back']}")


if __name__ == "__main__":
    run_script("evaluation.relearn", main)
