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
    python sample.py --model runs/sd14/final --compare CompVis/stable-diffusion-v1-4 --prompt "a lighthouse"
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

from plumbing.stop import check_finite, check_pictures, run_script

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
    diffusers. a_p belongs to the next timestep in the list, where diffusers takes t − N//T, which is beside
    the list in trailing and linspace spacing unless T divides N; after the last comes alpha-bar of step 0, or
    1 where the configuration says set_alpha_to_one: then s is 0 there. Raises ValueError for another process
    than the DDPM's, a step count or eta out of range, or a schedule that starts from pure noise."""
    config, kind = scheduler.config, scheduler.config.get("prediction_type")
    if kind not in ("epsilon", "v_prediction") or "beta_start" not in config or config.get("use_flow_sigmas"):
        raise ValueError(f"scheduler_config.json: a {type(scheduler).__name__} with prediction_type {kind} "
                         "is no DDPM's that predicts epsilon or v; give a Stable Diffusion 1.x or 2.x")
    ddim = DDIMScheduler.from_config(config)
    train_steps = ddim.config.num_train_timesteps
    if not (1 <= num_steps <= train_steps and 0 <= eta <= 1):
        raise ValueError(f"--steps {num_steps}, --eta {eta}: give 1 to {train_steps} steps, eta from 0 to 1")
    ddim.set_timesteps(num_steps)
    t = ddim.timesteps.long()
    if not 0 <= t.min() <= t.max() < train_steps:
        raise ValueError(f"--steps {num_steps}: timesteps {t.min()} to {t.max()} of {train_steps}: give less")
    alphas = ddim.alphas_cumprod.double()  # float64 up to the end: 1 − a_t/a_p loses digits where a_t ≈ a_p
    alpha_t = alphas[t]
    alpha_prev = torch.cat([alpha_t[1:], ddim.final_alpha_cumprod.double().reshape(1)])
    if not alpha_t.min() >= 1e-6:  # as with rescale_betas_zero_snr, or cosine betas in trailing spacing
        key = "rescale_betas_zero_snr" if ddim.config.rescale_betas_zero_snr else "timestep_spacing"
        raise ValueError(f"scheduler_config.json: {key} {ddim.config[key]} on {ddim.config.beta_schedule} "
                         f"betas leaves the signal {alpha_t.min():.0e} at timestep {t[alpha_t.argmin()]}; "
                         "a step from pure noise divides by it; try false, or leading spacing")
    if not ((alpha_t <= alpha_prev) & (alpha_prev <= 1)).all():
        raise ValueError("scheduler_config.json: alpha-bar does not fall from 1 towards 0 with these betas")
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

    A mean and not a sum, as in DDPO and in the released code: exp(logp − logp_old) is the true ratio to the
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


def autocast(device, dtype):
    """The context in which networks compute: `dtype` by autocast, or as they are for float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


# -------------------------------------------------------------------------------- trajectories

@dataclass
class Rollout:
    """B trajectories, with all that their log-densities depend on."""
    latents: torch.Tensor    # (B, T + 1, C, h, w) float32; [:, i] is x_t of step i, [:, i + 1] its x_p
    log_probs: torch.Tensor  # (B, T) float32, 0 where sigma is 0; (B, 0) for eta = 0, which has no density
    text: torch.Tensor       # (B, L, d) the prompts' states, float32
    null_text: torch.Tensor  # (1, L, d) the empty prompt's
    names: list              # B words for the pictures, for messages


def image_generator(*key) -> torch.Generator:
    """A random stream of its own for every (seed, epoch, prompt index, image index, purpose): picture i does
    not change with the batch size, and a resumed run needs no stored state. Always on the CPU, so equal on
    every device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def rollout(unet, schedule: Schedule, text, null_text, guidance: float, generators: list, shape: tuple,
            names: list, prediction_type: str = "epsilon", batch_size: int = 16, keep: bool = True,
            initial=None, progress=None) -> Rollout:
    """Draw B pictures' trajectories with the policy, in batches.

    text (B, L, d), null_text (1, L, d); generators: B, each of which draws its picture's initial noise first
    and then the noise of every step; shape (C, h, w); names: B words for the pictures; keep: False keeps the
    last latents alone, (B, 1, C, h, w); initial: (B, C, h, w) in place of the drawn initial noise; progress:
    a tqdm bar, advanced once per network call. Raises stop.NotFinite."""
    T, device = len(schedule.timesteps), text.device
    stochastic = bool((schedule.sigma > 0).any())
    kept, log_probs = [], torch.zeros(len(text), T if stochastic else 0, device=device)
    for start in range(0, len(text), batch_size):
        batch = slice(start, start + batch_size)
        draws = T + 1 if stochastic else 1
        noise = torch.stack([torch.randn(draws, *shape, generator=g) for g in generators[batch]])
        noise = noise.to(device)                                      # (b, T + 1, C, h, w)
        x = noise[:, 0] if initial is None else initial[batch].float()
        chain = [x]
        for i, t in enumerate(schedule.timesteps):
            a_t, a_p, s = schedule.alpha_t[i], schedule.alpha_prev[i], schedule.sigma[i]
            eps = predict_noise(unet, x, t, text[batch], null_text, guidance)
            x = mu = ddim_mean(eps, x, a_t, a_p, s, prediction_type)
            if stochastic:
                x = mu + s * noise[:, i + 1]
                log_probs[batch, i] = log_prob(x, mu, s).where(s > 0, 0)  # a step without noise has none
            if keep:
                chain.append(x)
            if progress is not None:
                progress.update()
        kept.append(torch.stack(chain, 1) if keep else x[:, None])
    drawn = Rollout(torch.cat(kept), log_probs, text, null_text, names)
    check_finite("latent", drawn.latents, names)
    check_finite("log-probability", log_probs, names)
    return drawn


def latent_shape(unet) -> tuple:
    """(C, h, w) of a UNet's latents."""
    size = unet.config.sample_size  # a number, or [height, width]
    return unet.config.in_channels, *((size, size) if isinstance(size, int) else size)


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str]):
    """The text encoder's states for the UNet, cut or padded as in training: (N, L, d) float32."""
    length = min(pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=length, truncation=True,
                            return_tensors="pt").to(pipe.text_encoder.device)
    mask = tokens.attention_mask if getattr(pipe.text_encoder.config, "use_attention_mask", False) else None
    return pipe.text_encoder(tokens.input_ids, attention_mask=mask)[0].float()


@torch.no_grad()
def decode(vae, latents, names: list, batch_size: int = DECODE_BATCH):
    """Latents (B, C, h, w) -> pictures (B, 3, H, W), float32 in [0, 1], on the same device. names: B words
    for the pictures. Raises stop.NotFinite for one that failed, which nobody is to judge."""
    latents, pictures = (latents / vae.config.scaling_factor).to(vae.dtype), []
    for i in range(0, len(latents), batch_size):
        part = latents[i:i + batch_size]
        picture = vae.decode(part).sample.float()
        check_pictures(part, picture, names[i:i + batch_size], vae.dtype)
        pictures.append((picture / 2 + 0.5).clamp(0, 1))
    return torch.cat(pictures)


@torch.no_grad()
def draw(pipe, unet, schedule: Schedule, texts: list[str], generators: list, guidance: float,
         batch_size: int = 8, dtype=torch.float32, names: list | None = None, **more):
    """From B prompts to pictures: encode, roll out with `unet`, decode by `pipe`'s VAE.

    A prompt that stands several times is encoded once. dtype: of the networks' compute; names: B words for
    the pictures, by default the prompts; more: rollout's. Returns the Rollout and B pictures in [0, 1]."""
    distinct = list(dict.fromkeys(texts))
    row = {text: i for i, text in enumerate(distinct)}
    text = encode_prompts(pipe, distinct)[[row[text] for text in texts]]           # (B, L, d)
    null_text, names = encode_prompts(pipe, [""]), names or [f"prompt {text!r}" for text in texts]
    with autocast(text.device, dtype):
        drawn = rollout(unet, schedule, text, null_text, guidance, generators, latent_shape(pipe.unet), names,
                        pipe.scheduler.config.prediction_type, batch_size, **more)
        return drawn, decode(pipe.vae, drawn.latents[:, -1], names)


if __name__ == "__main__":
    from views.grid import main
    run_script("sample.py", main)
