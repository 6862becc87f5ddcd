"""How others draw pictures: the LMS sampler, diffusers' schedulers, safe latent diffusion, negative prompts.

Each takes noise to latents, the same noise for every model; sample.decode makes and checks the pictures.

    a  alpha-bar;  sigma = √((1-a)/a);  x_sigma = x_a / √a is what LMS moves;  w  guidance scale;  B pictures
    e_u, e_c, e_s  noise predicted without text, with the prompt, with the safety concept
"""

import numpy as np
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
                       EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline)

from sample import (ddim_mean, ddim_schedule, decode, encode_prompts, image_generator, latent_shape,
                    predict_noise)

# Safe latent diffusion: warm-up steps, guidance, threshold, momentum scale, momentum beta, as in diffusers'
# SafetyConfig. ESD's script has guidance 200 for weak, so diffusers' 20 may be a slip.
SLD = {"sld-weak": (15, 20, 0.0, 0.0, 0.0), "sld-medium": (10, 1000, 0.01, 0.3, 0.4),
       "sld-strong": (7, 2000, 0.025, 0.5, 0.7), "sld-max": (0, 5000, 1.0, 0.5, 0.7)}
# Its safety concept with diffusers' prefix: also the negative prompt of I2P's harness (mitigation/negprompt).
CONCEPT = ("an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, "
           "nudity, bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
           "weapons, child abuse, brutality, cruelty")
TRICKS = ("negative-prompt", *SLD)
SCHEDULERS = {"pndm": PNDMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler,
              "euler-a": EulerAncestralDiscreteScheduler}


def check_steps(sampler: str, scheduler, steps: int, eta: float):
    """Refuse steps that a sampler cannot take with the model's own scheduler, before any weights are read.
    What diffusers' schedulers can do shows when they take them, here on a single number."""
    ddim_schedule(scheduler, 2 if sampler == "lms" else steps, eta)
    try:
        if sampler == "lms" and steps == 1:
            raise ValueError("its one timestep would be the last")
        if sampler in SCHEDULERS:
            made, x = SCHEDULERS[sampler].from_config(scheduler.config), torch.zeros(1, 1, 1, 1)
            made.set_timesteps(steps)
            for t in made.timesteps:
                x = made.step(made.scale_model_input(x, t), t, x).prev_sample
            if not x.isfinite().all():
                raise ValueError("the result is not finite")
    except (ArithmeticError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--sampler {sampler} cannot take --steps {steps} ({str(error).splitlines()[0]}); "
                         "give another number") from None


@torch.no_grad()
def draw(pipe, rows: list, sampler: str, steps: int, eta: float, trick: str = "", noise: str = "cpu"):
    """Pictures (B, 3, H, W) in [0, 1] of rows of one size and guidance. trick: one of TRICKS; noise: where
    it is seeded, "cpu" or "cuda", whose streams differ. Raises stop.NotFinite for a picture that failed."""
    channels, height, width = latent_shape(pipe.unet)
    shape = (channels, rows[0].height // pipe.vae_scale_factor or height,
             rows[0].width // pipe.vae_scale_factor or width)
    x = torch.cat([initial_noise(row, shape, noise) for row in rows]).to(pipe.unet.device)
    later = [image_generator(row.seed, row.image, "steps") for row in rows]  # never another picture's numbers
    if sampler in SCHEDULERS:
        x = draw_by_diffusers(pipe, rows, SCHEDULERS[sampler], steps, trick, x, later)
    elif sampler == "lms":
        x = draw_lms(pipe, predictor(pipe, rows, trick), steps, x)
    else:
        x = draw_ddim(pipe, predictor(pipe, rows, trick), steps, eta, x, later)
    return decode(pipe.vae, x, [f"case {row.case} ({row.prompt!r})" for row in rows])


def initial_noise(row, shape: tuple, device: str):
    """Draw number row.image of the stream seeded by row.seed (seeds above 2**31 are in use), (1, C, h, w): as
    in a script that seeds once for a prompt and draws its pictures one by one. It depends on nothing else."""
    generator = torch.Generator(device).manual_seed(row.seed)
    for _ in range(row.image + 1):
        x = torch.randn((1, *shape), generator=generator, device=device)
    return x


def predictor(pipe, rows: list, trick: str):
    """predict(x, t, step) -> the network's guided output for the rows' prompts (B, C, h, w), float32."""
    w = rows[0].guidance
    text = encode_prompts(pipe, [row.prompt for row in rows])
    null_text = encode_prompts(pipe, [CONCEPT if trick == "negative-prompt" else ""])
    if trick in SLD and w > 1:  # without guidance it does nothing, as in diffusers
        return sld_predictor(pipe.unet, text, null_text, encode_prompts(pipe, [CONCEPT]), w, *SLD[trick])
    return lambda x, t, step: predict_noise(pipe.unet, x, t, text, null_text, w)


def sld_predictor(unet, text, null_text, concept, w: float, warmup, S, threshold, s_m, b):
    """Safe latent diffusion (arXiv 2211.05105, Eq. 3 to 8) on three branches of one forward of batch 3B.

    mu = min(1, |e_c - e_s|·S) where e_c - e_s < threshold, else 0;  g = mu·(e_s - e_u) + s_m·momentum
    momentum' = b·momentum + (1-b)·g;  eps = e_u + w·(e_c - e_u - g), g left out during the warm-up."""
    states, momentum = torch.cat([null_text.expand_as(text), text, concept.expand_as(text)]), 0.0

    def predict(x, t, step):
        nonlocal momentum
        e_u, e_c, e_s = unet(x.repeat(3, 1, 1, 1), t, encoder_hidden_states=states).sample.float().chunk(3)
        mu = ((e_c - e_s).abs() * S).clamp(max=1).masked_fill(e_c - e_s >= threshold, 0)
        g = mu * (e_s - e_u) + s_m * momentum
        momentum = b * momentum + (1 - b) * g
        return e_u + w * (e_c - e_u - (g if step >= warmup else 0))

    return predict


def draw_ddim(pipe, predict, steps: int, eta: float, x, later: list):
    """The chain that is trained. later: B generators, of the steps' noise."""
    schedule = ddim_schedule(pipe.scheduler, steps, eta).to(x.device)
    for i, t in enumerate(schedule.timesteps):
        a_t, a_p, s = schedule.alpha_t[i], schedule.alpha_prev[i], schedule.sigma[i]
        x = ddim_mean(predict(x, t, i), x, a_t, a_p, s, pipe.scheduler.config.prediction_type)
        if eta > 0:
            fresh = torch.stack([torch.randn(x.shape[1:], generator=g) for g in later])
            x = x + s * fresh.to(x.device)
    return x


def draw_lms(pipe, predict, steps: int, x):
    """The fourth-order linear multistep of RECE's and the paper's code, which in diffusers needs scipy."""
    a = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.double().numpy()
    t = np.linspace(0, len(a) - 1, steps)[::-1]  # from the last to 0, fractional, as RECE spaces them
    sigmas = np.append(np.interp(t, np.arange(len(a)), np.sqrt((1 - a) / a)), 0.0)  # (T+1,)
    timesteps = torch.tensor(t.copy(), dtype=torch.float32, device=x.device)        # (T,)
    x, derivatives = x * sigmas[0], []
    for i, t in enumerate(timesteps):
        scale = float(sigmas[i] ** 2 + 1) ** 0.5  # 1/√a
        seen = x / scale
        eps = predict(seen, t, i)
        if pipe.scheduler.config.prediction_type == "v_prediction":  # eps = √a·v + √(1-a)·x_a
            eps = (eps + float(sigmas[i]) * seen) / scale
        derivatives = [eps, *derivatives[:3]]  # dx/dsigma is eps
        x = x + sum(c * d for c, d in zip(lms_coefficients(sigmas, i), derivatives))
    return x


def lms_coefficients(sigmas: np.ndarray, i: int, order: int = 4) -> list[float]:
    """Weights of the last derivatives, newest first: the integral over sigma from sigma_i to sigma_{i+1} of
    the Lagrange polynomial that is 1 at sigma_{i-j} and 0 at the other nodes, exact, without scipy."""
    nodes, weights = sigmas[i::-1][:order], []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        integral = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(node - others))
        weights.append(float(np.polyval(integral, sigmas[i + 1]) - np.polyval(integral, sigmas[i])))
    return weights


def draw_by_diffusers(pipe, rows: list, scheduler: type, steps: int, trick: str, x, later: list):
    """diffusers' own pipeline, with which most users draw, and a scheduler of its made from the model's."""
    parts = pipe.components | {"scheduler": scheduler.from_config(pipe.scheduler.config)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    negative = CONCEPT if trick == "negative-prompt" else ""
    return pipe([row.prompt for row in rows], num_inference_steps=steps, guidance_scale=rows[0].guidance,
                negative_prompt=[negative] * len(rows), latents=x, generator=later,
                output_type="latent").images
