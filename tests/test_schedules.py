"""Schedules as they lie in public fine-tunes: which are read, which are refused, what is trained of each."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

import sample
from plumbing import checks
from plumbing.models import check_scheduler

WEIGHTS = Path(__file__).parent.parent / "shapes" / "weights"
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# Class and keys as public Stable Diffusion fine-tunes have them; whether the last of 50 steps has deviation 0
PUBLIC = [
    ("PNDMScheduler", dict(set_alpha_to_one=False, steps_offset=1, skip_prk_steps=True), False),
    ("PNDMScheduler", dict(set_alpha_to_one=True, steps_offset=1), True),
    ("PNDMScheduler", dict(set_alpha_to_one=False, timestep_spacing="trailing"), False),
    ("DDIMScheduler", dict(set_alpha_to_one=False, steps_offset=1, clip_sample=False), False),
    ("DDIMScheduler", dict(set_alpha_to_one=True, clip_sample=False), True),
    ("DDIMScheduler", dict(set_alpha_to_one=False, timestep_spacing="linspace"), True),
    ("DDIMScheduler", dict(set_alpha_to_one=False, timestep_spacing="trailing",
                           prediction_type="v_prediction"), False),
    ("DDIMScheduler", dict(set_alpha_to_one=False, steps_offset=1, beta_schedule="squaredcos_cap_v2"), False),
    ("EulerDiscreteScheduler", dict(steps_offset=1, timestep_spacing="leading"), True),
    ("EulerDiscreteScheduler", dict(timestep_spacing="trailing", interpolation_type="linear"), True),
    ("EulerAncestralDiscreteScheduler", dict(steps_offset=1, timestep_spacing="linspace"), True),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", use_karras_sigmas=True,
                                         timestep_spacing="linspace"), True),
    ("DPMSolverMultistepScheduler", dict(prediction_type="v_prediction", steps_offset=1), True),
    ("DPMSolverSinglestepScheduler", dict(algorithm_type="dpmsolver++"), True),
    ("UniPCMultistepScheduler", dict(solver_order=2, steps_offset=1), True),
    ("LCMScheduler", dict(set_alpha_to_one=True, original_inference_steps=50, steps_offset=1), True),
    ("DDPMScheduler", dict(clip_sample=False, variance_type="fixed_small", steps_offset=1), True),
    ("DEISMultistepScheduler", dict(solver_order=2, timestep_spacing="linspace"), True),
    ("LMSDiscreteScheduler", dict(timestep_spacing="linspace"), True),
    ("HeunDiscreteScheduler", dict(timestep_spacing="linspace"), True)]


def folder(tmp_path, name, **config):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, **BETAS, **config}))
    return tmp_path


@pytest.mark.parametrize("name, config, last_is_still", PUBLIC)
def test_a_public_schedule_is_trained_where_it_has_noise(name, config, last_is_still, tmp_path, capsys):
    """Finite log-probabilities at every step, and --skip-last raised to the first step without noise."""
    getattr(diffusers, name)  # there is such a class
    args = SimpleNamespace(steps=50, eta=1.0, skip_last=0, updates=1, prompts_per_rollout=1, group=2,
                           timestep_fraction=1.0)
    place = folder(tmp_path, name, **config)
    checks.check_schedule(args, place)
    assert args.skip_last == last_is_still
    assert ("scheduler_config.json" in capsys.readouterr().out) == last_is_still
    schedule = check_scheduler(place, 50)
    sigma = schedule.sigma
    assert (sigma[:-1] > 0).all() and (sigma[-1] == 0) == last_is_still
    unet = lambda x, *_, **__: SimpleNamespace(sample=0.1 * x)
    drawn = sample.rollout(unet, schedule, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 1.0,
                           [sample.image_generator(0)], (1, 2, 2))
    assert drawn.log_probs.isfinite().all() and (drawn.log_probs[:, -1] == 0).all() == last_is_still


REFUSED = [
    ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0), "another process"),
    ("EDMEulerScheduler", dict(sigma_data=0.5), "another process"),
    ("DPMSolverMultistepScheduler", dict(use_flow_sigmas=True), "another process"),
    ("UniPCMultistepScheduler", dict(use_flow_sigmas=True, prediction_type="flow_prediction"),
     "another process"),
    ("MyScheduler", {}, "another process"), (None, {}, "another process"),
    (["DDIMScheduler"], {}, "another process"),
    ("DDIMScheduler", dict(prediction_type="sample"), "not 'sample'"),
    ("DDPMScheduler", dict(prediction_type="flow_prediction"), "epsilon or v_prediction"),
    ("DDIMScheduler", dict(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"),
     "timestep_spacing trailing on squaredcos_cap_v2"),
    ("DDIMScheduler", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
     "rescale_betas_zero_snr True"),
    ("DDIMScheduler", dict(beta_schedule="laplace"), "laplace"),
    ("DDIMScheduler", dict(beta_schedule=7), "a str"),
    ("DDIMScheduler", dict(beta_start=None), "beta_start is None"),
    ("DDIMScheduler", dict(beta_end="1"), "a float"),
    ("DDIMScheduler", dict(beta_start=-1.0), "scheduler_config.json"),
    ("DDIMScheduler", dict(beta_end=float("nan")), "scheduler_config.json"),
    ("DDIMScheduler", dict(beta_end=5.0), "scheduler_config.json"),
    ("DDIMScheduler", dict(trained_betas=[0.1, 0.2]), "scheduler_config.json"),
    ("DDIMScheduler", dict(trained_betas="x"), "scheduler_config.json"),
    ("DDIMScheduler", dict(num_train_timesteps=10**12), "between 2 and"),
    ("DDIMScheduler", dict(num_train_timesteps=0), "between 2 and"),
    ("DDIMScheduler", dict(num_train_timesteps=True), "a int"),
    ("DDIMScheduler", dict(timestep_spacing="other"), "scheduler_config.json"),
    ("DDIMScheduler", dict(steps_offset=-5), "steps_offset in scheduler_config.json"),
    ("DDIMScheduler", dict(steps_offset=500), "steps_offset in scheduler_config.json"),
    ("DDIMScheduler", dict(steps_offset="1"), "scheduler_config.json"),
    ("DPMSolverMultistepScheduler", dict(algorithm_type="none"), "scheduler_config.json")]


@pytest.mark.parametrize("name, config, said", REFUSED)
def test_what_gives_no_schedule_is_refused_in_one_line(name, config, said, tmp_path):
    with pytest.raises(ValueError) as error:
        check_scheduler(folder(tmp_path, name, **config), 50)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert ("zero_snr" in str(error.value)) == ("rescale_betas_zero_snr" in config)


@pytest.mark.parametrize("steps, spacing, said", [
    (1, "linspace", "the first step has sigma 0"), (1000, "leading", "give fewer steps"),
    (1001, "leading", "--steps")])
def test_too_few_or_too_many_steps(steps, spacing, said, tmp_path):
    args = SimpleNamespace(steps=steps, eta=1.0, skip_last=0, updates=1, prompts_per_rollout=1, group=2,
                           timestep_fraction=1.0)
    place = folder(tmp_path, "DDIMScheduler", set_alpha_to_one=False, steps_offset=1,
                   timestep_spacing=spacing)
    with pytest.raises(ValueError, match=said):
        checks.check_schedule(args, place)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [12, 30, 50, 100])
def test_where_the_previous_step_departs_from_diffusers(spacing, steps):
    """diffusers takes t - N // T for the previous timestep. That is the next one of the list in leading
    spacing; elsewhere the list runs in other strides, and the two alpha-bars differ by up to 2.2 in log-SNR
    at T = 12."""
    theirs = DDIMScheduler(**BETAS, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing)
    ours = sample.ddim_schedule(theirs, steps, 1.0)
    theirs.set_timesteps(steps)
    t = theirs.timesteps
    assert torch.equal(ours.timesteps, t)
    assert torch.equal(ours.alpha_prev[:-1],
                       ours.alpha_t[1:]) and ours.alpha_prev[-1] == theirs.alphas_cumprod[0]
    previous = (t - 1000 // steps)[:-1]
    departs = (previous != t[1:]).any().item()
    assert departs == (spacing == "linspace" or spacing == "trailing" and 1000 % steps != 0)
    log_snr = lambda alpha: (alpha / (1 - alpha)).log()
    alpha = theirs.alphas_cumprod[previous.clamp(min=0)]
    apart = (log_snr(alpha) - log_snr(ours.alpha_prev[:-1])).abs().max()
    if spacing == "linspace":
        assert abs(apart.item() - {12: 2.2, 30: 0.7, 50: 0.05,
                                   100: 0.2}[steps]) < (0.1 if steps < 50 else 0.5)


def test_the_check_comes_before_the_weights(tmp_path, monkeypatch):
    """All three programs, on a folder of which only the schedule is wrong."""
    import evaluate
    import plumbing.models
    import train
    place = tmp_path / "model"
    shutil.copytree(WEIGHTS, place)
    file = place / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"epsilon"', '"sample"'))
    monkeypatch.setattr(plumbing.models, "load_network", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="not 'sample'"):
        sample.main(["--model", str(place), "--prompt", "a", "--device", "cpu"])
    with pytest.raises(ValueError, match="not 'sample'"):
        train.main(["--model", str(place), "--clip", str(WEIGHTS / "text_encoder"), "--out",
                    str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(place), "--suite", "prompts", "--prompts", str(tmp_path), "--device",
                       "cpu",
                       "--judges", "clip", "--out", str(tmp_path / "out")])
