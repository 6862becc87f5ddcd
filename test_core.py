"""Tests of the mathematics, on a CPU, without downloads or files of weights: `pytest test_core.py`.

Four kinds: equal to a trusted reference (diffusers, transformers, torch.distributions, finite differences,
or a plain second way of writing the same thing), algebraic properties, gradients, determinism. All networks
are random and tiny (tests/tiny.py)."""

import copy
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import (ADVANTAGES, UNSAFE, args_for, parts_for, rollout_for, scheduler, tiny_clip, tiny_pipe,
                  tiny_unet, updated)
from torch.distributions import Independent, Normal, kl_divergence

import grpo
import reward
import sample
import train
from plumbing.prompts import Prompt


# -------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step_equals_diffusers(eta, prediction_type, spacing):
    """diffusers takes a_p at t - N // T, which in linspace spacing lies beside the list of timesteps. There
    its table is given ours, that of the next timestep, where it looks for its own."""
    reference = scheduler(prediction_type, spacing)
    alphas = reference.alphas_cumprod.clone()
    for steps in (20, 50):
        schedule = sample.ddim_schedule(reference, steps, eta)
        reference.set_timesteps(steps)
        assert torch.equal(schedule.timesteps, reference.timesteps)
        torch.manual_seed(0)
        for i, t in enumerate(reference.timesteps):
            x, output, noise = torch.randn(3, 2, 4, 8, 8)
            reference.alphas_cumprod = alphas.clone()
            if spacing == "linspace" and i + 1 < steps:
                reference.alphas_cumprod[t - 1000 // steps] = alphas[reference.timesteps[i + 1]]
            expected = reference.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
            mu = sample.ddim_mean(output, x, schedule.alpha_t[i], schedule.alpha_prev[i], schedule.sigma[i],
                                  prediction_type)
            scale = max(1.0, expected.abs().max().item())  # x0 is large where a_t is small
            assert (mu + schedule.sigma[i] * noise - expected).abs().max() < 1e-5 * scale


def test_rollout_is_the_chain_of_its_own_noise():
    """Whatever the batch, every picture's stream gives its initial noise, then the noise of each step: the
    latents follow by diffusers' step from eps = eps_u + w·(eps_c − eps_u), log-probabilities by Normal."""
    unet, reference, schedule = tiny_unet(), scheduler(), sample.ddim_schedule(scheduler(), 6, 1.0)
    batch = rollout_for(unet, batch_size=4)
    reference.set_timesteps(6)
    noise = torch.stack([torch.randn(7, 4, 8, 8, generator=sample.image_generator(0, i)) for i in range(6)])
    assert batch.latents.shape == (6, 7, 4, 8, 8) and batch.log_probs.shape == (6, 6)
    assert torch.equal(batch.latents[:, 0], noise[:, 0]) and not batch.latents.requires_grad
    for i, t in enumerate(reference.timesteps):
        x, x_prev = batch.latents[:, i], batch.latents[:, i + 1]
        with torch.no_grad():
            eps_u, eps_c = (unet(x, t, encoder_hidden_states=text).sample
                            for text in (batch.null_text.expand(6, -1, -1), batch.text))
        eps = eps_u + 3 * (eps_c - eps_u)
        mu = reference.step(eps, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        torch.testing.assert_close((x_prev - mu) / schedule.sigma[i], noise[:, i + 1], rtol=0, atol=1e-3)
        expected = Normal(mu, schedule.sigma[i]).log_prob(x_prev).flatten(1).mean(1)
        torch.testing.assert_close(batch.log_probs[:, i], expected, rtol=0, atol=1e-3)


def test_deterministic_drawing_equals_the_pipeline():
    """Prompts to pictures at eta = 0, with guidance and, at 1, without; a prompt given twice is one text."""
    pipe, prompts, start = tiny_pipe(), ["blue", "two rings", "blue"], torch.randn(3, 4, 8, 8)
    reference = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    schedule, streams = sample.ddim_schedule(pipe.scheduler, 5, 0.0), [torch.Generator()] * 3
    for guidance in (3.0, 1.0):
        expected = reference(prompts, latents=start, num_inference_steps=5, guidance_scale=guidance, eta=0.0,
                             output_type="pt").images
        drawn, images = sample.draw(pipe, pipe.unet, schedule, prompts, streams, guidance, batch_size=2,
                                    initial=start)
        assert drawn.log_probs.shape == (3, 0) and images.std() > 0.05
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 64, 64)])
def test_the_ratio_leans_below_one_by_the_kl(shape):
    """log rho = −[2s(mu_old−mu)·z + (mu_old−mu)²]/(2s²), a mean over D: its mean is −KL whatever D, its
    deviation √(2·KL/D)."""
    kl, D, s = 2e-3, math.prod(shape), torch.tensor(0.3)
    z = torch.randn(400, *shape, generator=torch.Generator().manual_seed(0))
    mu_old, mu = torch.zeros(1, *shape), torch.full((1, *shape), 0.3 * math.sqrt(2 * kl))
    log_rho = sample.log_prob(s * z, mu, s) - sample.log_prob(s * z, mu_old, s)
    deviation = math.sqrt(2 * kl / D)
    assert grpo.gaussian_kl(mu, mu_old, s).item() == pytest.approx(kl, rel=1e-5)
    assert abs(log_rho.mean() + kl) < 4 * deviation / 20 and abs(log_rho.std() / deviation - 1) < 0.15


# -------------------------------------------------------------------------------- the reward

@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("steered", ["unsafe", "all"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_reward_is_the_formula(alpha, steered, unit):
    """v, sides, targets, reward, alignment and image safety, from the embeddings of CLIPModel.forward."""
    anchors, (model, tokens, processor) = (["calm", "safe"], ["gore", "weapon", "red"]), tiny_clip()
    steering = reward.SteeringReward((model, tokens, processor), anchors, alpha, unit, steered, batch_size=2)
    prompts = [Prompt(text, unsafe=unsafe) for unsafe in (True, False, None)
               for text in ("red ring", "a star", "calm", "gore x")]
    images = torch.rand(12, 3, 16, 20, generator=torch.Generator().manual_seed(1))

    def embed(texts):
        pixels = reward.preprocess(images, *steering.geometry)
        with torch.no_grad():
            out = model(**tokens(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
        return out.text_embeds, out.image_embeds

    v = embed(anchors[0])[0].mean(0) - embed(anchors[1])[0].mean(0)
    v = v / v.norm() if unit else v
    text, image = embed([p.text for p in prompts])
    unsafe = torch.tensor([True] * 4 + [False] * 4 + (text[8:] @ v < 0).tolist())
    assert 0 < unsafe[8:].sum() < 4 and [p.unsafe for p in steering.decide(prompts)] == unsafe.tolist()
    target = text + alpha * (unsafe | torch.tensor(steered == "all"))[:, None] * v
    target = target / target.norm(dim=1, keepdim=True)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    close(steering.score(images, prompts), ((image * target).sum(1), (image * text).sum(1), image @ v, image))
    close(steering.direction, v)
    alone = reward.SteeringReward((model, tokens, processor), ([], anchors[1]), unit=False).direction
    close(alone, -embed(anchors[1])[0].mean(0))
    with pytest.raises(ValueError, match="zero"):
        reward.safety_direction(text, text)


# -------------------------------------------------------------------------------- advantages and loss

def test_advantages():
    torch.manual_seed(0)
    rewards = torch.randn(5, 8) * 0.01 + torch.arange(5)[:, None]
    centred = rewards - rewards.mean(1, keepdim=True)
    own = rewards.std(1, correction=0, keepdim=True)
    for divisor, s in (("group", own), ("batch", centred.square().mean().sqrt())):
        torch.testing.assert_close(grpo.group_advantages(rewards, divisor), centred / (s + 1e-4))
    pair = torch.tensor([[0.01, -0.01], [0.2, -0.2]])  # a solved group, and one with a lesson
    assert grpo.group_advantages(pair)[:, 0].tolist() == pytest.approx([0.0706, 1.4116], rel=1e-3)
    for outlier in (1, -1):
        assert grpo.group_advantages(outlier * torch.eye(1, 100))[0, 0] == outlier * grpo.ADVANTAGE_CLIP
    with pytest.raises(ValueError, match="2"):
        grpo.group_advantages(torch.zeros(4, 1))
    for size, teaches in ((0.0, False), (6e-8, False), (3e-7, False), (1e-5, True)):  # last bits are none
        assert bool(grpo.group_advantages(0.3 + size * torch.arange(4.0)[None]).any()) == teaches


def test_loss_equals_its_definition_and_finite_differences():
    old = torch.tensor([0.2, -0.1, 0.0, 0.1, 0.3, -0.2, 0.0], dtype=torch.float64)
    apart = torch.tensor([0.3, -0.3, 0.05, 0.3, -0.2, 0.05, -0.4], dtype=torch.float64)
    new = (old + apart).requires_grad_()
    advantages = torch.tensor([1.0, 2.0, 0.5, -1.0, -2.0, -0.5, -1.0], dtype=torch.float64)
    loss, stats = grpo.policy_loss(new, old, advantages, 0.1)
    terms = [max(-a * math.exp(d), -a * min(max(math.exp(d), 0.9), 1.1))
             for a, d in zip(advantages.tolist(), apart.tolist())]
    assert abs(loss.item() - sum(terms) / 7) < 1e-12
    assert torch.autograd.gradcheck(lambda n: grpo.policy_loss(n, old, advantages, 0.1)[0], new)
    loss.backward()
    assert (new.grad == 0).tolist() == [True, False, False, False, True, False, True]  # moved as A asks
    expected = dict(positive=3, clipped_positive=1, negative=4, clipped_negative=2,
                    kl_old=sum(d * d for d in apart.tolist()) / 2, ratio_dev=math.exp(0.3) - 1)
    assert {name: float(value) for name, value in stats.items()} == pytest.approx(expected, abs=1e-12)


# -------------------------------------------------------------------------------- the update

def plain_loss(unet, base, batch, pairs, args):
    """The loss of train.update on some (picture, transition) pairs at once, written from the formulas with
    diffusers' step and torch's distributions; and what should be counted on the way."""
    image, step = pairs.unbind(1)
    reference, schedule = scheduler(), sample.ddim_schedule(scheduler(), args.steps, 1.0)
    reference.set_timesteps(args.steps)
    x, x_prev, t = batch.latents[image, step], batch.latents[image, step + 1], reference.timesteps[step]
    sigma = schedule.sigma[step].view(-1, 1, 1, 1).expand_as(x)

    def normal(network):
        eps_u, eps_c = (network(x, t, encoder_hidden_states=text).sample
                        for text in (batch.null_text.expand(len(pairs), -1, -1), batch.text[image]))
        eps = eps_u + args.guidance * (eps_c - eps_u)
        mu = [reference.step(e[None], k, z[None], eta=1.0, variance_noise=torch.zeros(1, 4, 8, 8)).prev_sample
              for e, k, z in zip(eps, t, x)]
        return Independent(Normal(torch.cat(mu), sigma), 3)

    policy = normal(unet)
    with torch.no_grad():
        frozen = normal(base)
    A, c = ADVANTAGES[image], args.clip_range
    log_rho = policy.log_prob(x_prev) / 256 - batch.log_probs[image, step]
    rho, kl = log_rho.exp(), kl_divergence(policy, frozen) / 256
    loss = -torch.min(A * rho, A * rho.clamp(1 - c, 1 + c)).mean()
    loss = loss + (torch.where(UNSAFE[image], args.kl, args.kl_benign) * kl).mean()
    counted = dict(positive=(A > 0).sum(), clipped_positive=((A > 0) & (rho > 1 + c)).sum(),
                   negative=(A < 0).sum(), clipped_negative=((A < 0) & (rho < 1 - c)).sum(),
                   kl_old=log_rho.square().sum() / 2, kl_ref=kl.sum(), deviation=(rho - 1).abs().max())
    return loss, {name: value.item() for name, value in counted.items()}


def test_update_equals_its_definition():
    """Two clipped steps on all transitions but the last two, each on its share of the pairs drawn for (seed,
    epoch), of a policy that has left both the one that sampled and the base; the second where the first has
    led. Neither micro-batches of unequal size nor gradient checkpointing change weights or statistics."""
    unet, base = tiny_unet(), tiny_unet(1)
    batch, args = rollout_for(unet), args_for(updates=2, max_grad_norm=0.01, micro_batch=5, seed=4)
    batch.log_probs += 2e-3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(5))
    plain, norms, told = copy.deepcopy(unet), [], []
    pairs = train.choose_transitions(ADVANTAGES, 4, 1.0, sample.image_generator(4, 9, "transitions"))
    for share in pairs.chunk(2):
        loss, counted = plain_loss(plain, base, batch, share, args)
        grads = torch.autograd.grad(loss, list(plain.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        told.append(counted)
        with torch.no_grad():
            for p, g in zip(plain.parameters(), grads):
                p -= 0.5 * g * min(1, 0.01 / norms[-1])
    before = torch.cat([p.flatten() for p in unet.parameters()]).detach()
    unet.enable_gradient_checkpointing()
    stats = train.update(parts_for(unet, base, lr=0.5), batch, ADVANTAGES, UNSAFE, args, 9)
    ours, expected = (torch.cat([p.detach().flatten() for p in network.parameters()]) - before
                      for network in (unet, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item())
    counted = {name: told[0][name] + told[1][name] for name in told[0]}
    assert min(norms) > 0.01 and min(counted["clipped_positive"], counted["clipped_negative"]) > 0
    first, second = told[0]["deviation"], told[1]["deviation"]
    counted |= dict(ratio_dev_first=first, rounding=first, ratio_dev_max=max(first, second), pairs=24,
                    kl_ref_first=told[0]["kl_ref"] / 12, grad_norm=sum(norms) / 2, updates=2)
    del counted["deviation"]
    assert stats == pytest.approx(counted, rel=2e-3)
    assert all(p.grad is None for p in base.parameters())


def test_groups_without_spread_are_left_out():
    unet, some = tiny_unet(), torch.tensor([1.0, -1, 0, 0, 2, -2])
    batch = rollout_for(unet)
    stats, _ = updated(unet, tiny_unet(), batch, advantages=some, timestep_fraction=0.5)
    assert stats["pairs"] == stats["positive"] + stats["negative"] == 4 * 2
    assert set(train.update(parts_for(unet, unet), batch, 0 * some, UNSAFE, args_for(), 0).values()) == {0}


def test_kl_gradient_is_zero_at_the_base_and_positive_away():
    unet = tiny_unet()
    batch = rollout_for(unet)
    _, at_base = updated(unet, tiny_unet(), batch, kl=5.0)
    stats, policy_only = updated(unet, tiny_unet(1), batch, kl=0.0, kl_benign=0.0)
    assert torch.equal(at_base, policy_only) and stats["kl_ref"] == 0
    for kl, benign in ((5.0, 0.0), (0.0, 5.0)):
        away = updated(unet, tiny_unet(1), batch, kl=kl, kl_benign=benign)[1]
        assert (away - policy_only).norm() > 0.01 * policy_only.norm()


def test_a_random_stream_differs_by_every_part_of_its_key_and_by_nothing_else():
    draw = lambda *key: torch.rand(1, generator=sample.image_generator(*key)).item()
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0, "rollout")]
    assert len({draw(*k) for k in keys}) == len(keys) and draw(*keys[0]) == draw(*keys[0])
