"""What a run shows: the plan before it starts, a line of figures per rollout, grids of pictures,
and the table at the end.

Nothing here touches what is learnt; train.py calls it."""

import resource

import torch

import memory
from reward import BENIGN, Prompt
from sample import decode, encode_prompts, image_generator, latent_shape, rollout, save_grid

GRID_COLUMNS = 8    # pictures per prompt in a grid
TABLE_PROMPTS = 64  # pictures per model in the table at the end; evaluate.py measures on as many as one likes
SHAPES_TABLE = 24   # captions per category in the shapes world's table


# -------------------------------------------------------------------------------- words and figures

def print_plan(args, policy, reward, prompts, unsafe, device):
    """One screen that says what is about to happen and what it needs, before it happens."""
    categories = {}
    for prompt in prompts:
        categories[prompt.category or "no category"] = categories.get(prompt.category or "no category", 0) + 1
    images = args.prompts_per_rollout * args.group
    transitions = images * max(1, round((args.steps - args.skip_last) * args.timestep_fraction))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    print(f"model    {args.model}: {trained / 1e6:.1f} M parameters trained"
          f"{f' (LoRA, rank {args.lora_rank})' if args.lora_rank else ''}, {args.precision} on {device}")
    print(f"reward   {args.clip}, alpha {args.alpha}, {args.direction} direction, "
          f"{args.steer} prompts steered")
    if unsafe:  # a target that alpha did not carry past the middle still asks for what the prompt asks for
        safe = int((reward.targets(unsafe)[1] @ reward.direction > 0).sum())
        print(f"         of {len(unsafe)} unsafe prompts alpha carries {safe} to the safe side "
              "of the direction" + (", a larger one would carry more" if safe < len(unsafe) else ""))
    print(f"prompts  {len(prompts)}, {len(unsafe)} of them unsafe: "
          + ", ".join(f"{name} {count}" for name, count in categories.items()))
    print(f"rollout  {args.prompts_per_rollout} prompts x {args.group} = {images} images, "
          f"{args.steps} steps, guidance {args.guidance}, eta {args.eta}")
    print(f"update   {args.updates} per rollout on {transitions} transitions (all but the last "
          f"{args.skip_last} of each, x {args.timestep_fraction}), lr {args.learning_rate}"
          f"{f' / (1 + epoch / {args.decay_epochs})' if args.decay_epochs else ''}, "
          f"clip {args.clip_range}, KL {args.kl}"
          f"{f', average over {1 / (1 - args.ema):.0f}' if args.ema else ''}")
    print(f"epochs   {args.epochs}: {images * args.epochs} images, {args.updates * args.epochs} updates")
    print(f"memory   about {memory.estimate(args, policy, reward.clip.config):.1f} GiB at the peak"
          + (", Python and its libraries aside" if device.type == "cpu" else ""))


def record(epoch, rewards, alignment, safety, advantages, unsafe, stats, seconds, rate):
    """The line of metrics.jsonl for one rollout; the README defines each figure.
    rewards (P, G); unsafe (P,) bool."""
    flat_unsafe = unsafe[:, None].expand_as(rewards)
    mean = lambda values: values.mean().item() if values.numel() else None
    ratio = lambda part, whole: stats.get(part, 0) / max(1, stats.get(whole, 0))
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(
        epoch=epoch, reward_mean=mean(rewards), reward_std=mean(rewards.std(1, correction=0)),
        reward_unsafe=mean(rewards[flat_unsafe]), reward_benign=mean(rewards[~flat_unsafe]),
        alignment=mean(alignment), image_safety=mean(safety),
        image_safety_unsafe=mean(safety[flat_unsafe.flatten()]),
        zero_std_groups=mean((advantages == 0).all(1).float()),
        ratio_dev_first=stats.get("ratio_dev_first", 0.0), ratio_dev_max=stats.get("ratio_dev", 0.0),
        clip_frac_pos=ratio("clipped_positive", "positive"),
        clip_frac_neg=ratio("clipped_negative", "negative"), kl_ref=ratio("kl_ref", "pairs"),
        kl_old=ratio("kl_old", "pairs"), grad_norm=stats["grad_norm"], lr=rate, updates=stats["updates"],
        **seconds, images_per_second=rewards.numel() / sum(seconds.values()), peak_memory_gb=peak)


def exact_rates(images, prompts, unsafe):
    """In the shapes world alone: the pixel detector's view of a rollout, which the reward never sees.
    unsafe (B,) bool."""
    import shapes
    red, correct = shapes.judge(images, [p.text for p in prompts])
    return dict(exact_unsafe=red[unsafe].mean().item() if unsafe.any() else None,
                exact_correct=correct[~unsafe].mean().item() if (~unsafe).any() else None)


# -------------------------------------------------------------------------------- pictures and the table

@torch.no_grad()
def draw(unet, pipe, schedule, texts, args, autocast, key):
    """Pictures of texts on noise that depends on `key` and the picture's number alone: (N, 3, H, W)."""
    generators = [image_generator(args.seed, key, i) for i in range(len(texts))]
    encoded = encode_prompts(pipe, texts).to(schedule.sigma.device)
    null = encode_prompts(pipe, [""]).to(encoded.device)
    with autocast():
        drawn = rollout(unet, schedule, encoded, null, args.guidance, generators, latent_shape(unet),
                        pipe.scheduler.config.prediction_type, args.sample_batch, keep=False)
        return decode(pipe.vae, drawn.latents[:, -1])


def blur(images):
    """Average over blocks of an eighth of the width: colours and layout stay, content does not."""
    block = images.shape[-1] // 8
    small = torch.nn.functional.avg_pool2d(images, block)
    return torch.nn.functional.interpolate(small, images.shape[-2:], mode="nearest")


def picture_prompts(prompts, most: int = 8):
    """The first prompts of each category in turn, for the grids: the same at every epoch."""
    groups = {}
    for prompt in prompts:
        groups.setdefault(prompt.category, []).append(prompt)
    turns = [p for row in range(most) for group in groups.values()
             for p in group[row * len(group) // most:][:1]]
    return list(dict.fromkeys(turns))[:most]


def draw_grid(run, epoch, networks, pipe, schedule, prompts, unsafe, args, autocast):
    """A grid of fixed prompts and noise, base above policy.
    Pictures of unsafe prompts are blurred unless asked for."""
    shown = picture_prompts(prompts)
    texts = [p.text for p in shown for _ in range(GRID_COLUMNS)]
    rows = []
    for unet, context in networks.values():
        with context():
            images = draw(unet, pipe, schedule, texts, args, autocast, "grid")
        hidden = torch.tensor([unsafe[p] and not args.show_unsafe
                               for p in shown]).repeat_interleave(GRID_COLUMNS)
        rows.append(torch.where(hidden.view(-1, 1, 1, 1), blur(images).cpu(), images.cpu()))
    grid = torch.stack([r.unflatten(0, (-1, GRID_COLUMNS)) for r in rows], 1).flatten(0, 2)
    save_grid(grid, run / f"pictures-{epoch:06d}.png", GRID_COLUMNS,
              [f"{p.text[:40]} ({name})" for p in shown for name in networks])


def score_table(networks, pipe, schedule, reward, prompts, args, autocast):
    """Base and policy on the same prompts and noise, by category, as the lines of a Markdown table. The
    shapes world adds what its pixel detector finds: share of unsafe pictures, share of pictures that show
    what the caption says."""
    harmless = ()
    if args.anchors == "shapes":
        import shapes
        harmless = (*shapes.TASKS, "calm")  # benign ones, by their own names
        prompts = [Prompt(*pair) for pair in shapes.evaluation_prompts(SHAPES_TABLE)]
    else:
        prompts = picture_prompts(prompts, TABLE_PROMPTS)
    columns = {}
    for name, (unet, context) in networks.items():
        with context():
            images = draw(unet, pipe, schedule, [p.text for p in prompts], args, autocast, "table")
        scored = [Prompt(p.text, BENIGN) if p.category in harmless else p for p in prompts]
        values = dict(zip(("reward", "alignment", "image safety"), reward.score(images, scored)))
        if args.anchors == "shapes":
            unsafe, correct = shapes.judge(images, [p.text for p in prompts])
            values |= {"unsafe %": 100 * unsafe, "correct %": 100 * correct}
        columns[name] = values
    figures = list(columns["base"])
    lines = ["| category | n | " + " | ".join(f"{f}, base | after" for f in figures) + " |",
             "|---" * (2 + 2 * len(figures)) + "|"]
    for category in dict.fromkeys(p.category for p in prompts):
        rows = [i for i, p in enumerate(prompts) if p.category == category]
        cells = [f"{columns[name][f][rows].mean().item():.{1 if '%' in f else 3}f}"
                 for f in figures for name in columns]
        lines.append(f"| {category or '-'} | {len(rows)} | " + " | ".join(cells) + " |")
    return lines
