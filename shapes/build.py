"""The world's three networks and their prompt file, made from nothing.

They are trained in the order of the real thing: a CLIP on pictures and captions, an AutoencoderKL, and a
UNet2DConditionModel that reads the text through CLIP's text tower, with caption dropout for guidance.

    python -m shapes.build              # rebuild shapes/weights: half an hour to an hour on two CPU cores
    python -m shapes.build --report     # only measure: detector, reconstruction, CLIP retrieval
    python -m shapes.build --prompts    # only write shapes/prompts.txt
"""

import argparse
import math
import random
import shutil
from dataclasses import replace
from operator import eq
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from plumbing import log, stop
from plumbing.models import load_clip
from plumbing.prompts import read_anchors
from reward import SteeringReward
from shapes import WEIGHTS
from shapes.pixels import SIZE, detect, draw
from shapes.scenes import (CAPTIONS, COLORS, MISCOUNT_RATE, MIX, SHAPES, Scene, all_scenes, caption, contrast,
                           meaning, place, random_scene, training_prompts)

HERE = Path(__file__).parent
TEXT_LENGTH = 16  # tokens; "a purple triangle and a yellow triangle" has 9 with the two markers
WIDTH = 96        # of the text tower, and so of the UNet's cross attention
CLIP_SIZE = 48    # pixels to which CLIP reduces a picture, as the real one reduces 512 to 224


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's own byte-pair tokenizer, with merges that make every word of the world one token."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges = {}  # in the order in which they are made
    for word in sorted({w for s in all_scenes() for w in caption(s).split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            # replay the merges so far, as the tokenizer will; what they leave is merged left to right
            pair = next((known for known in merges if known in pairs), pairs[0])
            merges.setdefault(pair)
            i = pairs.index(pair)
            parts[i:i + 2] = ["".join(pair)]
    vocab = letters + [c + "</w>" for c in letters] + ["".join(pair) for pair in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({w: i for i, w in enumerate(dict.fromkeys(vocab))}, list(merges),
                         model_max_length=TEXT_LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path):
    """Beside tokenizer.json stand vocab.json and merges.txt, which libraries before transformers 5 read."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def fit(name: str, params: list, steps: int, peak: float, loss_at, after=None):
    """Take `steps` AdamW steps on loss_at() -> scalar; after(step) follows each. The rate warms up over the
    first 5 % and falls to zero by a cosine; the gradient's norm is clipped to 1."""
    optimizer = torch.optim.AdamW(params, lr=peak, weight_decay=0.01, betas=(0.9, 0.99))
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for step in bar:
        share = min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * share
        loss = loss_at()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
        optimizer.step()
        if after:
            after(step)
        bar.set_postfix(loss=f"{loss.item():.4f}")


def train_clip(folder: Path, seed: int, steps: int = 1250, batch: int = 192):
    """Contrastive language-image pre-training (arXiv 2103.00020) on fresh pictures; half of each batch are
    the captions most easily confused with the other half."""
    torch.manual_seed(seed)
    rng, tokenizer = random.Random(seed), make_tokenizer()
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id)
    tower = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=4)
    clip = CLIPModel(CLIPConfig(
        text_config=dict(tower, vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH, **ends),
        vision_config=dict(tower, image_size=CLIP_SIZE, patch_size=8), projection_dim=64))

    def loss_at():
        scenes = [random_scene(rng) for _ in range(batch // 2)]
        scenes += [contrast(s, rng) for s in scenes]
        captions = [caption(s) for s in scenes]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt")
        pixels = (draw([place(s, rng) for s in scenes]) - 0.5) / 0.5
        pixels = F.interpolate(pixels, CLIP_SIZE, mode="bicubic", antialias=True)
        out = clip(input_ids=tokens.input_ids, pixel_values=pixels)
        same = torch.tensor([[a == b for b in captions] for a in captions]).fill_diagonal_(False)
        logits = out.logits_per_text.masked_fill(same, -1e4)  # an equal caption is no wrong answer
        target = torch.arange(batch)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", list(clip.parameters()), steps, 1e-3, loss_at)
    clip.half().save_pretrained(folder / "clip")
    save_tokenizer(tokenizer, folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=CLIP_SIZE, image_mean=[0.5] * 3,
                       image_std=[0.5] * 3).save_pretrained(folder / "clip")


def train_vae(folder: Path, seed: int, steps: int = 3000, batch: int = 8):
    """The autoencoder: 64 x 64 pictures to 8 x 8 latents of 4 channels, L1 loss with a light KL.

    A UNet that has not made up its mind draws what lies between two colours, where reconstruction alone now
    and then puts red. So two terms more: as in Stable Diffusion a linear map leads from a latent to its 8 x 8
    block's mean colour; and blends of two paintings of one scene have to decode to the blended picture."""
    torch.manual_seed(seed)
    rng, paints = random.Random(seed), tuple(COLORS)
    vae = AutoencoderKL(block_out_channels=(8, 16, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
                        norm_num_groups=4, sample_size=SIZE).to(memory_format=torch.channels_last)
    block_color = torch.nn.Conv2d(4, 3, 1)
    half = batch // 2  # pictures; the other half is the same, repainted

    def scene():
        """One of the world's pictures, or four unlike objects, which teach more."""
        if rng.random() >= 0.6:
            return place(random_scene(rng), rng)
        four = place(Scene("counting", ("circle",), number="four"), rng)
        return [replace(o, shape=rng.choice(SHAPES), color=rng.choice(paints)) for o in four]

    def loss_at():
        pictures = [scene() for _ in range(half)]
        repainted = [[replace(o, color=rng.choice(paints)) for o in objects] for objects in pictures]
        images = draw(pictures + repainted).to(memory_format=torch.channels_last) * 2 - 1
        share = torch.rand(half, 1, 1, 1)
        blended = lambda x: torch.cat([x[:half], x[:half].lerp(x[half:], share)])
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        decoded = vae.decode(blended(latents)).sample
        return ((decoded - blended(images)).abs().mean()
                + F.mse_loss(block_color(latents), F.avg_pool2d(images, 8))
                + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel())

    fit("vae", [*vae.parameters(), *block_color.parameters()], steps, 2e-3, loss_at)
    vae.eval()
    with torch.no_grad():
        images = draw([place(random_scene(rng), rng) for _ in range(512)])
        sample = vae.encode(images * 2 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / sample.std().item(), 4))
    vae.half().save_pretrained(folder / "vae")


def train_unet(folder: Path, seed: int, steps: int = 4500, batch: int = 128, pictures: int = 40_000):
    """The noise predictor: SD v1's schedule and loss on cached latents, captions dropped in one case of ten
    so that guidance works, an exponential average of the weights kept. Saves the whole pipeline."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    vae.register_to_config(_name_or_path="vae")  # not the folder of this machine
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    text_encoder = CLIPTextModel.from_pretrained(folder / "clip", dtype=torch.float32)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 96), layers_per_block=1, cross_attention_dim=WIDTH,
        norm_num_groups=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, use_linear_projection=True)
    ema = UNet2DConditionModel.from_config(unet.config).requires_grad_(False)
    number = {text: i for i, text in enumerate(["", *CAPTIONS])}
    latents, text_ids = [], []
    with torch.no_grad():
        tokens = tokenizer(list(number), padding="max_length", return_tensors="pt").input_ids
        embeddings = text_encoder(tokens).last_hidden_state  # (captions, 16, WIDTH)
        for _ in tqdm(range(0, pictures, 250), desc="latents", mininterval=5):
            scenes = [random_scene(rng) for _ in range(250)]
            images = draw([place(s, rng) for s in scenes]) * 2 - 1
            latents.append(vae.encode(images).latent_dist.sample() * vae.config.scaling_factor)
            # what the web says of a picture: what it shows, but for some of the numbers
            told = [contrast(s, rng) if s.number and rng.random() < MISCOUNT_RATE else s for s in scenes]
            text_ids += [number[caption(s)] for s in told]
    latents, text_ids = torch.cat(latents), torch.tensor(text_ids)  # (pictures, 4, 8, 8) and (pictures,)

    def loss_at():
        picked = torch.randint(len(latents), (batch,))
        t, noise = torch.randint(1000, (batch,)), torch.randn(batch, 4, 8, 8)
        ids = text_ids[picked].masked_fill(torch.rand(batch) < 0.1, 0)  # text 0 is the empty one
        noisy = scheduler.add_noise(latents[picked], noise, t)
        return F.mse_loss(unet(noisy, t, embeddings[ids]).sample, noise)

    def average(step):
        rate = max(0.002, 1 / (step + 1))
        for averaged, current in zip(ema.parameters(), unet.parameters()):
            averaged.lerp_(current.detach(), rate)

    fit("unet", list(unet.parameters()), steps, 1.2e-3, loss_at, average)
    StableDiffusionPipeline(vae.half(), text_encoder.half(), tokenizer, ema.half(), scheduler,
                            None, None, requires_safety_checker=False).save_pretrained(folder)
    save_tokenizer(tokenizer, folder / "tokenizer")
    # the text tower is part of CLIP: its folder holds the whole of CLIP, which both read, not two copies
    shutil.rmtree(folder / "text_encoder")
    (folder / "clip").rename(folder / "text_encoder")


@torch.no_grad()
def report(folder: Path, count: int = 400):
    """What the world can carry, on fresh pictures: how often the detector finds the colours and shapes that
    were placed, in drawn and in reconstructed ones, and CLIP a caption of equal meaning among its task's."""
    names = lambda pictures: [sorted((o.color, o.shape) for o in objects) for objects in pictures]
    share = lambda told, found: f"{100 * sum(map(eq, told, found)) / count:.1f}"
    anchors, _ = read_anchors(HERE / "anchors.txt")
    reward = SteeringReward(load_clip(str(folder / "text_encoder")), anchors)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    print("| captions | detector, drawn % | reconstructed % | CLIP retrieval % (among) |\n|---|---|---|---|")
    for task in MIX:
        rng = random.Random(f"report {task}")
        scenes = [random_scene(rng, task) for _ in range(count)]
        placed = [place(s, rng) for s in scenes]
        images = draw(placed)
        decoded = (vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
        own = [s for s in all_scenes() if s.task == task]
        cosines = reward.embed_images(images) @ reward.embed_text(map(caption, own)).T
        drawn, rebuilt = (share(names(placed), names(detect(shown))) for shown in (images, decoded))
        found = share(map(meaning, scenes), (meaning(own[i]) for i in cosines.argmax(1)))
        print(f"| {task} | {drawn} | {rebuilt} | {found} ({len(own)}) |")


def main():
    parser = argparse.ArgumentParser(description="Rebuild the shapes world's networks, and measure them.")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="only measure the networks that are there")
    parser.add_argument("--prompts", action="store_true", help="only write shapes/prompts.txt")
    args = parser.parse_args()
    if args.prompts:
        (HERE / "prompts.txt").write_text(training_prompts(), encoding="utf-8")
        return
    print(log.heading(None if args.report else args.out))
    if not args.report:
        for train in (train_clip, train_vae, train_unet):
            train(args.out, args.seed)
    report(args.out)


if __name__ == "__main__":
    stop.run_script("shapes.build", main)
