"""Sampling: the DDIM chain as a stochastic policy, its log-probabilities, and pictures from any checkpoint.

Each denoising step draws x_p from a Gaussian whose mean comes from the network and whose deviation is known,
so a picture is a trajectory of T actions with exact log-probabilities (DDPO, arXiv 2305.13301; DDIM, arXiv
2010.02502).

    a_t, a_p   alpha-bar at timestep t and at the previous one (the next to be visited; closer to the picture)
    x_t, x_p   latents there, (B, C, h, w);  D = C·h·w
    eps        guided noise prediction;  w guidance scale;  eta 0 = deterministic, 1 = as noisy as DDPM
    T steps, B pictures, L tokens, d text width

The schedule, the stored latents and all that is computed from the network's output are float32; the network
itself may run under autocast. One step function serves rollout, update and evaluation; what is scored is what
is stored.

    python sample.py --model CompVis/stable-diffusion-v1-4 --prompt "a lighthouse" --seed 0 1 2 --out grid.png
    python sample.py --model shapes --prompt "a violent star" --compare runs/shapes/final --out grid.png
"""

import argparse
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open

for library in (diffusers, transformers):  # their reports on loading say nothing that a user here can act on
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: E402  (which is where the reports begin)

ALIASES = {"shapes": str(Path(__file__).parent / "models" / "shapes")}
LOG_2PI = math.log(2 * math.pi)
DECODE_BATCH = 4  # pictures; at 512 x 512 one tensor of the decoder's last block is 134 MB a picture, float32


# -------------------------------------------------------------------------------- the mathematics

@dataclass(frozen=True)
class Schedule:
    """The constants of T denoising steps in the order in which they are taken; each (T,), on one device."""
    timesteps: torch.Tensor   # int64
    alpha_t: torch.Tensor     # float32, as the two below
    alpha_prev: torch.Tensor
    sigma: torch.Tensor

    def to(self, device) -> "Schedule":
        return Schedule(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def ddim_schedule(scheduler, num_steps: int, eta: float) -> Schedule:
    """DDIM's constants for `num_steps` steps, from the model's own scheduler (any of diffusers').

    s = eta·√((1−a_p)/(1−a_t))·√(1−a_t/a_p)   (arXiv 2010.02502, Eq. 16)

    The betas and the spacing of the timesteps (leading, trailing, linspace; steps_offset) are read by
    diffusers. After the last timestep comes a_p = alpha-bar of step 0, or 1 where the configuration says
    set_alpha_to_one: then s is 0 there. Raises ValueError for a step count or eta out of range, or a schedule
    that starts from pure noise."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    train_steps = ddim.config.num_train_timesteps
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"--steps must lie between 1 and {train_steps}, not {num_steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta must lie between 0 (deterministic) and 1 (as noisy as DDPM), not {eta}")
    ddim.set_timesteps(num_steps)
    t = ddim.timesteps.long()
    previous = t - train_steps // num_steps
    alphas = ddim.alphas_cumprod.double()  # float64 up to the end: 1 − a_t/a_p loses digits where a_t ≈ a_p
    alpha_t = alphas[t]
    alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], ddim.final_alpha_cumprod.double())
    if alpha_t.min() < 1e-6:
        raise ValueError("a schedule with zero terminal signal (rescale_betas_zero_snr) is not supported")
    sigma = eta * ((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)).clamp(min=0).sqrt()
    return Schedule(t, alpha_t.float(), alpha_prev.float(), sigma.float())


def column(values, like):
    """Per-picture scalars (B,) or one scalar, shaped to multiply (B, C, h, w)."""
    values = torch.as_tensor(values, dtype=torch.float32, device=like.device)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def ddim_mean(noise, x_t, alpha_t, alpha_prev, sigma, prediction_type: str = "epsilon"):
    """Mean of the next latent: mu = √a_p·x0 + √(1−a_p−s²)·eps   (arXiv 2010.02502, Eq. 12)

    with  x0 = (x_t − √(1−a_t)·eps) / √a_t                        for a network that predicts eps,
          x0 = √a_t·x_t − √(1−a_t)·v,  eps = √a_t·v + √(1−a_t)·x_t  for one that predicts v (2202.00512).
    noise: the network's guided output, like x_t (B, C, h, w); alpha_t, alpha_prev, sigma: (B,) or scalars.
    Returns mu, float32, like x_t."""
    noise, x_t = noise.float(), x_t.float()
    a_t, a_p, s = column(alpha_t, x_t), column(alpha_prev, x_t), column(sigma, x_t)
    if prediction_type == "epsilon":
        eps = noise
        x0 = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    elif prediction_type == "v_prediction":
        eps = a_t.sqrt() * noise + (1 - a_t).sqrt() * x_t
        x0 = a_t.sqrt() * x_t - (1 - a_t).sqrt() * noise
    else:
        raise ValueError(f"prediction_type must be epsilon or v_prediction, not {prediction_type!r}")
    return a_p.sqrt() * x0 + (1 - a_p - s * s).clamp(min=0).sqrt() * eps


def log_prob(x_prev, mu, sigma):
    """Log-density of one step, as a mean over the D latent dimensions.

    logp = mean over D of [ −(x_p−mu)²/(2s²) − log s − ½·log 2π ]

    A mean and not a sum, as in DDPO and in the paper's code: exp(logp − logp_old) is the true ratio to the
    power 1/D, which is why clip ranges in this field are as small as 1e-4."""
    s = column(sigma, x_prev)
    per_dimension = -(x_prev - mu).square() / (2 * s * s) - s.log() - 0.5 * LOG_2PI
    return per_dimension.flatten(1).mean(1)


def predict_noise(unet, x_t, t, text, null_text, guidance: float):
    """Classifier-free guidance (arXiv 2207.12598): eps = eps_u + w·(eps_c − eps_u), blended in float32.

    Both branches in one forward of batch 2B; at w = 1 only the conditional one is needed, and made.
    x_t (B, C, h, w); t (B,) or (); text (B, L, d); null_text (1, L, d) -> (B, C, h, w) float32."""
    t = t.expand(len(x_t))
    if guidance == 1:
        return unet(x_t, t, encoder_hidden_states=text).sample.float()
    both = torch.cat([null_text.expand_as(text), text])
    eps = unet(x_t.repeat(2, 1, 1, 1), t.repeat(2), encoder_hidden_states=both).sample.float()
    eps_u, eps_c = eps.chunk(2)
    return eps_u + guidance * (eps_c - eps_u)


@dataclass
class Rollout:
    """B trajectories: latents[:, i] is x_t of step i, latents[:, i + 1] the x_p that was drawn there."""
    latents: torch.Tensor    # (B, T + 1, C, h, w) float32; (B, 1, C, h, w) if only the last were kept
    log_probs: torch.Tensor  # (B, T) float32; empty for eta = 0, which has no density


def image_generator(*key) -> torch.Generator:
    """A random stream of its own for every (seed, epoch, prompt index, image index, purpose): picture i does
    not change with the batch size, and a resumed run needs no stored state. Always on the CPU, so equal on
    every device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def rollout(unet, schedule: Schedule, text, null_text, guidance: float, generators: list, shape: tuple,
            prediction_type: str = "epsilon", batch_size: int = 16, keep: bool = True, initial=None,
            progress=None) -> Rollout:
    """Draw B pictures' trajectories with the policy, in batches.

    text (B, L, d), null_text (1, L, d); generators: B, each of which draws its picture's initial noise first
    and then the noise of every step; shape (C, h, w); initial: (B, C, h, w) in place of the drawn initial
    noise; progress: a tqdm bar, advanced once per network call. See Rollout for what comes back and what
    keep=False leaves out."""
    T, device = len(schedule.timesteps), text.device
    stochastic = bool((schedule.sigma > 0).any())
    kept, log_probs = [], torch.zeros(len(text), T if stochastic else 0, device=device)
    for start in range(0, len(text), batch_size):
        batch = slice(start, min(start + batch_size, len(text)))
        draws = T + 1 if stochastic else 1
        noise = torch.stack([torch.randn(draws, *shape, generator=g) for g in generators[batch]])
        noise = noise.to(device)                                      # (b, T + 1, C, h, w)
        x = noise[:, 0] if initial is None else initial[batch].float()
        chain = [x]
        for i, t in enumerate(schedule.timesteps):
            constants = (schedule.alpha_t[i], schedule.alpha_prev[i], schedule.sigma[i])
            eps = predict_noise(unet, x, t, text[batch], null_text, guidance)
            mu = ddim_mean(eps, x, *constants, prediction_type)
            x = mu
            if stochastic:
                x = mu + schedule.sigma[i] * noise[:, i + 1]
                log_probs[batch, i] = log_prob(x, mu, schedule.sigma[i])
            chain = [*chain, x] if keep else [x]
            if progress is not None:
                progress.update()
        kept.append(torch.stack(chain, 1))
    return Rollout(torch.cat(kept), log_probs)


@torch.no_grad()
def decode(vae, latents, batch_size: int = DECODE_BATCH):
    """Latents (B, C, h, w) -> pictures (B, 3, H, W), float32 in [0, 1], on the same device."""
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    parts = latents.split(batch_size)
    return torch.cat([(vae.decode(part).sample.float() / 2 + 0.5).clamp(0, 1) for part in parts])


# -------------------------------------------------------------------------------- models and pictures

def load_pipeline(model: str, device="cpu", dtype=torch.float32) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline from a folder, a hub id, NAME:SUBFOLDER of either, or "shapes". Safetensors
    only: a pickle is never opened. Without the safety checker, which would return black pictures and so
    falsify every count. Raises ValueError or OSError with the reason when it is not one."""
    name, _, subfolder = ALIASES.get(model, model).partition(":")
    path = Path(name)
    if subfolder and not path.is_dir():
        from huggingface_hub import snapshot_download
        path = Path(snapshot_download(name, allow_patterns=[f"{subfolder}/*"],
                                      ignore_patterns=["*.bin", "*.pt"]))
    path = path / subfolder
    if path.is_dir():
        check_pipeline_folder(path)
        name = str(path)
    pipe = StableDiffusionPipeline.from_pretrained(
        name, dtype=dtype, safety_checker=None, requires_safety_checker=False, use_safetensors=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval().to(device)
    return pipe


def check_pipeline_folder(path: Path):
    """Name what a model folder lacks, or what the policy here cannot be, before any weights are read."""
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline: it has no model_index.json "
                         "(give the folder that holds unet/, vae/, text_encoder/, tokenizer/, scheduler/)")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (path / part).is_dir():
            raise ValueError(f"{path} lacks the component {part}/")
        if part in ("unet", "vae", "text_encoder") and not any((path / part).glob("*.safetensors")):
            raise ValueError(f"{path / part} holds no .safetensors file; other formats are refused, "
                             "since opening a pickle can run code (convert them with save_pretrained)")
        for file in (path / part).glob("*.safetensors"):
            try:
                safe_open(file, "pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is not a whole safetensors file ({error})") from None
    code = next(path.rglob("*.py"), None)
    if code:
        raise ValueError(f"{path} brings code of its own ({code.name}), which diffusers would run; remove it")
    unet, vae, text = (json.loads((path / part / "config.json").read_text(encoding="utf-8"))
                       for part in ("unet", "vae", "text_encoder"))
    channels = [unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)]
    if len(set(channels)) > 1:
        raise ValueError(f"{path}: its UNet takes {channels[0]} channels and gives {channels[1]}, its VAE "
                         f"has {channels[2]}; give a text-to-image model, none for inpainting or upscaling")
    width = text.get("text_config", text).get("hidden_size", 512)
    if unet.get("cross_attention_dim") != width:
        raise ValueError(f"{path}: its UNet reads text of width {unet.get('cross_attention_dim')}, its text "
                         f"encoder gives {width}; give a Stable Diffusion 1.x or 2.x (SDXL has two encoders)")


def latent_shape(unet):
    """(C, h, w) of a UNet's latents."""
    return unet.config.in_channels, unet.config.sample_size, unet.config.sample_size


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str]):
    """The text encoder's states for the UNet, cut or padded as in training: (N, L, d) float32."""
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length,
                            truncation=True, return_tensors="pt")
    masked = getattr(pipe.text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(pipe.text_encoder.device) if masked else None
    return pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device), attention_mask=mask)[0].float()


def save_grid(images, path, columns: int, row_labels=None, column_labels=None):
    """Write pictures (N, 3, H, W) in [0, 1] as one labelled PNG, row by row; small ones at 96 pixels."""
    zoom = max(1, round(96 / images.shape[-1]))
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, _, height, width = images.shape
    rows, gap, head = math.ceil(n / columns), 2, 22 if column_labels else 0
    font = ImageFont.load_default(14)
    left = 8 + max(int(font.getlength(label)) for label in row_labels) if row_labels else 0
    sheet = Image.new("RGB", (left + columns * (width + gap), head + rows * (height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, pixels in enumerate((images * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        row, col = divmod(i, columns)
        sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)),
                    (left + col * (width + gap), head + row * (height + gap)))
    for row, label in enumerate(row_labels or []):
        pen.text((4, head + row * (height + gap) + height // 2 - 8), label, "black", font)
    for col, label in enumerate(column_labels or []):
        pen.text((left + col * (width + gap) + 4, 3), label, "black", font)
    sheet.save(path)


# -------------------------------------------------------------------------------- the script

def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pictures(pipe, prompts: list[str], seeds: list[int], steps: int, eta: float, guidance: float,
             batch_size: int = 8):
    """One picture per prompt and seed, prompt by prompt. The noise depends on the seed alone, so that two
    models, and two prompts, are compared on the same noise. Returns (prompts·seeds, 3, H, W) in [0, 1]."""
    device, unet = pipe.unet.device, pipe.unet
    schedule = ddim_schedule(pipe.scheduler, steps, eta).to(device)
    text = encode_prompts(pipe, prompts).repeat_interleave(len(seeds), 0)
    generators = [image_generator(seed, "sample") for _ in prompts for seed in seeds]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        drawn = rollout(unet, schedule, text, encode_prompts(pipe, [""]), guidance, generators,
                        latent_shape(unet), pipe.scheduler.config.prediction_type, batch_size, keep=False)
        return decode(pipe.vae, drawn.latents[:, -1])


def main():
    parser = argparse.ArgumentParser(description="Draw pictures from a checkpoint into one labelled grid.")
    add = parser.add_argument
    add("--model", default="CompVis/stable-diffusion-v1-4", help="folder, hub id, NAME:SUBFOLDER, or shapes")
    add("--compare", metavar="MODEL", help="a second model, on the same noise, below the first")
    add("--prompt", nargs="+", action="extend", required=True, help="may be given several times")
    add("--seed", type=int, nargs="+", default=[0], help="one picture per prompt and seed")
    add("--steps", type=int, default=50)
    add("--eta", type=float, default=1.0, help="0 for deterministic DDIM; the policy is trained at 1")
    add("--guidance", type=float, default=5.0)
    add("--batch", type=int, default=8, help="pictures drawn at once")
    add("--device", default=default_device())
    add("--out", default="grid.png")
    if parser.parse_known_args()[0].model == "shapes":
        parser.set_defaults(steps=12, guidance=2.75)  # as it is trained
    args = parser.parse_args()
    models = [args.model, args.compare] if args.compare else [args.model]
    rows = []
    for model in models:
        pipe = load_pipeline(model, args.device)
        rows.append(pictures(pipe, args.prompt, args.seed, args.steps, args.eta, args.guidance, args.batch))
    shape = (len(args.prompt), len(models), len(args.seed))
    grid = torch.stack([r.unflatten(0, (shape[0], shape[2])) for r in rows], 1).flatten(0, 2)
    labels = [f"{prompt} ({model})" if args.compare else prompt for prompt in args.prompt for model in models]
    save_grid(grid, args.out, shape[2], labels, [f"seed {s}" for s in args.seed])
    print(f"{args.out}: {len(grid)} pictures, {args.steps} steps, eta {args.eta}, guidance {args.guidance}, "
          "no safety checker")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
