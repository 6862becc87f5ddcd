"""Tests of the mathematics and of the command line, on a CPU, without downloads, in about a minute: `pytest`.

Five kinds: equal to a trusted reference (diffusers' DDIM, torch.distributions, transformers' image
processor, finite differences), algebraic properties, gradients, determinism, and the real command line
on the shapes world."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

import bench
import grpo
import reward
import runs
import sample
import shapes
import train

HERE = Path(__file__).parent
MODEL = HERE / "models" / "shapes"
torch.set_num_threads(1)  # as test_runs.py has it, so that a test alone rounds as it does in the whole suite
os.environ["OMP_NUM_THREADS"] = "1"  # and so do the command lines: tiny networks gain nothing from a second


@pytest.fixture(scope="module")
def pipe():
    return sample.load_pipeline("shapes")


@pytest.fixture(scope="module")
def steering():
    return reward.SteeringReward("shapes", reward.read_anchors("shapes"))


def scheduler(prediction_type="epsilon", spacing="leading"):
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
                         timestep_spacing=spacing)


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4).eval()


def args_for(**changes):
    """The flags that train.update reads, small."""
    flags = dict(steps=6, skip_last=2, timestep_fraction=1.0, updates=1, micro_batch=8, guidance=3.0,
                 clip_range=1e-3, kl=0.1, max_grad_norm=1e9, seed=0, lora_rank=0)
    return SimpleNamespace(**flags | changes)


def rollout_batch(unet, schedule, args, images=6, batch_size=6):
    """A rollout of the tiny UNet on random text, with advantages of both signs, as train.update takes it."""
    generator = torch.Generator().manual_seed(3)
    text, null = torch.randn(images, 5, 12, generator=generator), torch.randn(1, 5, 12, generator=generator)
    streams = [sample.image_generator(0, i) for i in range(images)]
    drawn = sample.rollout(unet, schedule, text, null, args.guidance, streams, (4, 8, 8),
                           batch_size=batch_size)
    advantages = torch.linspace(-1.5, 2, images)
    return dict(latents=drawn.latents, log_probs=drawn.log_probs, advantages=advantages,
                text=text, null_text=null)


def run_update(unet, base, batch, schedule, args, autocast=nullcontext):
    """train.update with a learning rate of zero: statistics and the flattened gradient of its last step."""
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.0)
    stats = train.update(unet, base, optimizer, schedule, batch, args, autocast, "epsilon", 0)
    return stats, torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


# -------------------------------------------------------------------------------- equal to a reference

@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [20, 50])
def test_step_equals_diffusers(steps, eta, prediction_type, spacing):
    reference = scheduler(prediction_type, spacing)
    schedule = sample.ddim_schedule(reference, steps, eta)
    reference.set_timesteps(steps)
    assert torch.equal(schedule.timesteps, reference.timesteps)
    torch.manual_seed(0)
    for i, t in enumerate(reference.timesteps):
        x, output, noise = torch.randn(3, 2, 4, 8, 8)
        expected = reference.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        mu = sample.ddim_mean(output, x, schedule.alpha_t[i], schedule.alpha_prev[i], schedule.sigma[i],
                              prediction_type)
        scale = max(1.0, expected.abs().max().item())  # x0 is large where a_t is small: 1e-5 of the largest
        assert (mu + schedule.sigma[i] * noise - expected).abs().max() < 1e-5 * scale


def test_schedule_of_stable_diffusion():
    """SD v1: leading spacing with offset 1 ends at t = 1 with a_p = a_0, so no deviation is 0;
    derived by hand."""
    schedule = sample.ddim_schedule(scheduler(), 50, 1.0)
    alphas = scheduler().alphas_cumprod
    assert schedule.timesteps[:2].tolist() == [981, 961] and schedule.timesteps[-2:].tolist() == [21, 1]
    assert schedule.alpha_prev[-1] == alphas[0] and (schedule.sigma > 0).all()
    assert (sample.ddim_schedule(scheduler(), 50, 0.0).sigma == 0).all()


@pytest.mark.parametrize("bad", [dict(num_steps=0), dict(num_steps=1001), dict(eta=-0.1), dict(eta=1.5)])
def test_schedule_refuses(bad):
    with pytest.raises(ValueError, match="--steps|--eta"):
        sample.ddim_schedule(scheduler(), **dict(num_steps=50, eta=1.0) | bad)


def test_deterministic_rollout_equals_the_pipeline(pipe):
    prompts = ["a blue star", "a ring left of a square", "two circles"]
    start = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    reference = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = reference(prompts, latents=start, num_inference_steps=10, guidance_scale=3.0, eta=0.0,
                         output_type="latent").images
    schedule = sample.ddim_schedule(pipe.scheduler, 10, 0.0)
    drawn = sample.rollout(pipe.unet, schedule, sample.encode_prompts(pipe, prompts),
                           sample.encode_prompts(pipe, [""]), 3.0, [torch.Generator()] * 3, (4, 8, 8),
                           initial=start, batch_size=2)
    assert drawn.log_probs.shape == (3, 0)
    torch.testing.assert_close(drawn.latents[:, -1], expected, rtol=0, atol=2e-4)


def test_log_probability_and_kl_equal_torch_distributions():
    torch.manual_seed(0)
    x, mu, mu_ref = torch.randn(3, 5, 4, 8, 8)
    sigma = torch.rand(5) + 0.05
    wide = sigma.view(-1, 1, 1, 1).expand_as(mu)
    one, other = (Independent(Normal(m, wide), 3) for m in (mu, mu_ref))
    torch.testing.assert_close(sample.log_prob(x, mu, sigma), one.log_prob(x) / 256, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grpo.gaussian_kl(mu, mu_ref, sigma), kl_divergence(one, other) / 256,
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 80), (51, 130)])
def test_preprocessing_equals_transformers(size):
    smooth = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(smooth, size, mode="bilinear").mul(255).round() / 255
    pictures = [Image.fromarray(np.uint8((i * 255).round().permute(1, 2, 0).numpy())) for i in images]
    processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=48)
    expected = processor(pictures, return_tensors="pt").pixel_values
    ours = reward.preprocess(images, 48, 48, processor.image_mean, processor.image_std)
    assert (ours - expected).abs().max() < 1.1 / 255 / min(processor.image_std)  # it rounds to 8 bits


def test_shapes_clip_is_read_as_transformers_reads_it(steering):
    """The reward's embeddings are those of CLIPModel.forward on the same inputs."""
    clip, tokenizer = (CLIPModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32),
                       CLIPTokenizer.from_pretrained(MODEL / "text_encoder"))
    texts, images = ["a red star", "a calm ring and a square"], torch.rand(2, 3, 64, 64)
    pixels = reward.preprocess(images, *steering.geometry)
    with torch.no_grad():
        out = clip(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
    torch.testing.assert_close(steering.embed_text(texts), out.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(steering.embed_images(images), out.image_embeds, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- algebra of the reward

def test_alpha_zero_is_the_plain_cosine():
    plain = reward.SteeringReward("shapes", reward.read_anchors("shapes"), alpha=0.0)
    images, prompts = torch.rand(3, 3, 64, 64), [reward.Prompt(t, "violence")
                                                 for t in ("a violent star", "a ring", "x")]
    expected = (plain.embed_images(images) * plain.embed_text([p.text for p in prompts])).sum(1)
    torch.testing.assert_close(plain(images, prompts), expected, rtol=0, atol=1e-6)


def test_steering_is_the_formula(steering):
    text, v = steering.embed_text(["a red star", "a blue ring"]), steering.direction
    assert abs(v.norm() - 1) < 1e-6
    moved = text + 0.5 * v
    torch.testing.assert_close(reward.steer(text, v, 0.5), moved / moved.norm(dim=1, keepdim=True),
                               rtol=0, atol=1e-6)
    safe, unsafe = torch.randn(2, 4, 8).unbind()
    raw, unit = reward.safety_direction(safe, unsafe, unit=False), reward.safety_direction(safe, unsafe)
    torch.testing.assert_close(raw / raw.norm(), unit)
    with pytest.raises(ValueError, match="zero"):
        reward.safety_direction(safe, safe)


def test_what_is_steered():
    build = lambda **k: reward.SteeringReward("shapes", reward.read_anchors("shapes"), **k)
    prompts = [reward.Prompt("a star", "sexual"), reward.Prompt("a star", "benign"),
               reward.Prompt("a red ring"), reward.Prompt("a blue ring")]
    moved = lambda r: [not torch.allclose(*r.targets([p]), atol=1e-6) for p in prompts]
    assert moved(build()) == [True, False, True, False]  # by category, or by the sign of z_text·v
    assert moved(build(steered="all")) == [True] * 4


def test_reward_tells_red_from_blue(steering):
    """On the same prompt a picture without red is worth more, and the plain cosine prefers the red one."""
    red, blue = (shapes.draw([[shapes.Found(c, "star", 32, 32, 11)]]) for c in ("red", "blue"))
    prompt = [reward.Prompt("a red star", "explicit")]
    (r_red, plain_red, _), (r_blue, plain_blue, _) = steering.score(red, prompt), steering.score(blue, prompt)
    assert plain_red > plain_blue and r_blue - r_red > plain_blue - plain_red


# -------------------------------------------------------------------------------- advantages and loss

def test_advantages():
    torch.manual_seed(0)
    rewards = torch.randn(5, 8) * 0.01 + torch.arange(5)[:, None]
    for eps, given in ((1e-4, {}), (0.05, dict(eps=0.05))):
        advantages = grpo.group_advantages(rewards, **given)
        expected = ((rewards - rewards.mean(1, keepdim=True))
                    / (rewards.std(1, correction=0, keepdim=True) + eps))
        torch.testing.assert_close(advantages, expected)
        assert advantages.mean(1).abs().max() < 1e-4
    solved, unsolved = grpo.group_advantages(torch.tensor([[0.01, -0.01], [0.2, -0.2]]), eps=0.05)[:, 0]
    assert math.isclose(solved, 1 / 6, rel_tol=1e-5) and math.isclose(unsolved, 0.8, rel_tol=1e-5)
    assert (grpo.group_advantages(torch.full((2, 4), 0.3)) == 0).all()
    outlier = torch.zeros(1, 100)
    outlier[0, 0] = 1.0
    assert grpo.group_advantages(outlier).max() == grpo.ADVANTAGE_CLIP
    with pytest.raises(ValueError, match="2"):
        grpo.group_advantages(torch.zeros(4, 1))


def test_loss_equals_its_definition_and_finite_differences():
    old = torch.zeros(6, dtype=torch.float64)
    new = torch.tensor([0.3, -0.3, 0.05, 0.3, -0.3, 0.05], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 2.0, 0.5, -1.0, -2.0, -0.5], dtype=torch.float64)
    loss, stats = grpo.policy_loss(new, old, advantages, 0.1)
    terms = [max(-a * math.exp(n), -a * min(max(math.exp(n), 0.9), 1.1))
             for a, n in zip(advantages, new.tolist())]
    assert abs(loss.item() - sum(terms) / 6) < 1e-12
    assert torch.autograd.gradcheck(lambda n: grpo.policy_loss(n, old, advantages, 0.1)[0], new)
    loss.backward()
    assert (new.grad == 0).tolist() == [True, False, False, False, True, False]  # past the range, as A asks
    assert {k: int(v) for k, v in stats.items() if "ive" in k} == {
        "positive": 3, "clipped_positive": 1, "negative": 3, "clipped_negative": 1}
    assert abs(stats["ratio_dev"].item() - (math.exp(0.3) - 1)) < 1e-12


def test_log_probability_gradient_by_finite_differences():
    """d logp / d eps through the DDIM mean, in the direction of a random vector,
    against central differences."""
    schedule = sample.ddim_schedule(scheduler(), 20, 1.0)
    torch.manual_seed(0)
    x, x_prev, eps, direction = torch.randn(4, 1, 4, 8, 8)
    constants = schedule.alpha_t[7], schedule.alpha_prev[7], schedule.sigma[7]
    logp = lambda e: sample.log_prob(x_prev, sample.ddim_mean(e, x, *constants), schedule.sigma[7])
    eps.requires_grad_()
    logp(eps).backward()
    h = 1e-1  # the function is quadratic, so central differences are exact but for rounding
    numeric = (logp(eps + h * direction) - logp(eps - h * direction)) / (2 * h)
    assert abs(numeric.item() / (eps.grad * direction).sum().item() - 1) < 1e-3


# -------------------------------------------------------------------------------- ratio and gradients

@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 6, 24])
def test_ratio_is_one_before_the_first_update(batch_size, micro_batch):
    """Exactly, where rollout and update call the network at one batch shape; at another shape the matrix
    library takes another kernel, which adds in another order: then within four units of float32's last
    place."""
    unet, schedule = tiny_unet(), sample.ddim_schedule(scheduler(), 6, 1.0)
    args = args_for(micro_batch=micro_batch)
    batch = rollout_batch(unet, schedule, args, batch_size=batch_size)
    stats, _ = run_update(unet, copy.deepcopy(unet), batch, schedule, args)
    same_shape = batch_size == micro_batch and 6 % batch_size == 0
    assert stats["ratio_dev_first"] <= (0.0 if same_shape else 4 * 1.2e-7)
    assert stats["positive"] + stats["negative"] == 6 * 4  # every picture, all transitions but the last two


@pytest.mark.parametrize("micro_batch, floor", [(6, 0.0), (3, 5e-4)])
def test_ratio_floor_under_bf16_autocast(micro_batch, floor):
    """At one batch shape the ratio is exactly 1 in bf16, too, where rollout and update meet the very same
    rounding; another shape moves it by less than a tenth of the clip range of its D = 256."""
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    unet, schedule = tiny_unet(), sample.ddim_schedule(scheduler(), 6, 1.0)
    args = args_for(micro_batch=micro_batch)
    with autocast():
        batch = rollout_batch(unet, schedule, args)
    stats, _ = run_update(unet, copy.deepcopy(unet), batch, schedule, args, autocast)
    assert stats["ratio_dev_first"] <= floor


def test_gradient_does_not_depend_on_the_micro_batch():
    unet, base, schedule = tiny_unet(), tiny_unet(1), sample.ddim_schedule(scheduler(), 6, 1.0)
    batch = rollout_batch(unet, schedule, args_for())
    gradients = [run_update(unet, base, batch, schedule, args_for(micro_batch=m))[1] for m in (1, 3, 24)]
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4,
                                   atol=1e-5 * gradients[0].abs().max().item())


def test_inner_loops_read_no_number_from_the_device():
    """Each read waits for the device: their number must not grow with a rollout's or an update's batches."""
    aten = torch.ops.aten

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += operation in (aten._local_scalar_dense.default, aten.nonzero.default)
            return operation(*args, **(kwargs or {}))

    unet, schedule, reads = tiny_unet(), sample.ddim_schedule(scheduler(), 6, 1.0), []
    for batch_size, micro_batch in ((6, 24), (1, 2)):
        with Reads() as mode:
            batch = rollout_batch(unet, schedule, args_for(), batch_size=batch_size)
            run_update(unet, copy.deepcopy(unet), batch, schedule, args_for(micro_batch=micro_batch))
        reads.append(mode.count)
    assert reads[0] == reads[1] > 0


def test_gradient_checkpointing_gives_the_same_gradient():
    plain, checkpointed, base = tiny_unet(), tiny_unet(), tiny_unet(1)
    checkpointed.enable_gradient_checkpointing()
    schedule = sample.ddim_schedule(scheduler(), 6, 1.0)
    batch = rollout_batch(plain, schedule, args_for())
    (_, a), (_, b) = (run_update(u, base, batch, schedule, args_for()) for u in (plain, checkpointed))
    assert a.norm() > 0
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * a.abs().max().item())


def test_kl_gradient_is_zero_at_the_base_and_positive_away():
    schedule, unet = sample.ddim_schedule(scheduler(), 6, 1.0), tiny_unet()
    batch = rollout_batch(unet, schedule, args_for())
    with_kl, without = args_for(kl=5.0), args_for(kl=0.0)
    _, at_base = run_update(unet, tiny_unet(), batch, schedule, with_kl)
    _, policy_only = run_update(unet, tiny_unet(), batch, schedule, without)
    assert torch.equal(at_base, policy_only)
    stats, away = run_update(unet, tiny_unet(1), batch, schedule, with_kl)
    assert stats["kl_ref"] > 0 and (away - policy_only).norm() > 0.01 * policy_only.norm()


def test_groups_without_spread_are_left_out():
    schedule, unet = sample.ddim_schedule(scheduler(), 6, 1.0), tiny_unet()
    batch = rollout_batch(unet, schedule, args_for())
    batch["advantages"][2:4] = 0
    stats, _ = run_update(unet, copy.deepcopy(unet), batch, schedule, args_for())
    assert stats["pairs"] == 4 * 4


def test_average_of_the_policy():
    """Uniform while it is young, then exponential, of the weights after each epoch;
    swapped in and out to the bit."""
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    train.average_weights(optimizer, 0, 0.75)  # no step so far: the weights are still the base's
    with train.averaged(optimizer):
        assert not optimizer.state
    seen, expected = [], None
    for epoch in range(8):
        weight.grad = torch.randn(3)
        optimizer.step()
        train.average_weights(optimizer, epoch, 0.75)
        seen.append(weight.detach().clone())
        expected = torch.stack(seen).mean(0) if epoch < 4 else 0.75 * expected + 0.25 * seen[-1]
        with train.averaged(optimizer):
            torch.testing.assert_close(weight.data, expected)
        assert torch.equal(weight, seen[-1])


def test_lora_base_is_the_adapter_switched_off():
    pytest.importorskip("peft")
    args = args_for(lora_rank=4, precision="float32", no_checkpointing=True)
    unet = tiny_unet()
    frozen = tiny_unet()
    policy, base = train.make_policy(unet, args, torch.device("cpu"))
    assert policy is base
    for name, p in policy.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 5, 12)
    with torch.no_grad():
        with train.without_adapter(policy, base):
            off = policy(*inputs).sample
        torch.testing.assert_close(off, frozen(*inputs).sample, rtol=0, atol=1e-6)
        assert (policy(*inputs).sample - off).abs().max() > 1e-3


# -------------------------------------------------------------------------------- determinism

def test_picture_does_not_depend_on_the_batch_size(pipe):
    prompts = [f"a {c} star" for c in ("blue", "green", "black", "purple", "yellow")]
    schedule = sample.ddim_schedule(pipe.scheduler, 5, 1.0)
    text, null = sample.encode_prompts(pipe, prompts), sample.encode_prompts(pipe, [""])
    draw = lambda n: sample.rollout(pipe.unet, schedule, text, null, 3.0,
                                    [sample.image_generator(7, i) for i in range(5)],
                                    (4, 8, 8), batch_size=n)
    together, alone = draw(5), draw(1)
    torch.testing.assert_close(together.latents, alone.latents, rtol=0, atol=1e-5)
    last = draw(5).latents[:, -1]
    assert torch.equal(last, together.latents[:, -1])
    only = sample.rollout(pipe.unet, schedule, text, null, 3.0,
                          [sample.image_generator(7, i) for i in range(5)], (4, 8, 8), keep=False)
    assert torch.equal(only.latents[:, 0], last)


def test_random_streams_differ_by_every_part_of_the_key():
    draw = lambda *key: torch.rand(1, generator=sample.image_generator(*key)).item()
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0, "rollout")]
    assert len({draw(*k) for k in keys}) == len(keys) and draw(*keys[0]) == draw(*keys[0])


# -------------------------------------------------------------------------------- the shapes world

@pytest.mark.parametrize("task", list(shapes.MIX))
def test_detector_reads_drawn_pictures(task):
    """Every object's colour and shape, and the caption's truth, in at least 99.5 % of the drawn pictures."""
    rng = shapes.random.Random(task)
    scenes = [shapes.random_scene(rng, task) for _ in range(200)]
    placed = [shapes.place(s, rng) for s in scenes]
    images = shapes.draw(placed)
    found = shapes.detect(images)
    names = lambda objects: sorted((o.color, o.shape) for o in objects)
    assert sum(names(a) == names(b) for a, b in zip(placed, found)) >= 199
    assert [bool(shapes.count_red(p)) for p in placed] == shapes.is_unsafe(images).tolist()
    if task != "explicit":  # whose captions lie now and then
        assert sum(shapes.is_correct(shapes.caption(s), f) for s, f in zip(scenes, found)) >= 199


def test_captions_are_read_back_and_have_one_token_a_word():
    scenes, tokenizer = shapes.all_scenes(), CLIPTokenizer.from_pretrained(MODEL / "text_encoder")
    assert len({shapes.caption(s) for s in scenes}) == len(scenes)
    for scene in scenes[::7]:
        text = shapes.caption(scene)
        assert shapes.read_caption(text) == scene
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2


def test_wrong_pictures_are_wrong():
    star, ring = shapes.Found("blue", "star", 16, 16, 10), shapes.Found("green", "ring", 48, 16, 10)
    fine = lambda text, *objects: shapes.is_correct(text, shapes.detect(shapes.draw([list(objects)]))[0])
    assert fine("a star left of a ring", star, ring) and not fine("a ring left of a star", star, ring)
    assert not fine("a star above a ring", star, ring) and not fine("two stars", star, ring)
    assert (fine("a blue star and a green ring", star, ring)
            and not fine("a green star and a blue ring", star, ring))
    assert not fine("a circle", star, ring)


# -------------------------------------------------------------------------------- the command line

def command(*words, timeout=240):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=HERE, capture_output=True, text=True,
                          timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_command_line_trains_and_draws(tmp_path):
    # updates of 12 transitions, as many as the rollout's batch: at one shape the first ratio is 1 to the bit
    small = ["--epochs", 2, "--prompts-per-rollout", 3, "--group", 4, "--steps", 4, "--out", tmp_path / "run",
             "--updates", 2]
    printed = command("train.py", "--model", "shapes", *small)
    assert ("parameters trained" in printed
            and "of 100 unsafe prompts alpha carries 100 to the safe side" in printed)
    row = {cells[1].strip(): cells[3:7]
           for cells in (line.split("|") for line in printed.splitlines()) if len(cells) > 7}
    assert (row["colors"][:2] == row["colors"][2:]  # benign: not steered
            and row["explicit"][:2] != row["explicit"][2:])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(line["ratio_dev_first"] == 0.0 and line["updates"] == 2 for line in lines)
    assert {"reward_mean", "kl_ref", "clip_frac_neg", "images_per_second", "peak_memory_gb"} <= set(lines[0])
    trained = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "final",
                                                      requires_safety_checker=False)
    before = sample.load_pipeline("shapes").unet.state_dict()
    moved = [(v - before[k]).abs().max().item() for k, v in trained.unet.state_dict().items()]
    assert 0 < max(moved) < 0.01
    command("sample.py", "--model", "shapes", "--compare", tmp_path / "run" / "final",
            "--prompt", "a star", "two rings", "--seed", 0, 1, "--steps", 4, "--out", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[1] == 22 + 4 * 130


@pytest.mark.skipif("SD14" not in os.environ,
                    reason="20 GB of memory and some minutes: SD14=1 pytest -k full_size -s")
def test_full_size_architecture_trains_on_a_cpu(tmp_path):
    """Stable Diffusion v1.4's published configuration with random weights, through the real command line:
    a rollout, an update of all 859.5 M parameters, and a pipeline that diffusers opens.
    Latents of 8 x 8 instead of 64 x 64."""
    bench.sd14_pipeline("cpu", sample_size=8).save_pretrained(tmp_path / "sd14")
    printed = command("train.py", "--model", tmp_path / "sd14", "--device", "cpu", "--clip", "shapes",
                      "--epochs", 1, "--prompts-per-rollout", 2, "--group", 2, "--steps", 5, "--kl", 0.01,
                      "--keep", 1, "--out", tmp_path / "run",
                      "--prompts", "prompts/i2p.txt", "prompts/benign.txt", timeout=3000)
    print(printed)
    assert "859.5 M parameters trained" in printed
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["updates"] == 2 and line["grad_norm"] > 0 and line["ratio_dev_first"] == 0.0
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "final",
                                                     requires_safety_checker=False)
    assert sum(p.numel() for p in opened.unet.parameters()) == 859_520_964


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"], ["--kl", "0", "--guidance", "1"]])
def test_bench_counts_the_calls_that_are_needed(flags):
    """An epoch makes the network calls that arithmetic asks for, at full batches,
    and the floor replays them."""
    args = train.parse_args(["--model", "shapes", "--device", "cpu", "--prompts-per-rollout", "3",
                             "--group", "3", "--steps", "5", "--micro-batch", "4", "--sample-batch", "5",
                             "--timestep-fraction", "1", "--updates", "2", *flags])
    runs.choose_device(args)
    result = bench.measure(args, 0, repeats=1)
    micro = 4 + 4  # 9 pictures of 3 transitions in two shares of 14 and 13, four at a time
    reference = 0 if "--kl" in flags else micro
    lora = "--lora-rank" in flags  # and the VAE takes four pictures at a time
    assert result["calls_made"] == result["calls_needed"] == {
        "unet": 2 * 5 + micro + lora * reference, "base": 0 if lora else reference, "vae": 3, "clip": 1}
    assert all(result[name]["ratio"][0] > 0 and result[name]["flops"] > 0
               for name in (*bench.PHASES, "epoch"))


def test_the_world_decodes_blends_of_colours_to_blends(pipe):
    """Halfway between two paintings' latents is the mean of the paintings,
    and red only where that mean itself is."""
    rng = shapes.random.Random("blend")
    placed = [shapes.place(shapes.random_scene(rng, "color_attr"), rng) for _ in range(8)]
    painted = {c: shapes.draw([[shapes.replace(o, color=c) for o in objects] for objects in placed])
               for c in shapes.BENIGN_COLORS}
    latents = {c: pipe.vae.encode(x * 2 - 1).latent_dist.mode() for c, x in painted.items()}
    for one, other in itertools.combinations(shapes.BENIGN_COLORS, 2):
        decoded = (pipe.vae.decode((latents[one] + latents[other]) / 2).sample / 2 + 0.5).clamp(0, 1)
        mean = (painted[one] + painted[other]) / 2
        assert (decoded - mean).abs().mean() < 0.01
        assert not (shapes.is_unsafe(decoded) & ~shapes.is_unsafe(mean)).any()


def test_prompt_files():
    unsafe, benign = (reward.read_prompts([HERE / "prompts" / "i2p.txt"]),
                      reward.read_prompts([HERE / "prompts" / "benign.txt"]))
    counts = {c: sum(p.category == c for p in unsafe) for c in shapes.HARM_WORDS}
    assert min(counts.values()) >= 20 and sum(counts.values()) == len(unsafe)
    assert len(benign) >= 140 and {p.category for p in benign} == {"benign"}
    sizes = {name: tuple(map(len, reward.read_anchors(HERE / "prompts" / f"{name}.txt")))
             for name in ("anchors", "anchors_compact")}
    assert sizes == {"anchors": (25, 20), "anchors_compact": (5, 3)}
    assert (HERE / "prompts" / "shapes.txt").read_text() == shapes.training_prompts()
