"""How others draw pictures: the LMS sampler, diffusers' schedulers, safe latent diffusion, negative prompts.

sample.py holds the chain that is trained; this file holds what the models are measured with. One loop serves
both samplers and every baseline, on the same noise for every model: sample.py's guidance and DDIM mean, or
the fourth-order linear multistep of the evaluation code of RECE, Receler and the paper, which diffusers has
only with scipy. What most users draw with is diffusers' own pipeline with one of SCHEDULERS.

    a  alpha-bar;  sigma = √((1-a)/a);  x_sigma = x_a / √a is what LMS moves;  w  guidance scale;  B pictures
    e_u, e_c, e_s  noise predicted without text, with the prompt, with the safety concept
"""

import numpy as np
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
                       EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline)

from sample import (ddim_mean, ddim_schedule, decode, encode_prompts, image_generator, latent_shape,
                    predict_noise)

# Safe latent diffusion (arXiv 2211.05105): warm-up steps, guidance, threshold, momentum scale, momentum beta,
# as in diffusers' SafetyConfig. ESD's script has guidance 200 for weak, so diffusers' 20 may be a slip.
SLD = {"sld-weak": (15, 20, 0.0, 0.0, 0.0), "sld-medium": (10, 1000, 0.01, 0.3, 0.4),
       "sld-strong": (7, 2000, 0.025, 0.5, 0.7), "sld-max": (0, 5000, 1.0, 0.5, 0.7)}
# Its safety concept with diffusers' prefix: also the negative prompt of I2P's harness (mitigation/negprompt).
CONCEPT = ("an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, "
           "nudity, bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
           "weapons, child abuse, brutality, cruelty")
TRICKS = ("negative-prompt", *SLD)
SCHEDULERS = {"pndm": PNDMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler,
              "euler-a": EulerAncestralDiscreteScheduler}


def lms_schedule(alphas_cumprod, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps (T,), fractional, evenly from the last to 0, and sigma = √((1-a)/a) there, then 0 (T+1,).

    The spacing of RECE's LMSDiscreteScheduler(0.00085, 0.012, "scaled_linear", 1000) on the model's betas."""
    alphas = alphas_cumprod.double().numpy()
    t = np.linspace(0, len(alphas) - 1, steps)[::-1]
    return t, np.append(np.interp(t, np.arange(len(alphas)), np.sqrt((1 - alphas) / alphas)), 0.0)


def lms_coefficients(sigmas: np.ndarray, i: int, order: int = 4) -> list[float]:
    """Weights of the last derivatives, newest first: the integral over sigma from sigma_i to sigma_{i+1} of
    the Lagrange polynomial that is 1 at sigma_{i-j} and 0 at the other nodes. Polynomials integrate exactly:
    no quadrature and no scipy."""
    nodes, weights = sigmas[i::-1][:order], []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        integral = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(node - others))
        weights.append(float(np.polyval(integral, sigmas[i + 1]) - np.polyval(integral, sigmas[i])))
    return weights


def sld_noise(unet, x, t, text, null_text, concept, guidance: float, preset: tuple, step: int, momentum):
    """Safe latent diffusion (arXiv 2211.05105, Eq. 3 to 8) on three branches of one forward of batch 3B.

    mu = min(1, |e_c - e_s|·S) where e_c - e_s < threshold, else 0;  g = mu·(e_s - e_u) + s_m·momentum
    momentum' = b·momentum + (1-b)·g;  eps = e_u + w·(e_c - e_u - g), g left out during the warm-up.
    Returns eps and momentum', (B, C, h, w) float32."""
    warmup, scale, threshold, momentum_scale, beta = preset
    states = torch.cat([null_text.expand_as(text), text, concept.expand_as(text)])
    e_u, e_c, e_s = unet(x.repeat(3, 1, 1, 1), t, encoder_hidden_states=states).sample.float().chunk(3)
    strength = ((e_c - e_s).abs() * scale).clamp(max=1).masked_fill(e_c - e_s >= threshold, 0)
    g = strength * (e_s - e_u) + momentum_scale * momentum
    direction = e_c - e_u - (g if step >= warmup else 0)
    return e_u + guidance * direction, beta * momentum + (1 - beta) * g


@torch.no_grad()
def draw(pipe, rows: list, sampler: str, steps: int, eta: float, trick: str = "", noise: str = "cpu"):
    """Pictures (B, 3, H, W) in [0, 1] of rows of one size and guidance.

    A row's initial noise is draw number `image` of a generator with its seed, as in a script that seeds once
    for a prompt and draws its pictures one by one; it depends on nothing else. noise: where that generator
    lives, "cpu" or "cuda", whose streams differ."""
    unet, device, first = pipe.unet, pipe.unet.device, rows[0]
    kind, (channels, height, width) = pipe.scheduler.config.prediction_type, latent_shape(unet)
    shape = (channels, first.height // pipe.vae_scale_factor or height,
             first.width // pipe.vae_scale_factor or width)
    x = torch.cat([initial_noise(row, shape, noise) for row in rows]).to(device)
    later = [image_generator(row.seed, row.image, "steps") for row in rows]  # never another picture's numbers
    negative = CONCEPT if trick == "negative-prompt" else ""
    if sampler in SCHEDULERS:
        return draw_by_diffusers(pipe, rows, SCHEDULERS[sampler], steps, negative, x, later)
    text = encode_prompts(pipe, [row.prompt for row in rows])
    null_text = encode_prompts(pipe, [negative])
    safe = trick in SLD and first.guidance > 1  # as in diffusers: no guidance, no safety guidance
    concept, momentum = encode_prompts(pipe, [CONCEPT]) if safe else None, torch.zeros_like(x)
    if sampler == "lms":
        t, sigmas = lms_schedule(DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod, steps)
        timesteps, derivatives = torch.tensor(t.copy(), dtype=torch.float32, device=device), []
        x = x * sigmas[0]
    else:
        schedule = ddim_schedule(pipe.scheduler, steps, eta).to(device)
        timesteps = schedule.timesteps
    for i, t in enumerate(timesteps):
        seen = x / float(sigmas[i] ** 2 + 1) ** 0.5 if sampler == "lms" else x
        if safe:
            eps, momentum = sld_noise(unet, seen, t, text, null_text, concept, first.guidance, SLD[trick], i,
                                      momentum)
        else:
            eps = predict_noise(unet, seen, t, text, null_text, first.guidance)
        if sampler == "lms":
            if kind == "v_prediction":  # eps = √a·v + √(1-a)·x_a with a = 1/(sigma²+1)
                eps = (eps + float(sigmas[i]) * seen) / float(sigmas[i] ** 2 + 1) ** 0.5
            derivatives = [eps, *derivatives[:3]]  # dx/dsigma is eps
            x = x + sum(c * d for c, d in zip(lms_coefficients(sigmas, i), derivatives))
        else:
            x = ddim_mean(eps, x, schedule.alpha_t[i], schedule.alpha_prev[i], schedule.sigma[i], kind)
            if schedule.sigma[i] > 0:
                fresh = torch.stack([torch.randn(shape, generator=g) for g in later])
                x = x + schedule.sigma[i] * fresh.to(device)
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"{sampler} is not finite on cases {[row.case for row in rows]}: "
                                 "try --dtype float32")
    return decode(pipe.vae, x)


def draw_by_diffusers(pipe, rows: list, scheduler, steps: int, negative: str, noise, generators: list):
    """Pictures by diffusers' own pipeline, with a scheduler made from the model's: (B, 3, H, W) in [0, 1].

    noise (B, C, h, w) of unit variance; generators: B, of the noise of later steps."""
    parts = pipe.components | {"scheduler": scheduler.from_config(pipe.scheduler.config)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe([row.prompt for row in rows], num_inference_steps=steps, guidance_scale=rows[0].guidance,
                negative_prompt=[negative] * len(rows), latents=noise, generator=generators,
                output_type="pt").images.float()


def initial_noise(row, shape: tuple, device: str):
    """Draw number row.image of the stream seeded by row.seed (seeds above 2**31 are in use): (1, C, h, w)."""
    generator = torch.Generator(device).manual_seed(row.seed)
    for _ in range(row.image + 1):
        x = torch.randn((1, *shape), generator=generator, device=device)
    return x
