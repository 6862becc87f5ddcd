"""Tests of the loop's own parts: schedules, what an epoch draws and hands on, average, adapters, bf16."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import (ADVANTAGES, UNSAFE, args_for, parts_for, rollout_for, tiny_clip, tiny_pipe, tiny_unet,
                  updated)
from torch.utils._python_dispatch import TorchDispatchMode

import reward
import sample
import train
from plumbing import models, stop
from plumbing.prompts import Prompt
from views import direction

CPU, BF16 = torch.device("cpu"), torch.bfloat16
INPUTS = torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 5, 12)  # of a tiny UNet
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEADING, ONE = dict(set_alpha_to_one=False, steps_offset=1), dict(set_alpha_to_one=True, steps_offset=1)
LINSPACE, TRAILING = dict(timestep_spacing="linspace"), dict(timestep_spacing="trailing")
V, COSINE = dict(prediction_type="v_prediction"), dict(beta_schedule="squaredcos_cap_v2")
DDIM, DPM = "DDIMScheduler", "DPMSolverMultistepScheduler"


def make_schedule(monkeypatch, tmp_path, name, config, steps=50, skip_last=0, eta=1.0):
    """The schedule that train.py makes of a scheduler_config.json."""
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, **config}))
    monkeypatch.setattr(train, "check_model", lambda *_: models.read_scheduler(file))
    return train.make_schedule(SimpleNamespace(model="m", steps=steps, eta=eta, skip_last=skip_last))


@pytest.mark.parametrize("name, config, still", [  # as public fine-tunes have them
    ("PNDMScheduler", LEADING | dict(skip_prk_steps=True), False), ("PNDMScheduler", ONE, True),
    (DDIM, LEADING | TRAILING | V, False), (DDIM, LINSPACE, True), (DDIM, LEADING | COSINE, False),
    ("DDPMScheduler", dict(steps_offset=1), True), (DPM, LINSPACE | dict(algorithm_type="dpmsolver++"), True),
    ("LCMScheduler", ONE | dict(original_inference_steps=50), True), ("UniPCMultistepScheduler", V, True),
    ("EulerDiscreteScheduler", TRAILING | dict(interpolation_type="linear"), True)])
def test_a_public_schedule_is_trained_where_it_has_noise(name, config, still, tmp_path, monkeypatch):
    """Finite log-probabilities at every step; a last one without noise is refused unless it is left out."""
    if still:
        with pytest.raises(ValueError, match="step 50 of 50 has sigma 0.*give --skip-last 1"):
            make_schedule(monkeypatch, tmp_path, name, BETAS | config)
    schedule = make_schedule(monkeypatch, tmp_path, name, BETAS | config, skip_last=int(still))
    assert (schedule.sigma[:-1] > 0).all() and (schedule.sigma[-1] == 0) == still
    unet = lambda x, *_, **__: SimpleNamespace(sample=0.1 * x)
    drawn = sample.rollout(unet, schedule, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 1.0,
                           [sample.image_generator(0)], (1, 2, 2), names=["picture"])
    assert drawn.log_probs.isfinite().all() and (drawn.log_probs[:, -1] == 0).all() == still


@pytest.mark.parametrize("name, config, flags, said", [
    ("FlowMatchEulerDiscreteScheduler", dict(shift=3.0), {}, "no DDPM's"), ("My", BETAS, {}, "My"),
    ("EDMEulerScheduler", dict(sigma_data=0.5), {}, "no DDPM's that predicts epsilon or v"),
    (DPM, BETAS | dict(use_flow_sigmas=True), {}, "no DDPM's"),
    (DDIM, BETAS | dict(prediction_type="sample"), {}, "no DDPM's"),
    (DDIM, BETAS | TRAILING | COSINE, {}, "timestep_spacing trailing on squaredcos_cap_v2"),
    (DDIM, BETAS | TRAILING | dict(rescale_betas_zero_snr=True), {}, "rescale_betas_zero_snr True"),
    (DDIM, BETAS | dict(beta_end=float("nan")), {}, "scheduler_config.json"),
    (DDIM, BETAS | dict(steps_offset=500), {}, "--steps 50"), (DDIM, BETAS, dict(eta=1.5), "--eta 1.5"),
    (DDIM, BETAS, dict(steps=0), "--steps 0"), (DDIM, BETAS | LEADING, dict(steps=1000), "--steps 1000"),
    (DDIM, BETAS | LINSPACE, dict(steps=1), "step 1 of 1 has sigma 0")])
def test_what_gives_no_schedule_is_refused_in_one_line(name, config, flags, said, tmp_path, monkeypatch):
    with pytest.raises(ValueError) as error:
        make_schedule(monkeypatch, tmp_path, name, config, **flags)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shared", [False, True])
def test_groups_have_streams_of_their_own(shared):
    """Initial noise by (seed, epoch, prompt, picture), or without the picture."""
    args, pipe, chosen = args_for(seed=2, shared_noise=shared), tiny_pipe(), [Prompt("ring"), Prompt("star")]
    prompts, batch, images = train.sample_groups(parts_for(pipe.unet, None, pipe=pipe), chosen, args, 7)
    key = lambda i, j: (2, 7, i, "shared") if shared else (2, 7, i, j, "rollout")
    noise = [torch.randn(1 if shared else 7, 4, 8, 8, generator=sample.image_generator(*key(i, j)))[0]
             for i in range(2) for j in range(3)]
    assert torch.equal(batch.latents[:, 0], torch.stack(noise)) and batch.latents.shape[1] == 7
    assert prompts == [chosen[0]] * 3 + [chosen[1]] * 3 and images.shape == (6, 3, 16, 16)


def test_prompts_of_an_epoch():
    unsafe, benign = ([Prompt(f"{side}{i}", unsafe=side == "u") for i in range(20)] for side in "ub")
    args = args_for(prompts_per_rollout=8, unsafe_fraction=0.25)
    draws = [train.choose_prompts(benign + unsafe, args, epoch) for epoch in (0, 0, 1)]
    assert draws[0] == draws[1] and set(draws[0]) != set(draws[2]) and len(set(draws[0])) == 8
    assert [p.unsafe for p in draws[0]] == [True] * 2 + [False] * 6
    assert train.choose_prompts(unsafe[:1], args, 0) == unsafe[:1] * 8
    assert set(train.choose_prompts(benign, args, 0)) < set(benign)


def test_transitions_of_an_update():
    """Of each picture that teaches a random share of the first few, none twice, in random order."""
    stream, some = sample.image_generator, torch.tensor([1.0, 0, -1, 2])
    draw = lambda fraction, seed, advantages: train.choose_transitions(advantages, 6, fraction, stream(seed))
    whole, half = draw(1.0, 0, some).tolist(), draw(0.5, 0, some).tolist()
    assert sorted(whole) == [[i, k] for i in (0, 2, 3) for k in range(6)] != whole
    assert len(set(map(tuple, half))) == 9 and sorted(i for i, _ in half) == [0] * 3 + [2] * 3 + [3] * 3
    assert half == draw(0.5, 0, some).tolist() != draw(0.5, 1, some).tolist()
    _, step = draw(0.5, 0, torch.ones(600)).unbind(1)
    assert ((step.bincount(minlength=6) - 300).abs() < 60).all()  # each as often, within five deviations


def test_what_has_to_be_known_of_all_prompts_is_computed_in_batches(monkeypatch):
    """Sides of those without a category, once. For the plan some of many are enough."""
    steering = reward.SteeringReward(tiny_clip(), (["calm"], ["gore"]))
    sizes, embed = [], steering.embed_text
    monkeypatch.setattr(steering, "embed_text", lambda texts: sizes.append(len(texts)) or embed(texts))
    prompts = [Prompt(text * n) for n in range(1, 71) for text in ("gore ", "calm ")]
    decided = steering.decide([Prompt("a", "sexual", True), Prompt("b", "benign", False), *prompts])
    assert sizes == [64, 64, 12] and [p.unsafe for p in decided[:2]] == [True, False]
    assert steering.decide(decided) == decided and len(sizes) == 3
    said = direction.carried(steering, [Prompt("gore", unsafe=i % 5 > 0) for i in range(1000)])
    assert direction.PLANNED / 2 < sum(sizes[3:]) <= direction.PLANNED
    assert f"of {sum(sizes[3:])} unsafe prompts alpha carries" in said


def test_an_epoch_hands_on_what_it_measured(monkeypatch):
    """From prompts to figures: the update's advantages and sides, its rate, a judge's view of each side."""
    pipe, phases, handed = tiny_pipe(), [], []
    prompts = [Prompt("gore", "violence", True), Prompt("ring", "benign", False)]
    parts = parts_for(pipe.unet, tiny_unet(1), lr=9.0, pipe=pipe, prompts=prompts,
                      reward=reward.SteeringReward(tiny_clip(), (["calm"], ["gore"])))
    parts.average, before = models.make_average(parts.policy, 0.9), copy.deepcopy(parts.policy)
    args, update = args_for(learning_rate=1e-2, decay_epochs=2, divisor="group"), train.update
    monkeypatch.setattr(train, "update", lambda *words: handed.extend(words) or update(*words))
    judge = lambda images, prompts: {"my_unsafe": images.mean().item(), "my_share": images.std().item()}
    phase = lambda name: phases.append(name) or nullcontext()
    figures, judged = train.one_epoch(parts, args, 4, phase, judge)
    chosen, batch, images = train.sample_groups(parts_for(before, None, pipe=pipe), prompts, args, 4)
    scores = parts.reward(images, chosen).view(2, 3)
    assert phases == ["sample", "reward", "update"] and torch.equal(batch.latents, handed[1].latents)
    torch.testing.assert_close(handed[2].view(2, 3), train.group_advantages(scores, "group"))
    assert handed[3].tolist() == [True] * 3 + [False] * 3
    assert figures["reward_mean"] == scores.mean() and figures["reward_unsafe"] == scores[0].mean()
    assert figures["epoch"] == 4 and figures["lr"] == 1e-2 / 3 and figures["updates"] == 1
    assert judged == {"my_unsafe": images[:3].mean().item(), "my_share": images[3:].std().item()}
    for own, learnt in zip(parts.average.module.parameters(), parts.policy.parameters()):
        assert torch.equal(own, learnt) and learnt.grad is None
    assert not torch.equal(parts.policy.conv_in.weight, before.conv_in.weight)


def test_average_of_the_policy():
    """Uniform while young, then exponential, of the weights after each epoch; what is frozen is shared."""
    policy = torch.nn.Linear(3, 1)
    policy.bias.requires_grad = False
    average, seen, expected = models.make_average(policy, 0.75), [], None
    for epoch in range(8):
        policy.weight.data = torch.randn(1, 3)
        average.update_parameters(policy)
        seen.append(policy.weight.detach().clone())
        expected = torch.stack(seen).mean(0) if epoch < 4 else 0.75 * expected + 0.25 * seen[-1]
        torch.testing.assert_close(average.module.weight.data, expected)
    assert average.module.bias.data_ptr() == policy.bias.data_ptr() and models.make_average(policy, 0) is None


def policy_of(unet, rank, precision="float32"):
    return models.make_policy(unet, args_for(lora_rank=rank, precision=precision, no_checkpointing=True), CPU)


@torch.no_grad()
def test_adapters_are_added_to_the_weights_and_switched_off_for_the_base():
    """A policy draws what a network with the weights W + B·A does, its base what one with W does."""
    policy, base = policy_of(tiny_unet(), 4)
    for name, weight in policy.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    plain, learnt, drawn = tiny_unet(), dict(policy.named_parameters()), policy(*INPUTS).sample
    with models.without_adapter(policy, base):
        torch.testing.assert_close(base(*INPUTS).sample, plain(*INPUTS).sample, rtol=0, atol=1e-6)
    moved = [name.removesuffix(".lora_A.default.weight") for name in learnt if "lora_A" in name]
    for name in moved:
        A, B = (learnt[f"{name}.lora_{side}.default.weight"] for side in "AB")
        plain.get_submodule(name).weight += B @ A
    assert len(moved) == 4 * 2 * 4  # projections, of self- and cross-attention, in four blocks
    scale = drawn.abs().max().item()
    torch.testing.assert_close(plain(*INPUTS).sample, drawn, rtol=0, atol=1e-5 * scale)


def test_a_network_that_rounds_by_the_row_moves_no_ratio_in_bf16(monkeypatch):
    """Its output also depends, by a hundredth, on a row's place in the batch, as on a GPU its last digits do.
    Against the rollout's the ratio is off by more than the clip range, which `rounding` says."""
    unet = tiny_unet()
    unet.register_forward_hook(lambda module, inputs, out: setattr(
        out, "sample", out.sample + 1e-2 * torch.arange(len(out.sample))[:, None, None, None]))
    with sample.autocast("cpu", BF16):
        batch = rollout_for(unet, batch_size=4)
    stats, _ = updated(unet, copy.deepcopy(unet), batch, BF16, micro_batch=5)
    assert stats["ratio_dev_first"] == stats["ratio_dev_max"] == stats["kl_ref_first"] == 0.0
    assert stats["rounding"] > args_for().clip_range and stats["clipped_positive"] == 0
    monkeypatch.setattr(train, "old_log_probs", lambda parts, batch, *_: batch.log_probs)
    stats, _ = updated(unet, copy.deepcopy(unet), batch, BF16, micro_batch=5)
    assert stats["ratio_dev_first"] > args_for().clip_range


@pytest.mark.parametrize("rank", [0, 2])
def test_the_kl_to_the_base_starts_at_exactly_zero_in_bf16(rank):
    """Of norms that bf16 does not hold exactly. What is trained is float32, the base in autocast's types."""
    unet = tiny_unet()
    for module in unet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            for weight in module.parameters():
                weight.data += 0.2 * torch.randn_like(weight)
    policy, base = policy_of(unet, rank, "bf16")
    assert {weight.dtype for weight in models.trained(policy)} == {torch.float32}
    assert (base.conv_in.weight.dtype, base.conv_norm_out.weight.dtype) == (BF16, torch.float32)
    with sample.autocast("cpu", BF16):
        batch = rollout_for(policy)
    parts, args = parts_for(policy, base, lr=1.0, dtype=BF16), args_for(updates=2, micro_batch=12)
    first, second = (train.update(parts, batch, ADVANTAGES, UNSAFE, args, epoch) for epoch in (0, 1))
    assert first["kl_ref_first"] == 0.0 and first["ratio_dev_first"] == 0.0
    assert first["kl_ref"] > 0 and second["kl_ref_first"] > 0  # after the first of two steps it has moved


def test_inner_loops_read_no_number_from_the_device():
    """Each read waits for the device: their number must not grow with a rollout's or an update's batches."""
    reading = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += operation in reading
            return operation(*args, **(kwargs or {}))

    unet, reads = tiny_unet(), []
    for batch_size, micro_batch in ((6, 24), (3, 12)):
        with Reads() as mode:
            updated(unet, tiny_unet(), rollout_for(unet, batch_size=batch_size), micro_batch=micro_batch)
        reads.append(mode.count)
    assert reads[0] == reads[1] > 0


@pytest.mark.parametrize("what, said", [
    ("noise", "the latent is not finite: picture 4$"),
    ("latents", "the loss is not finite: picture 4, transition 3"), ("advantages", "the loss .*; or more"),
    ("text", "the loss is not finite: picture 4, transition .$"),
    ("gradient", "the gradient of conv_in.weight is not finite")])
def test_a_number_that_is_not_finite_is_named_and_not_learnt(what, said):
    unet, advantages, noise = tiny_unet(), ADVANTAGES.clone(), torch.randn(6, 4, 8, 8)
    batch, before = rollout_for(unet), copy.deepcopy(unet.state_dict())
    if what == "gradient":
        unet.conv_in.weight.register_hook(lambda gradient: gradient * torch.inf)
    else:  # of latents what the fourth step has drawn
        dict(noise=noise[4], latents=batch.latents[4, 4], text=batch.text[4], advantages=advantages[4]
             )[what].fill_(torch.nan)
    with pytest.raises(stop.NotFinite, match=said):
        rollout_for(unet, initial=noise)
        train.update(parts_for(unet, tiny_unet(), lr=1.0), batch, advantages, UNSAFE, args_for(), 0)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


@pytest.mark.parametrize("scale, dtype, failed", [
    (1, torch.float32, []), (1, torch.float16, []), (1e6, torch.float32, []), (1e6, torch.float16, [0, 1, 2]),
    (torch.nan, torch.float32, [0, 1, 2]), (0, torch.float32, [0, 2])])
def test_a_picture_that_failed_is_named_and_never_judged(scale, dtype, failed):
    """A decoder that overflows in half precision, is broken, or paints one value. The reward is None here."""
    pipe, latents = tiny_pipe(), torch.randn(3, 4, 8, 8)
    latents[1] = 0.5
    for weight in pipe.vae.decoder.conv_out.parameters():
        weight.data *= scale
    pipe.vae.to(dtype)
    named = f"the picture of c0 and {len(failed) - 1} more failed in {str(dtype).removeprefix('torch.')}: "
    with pytest.raises(stop.NotFinite, match=named) if failed else nullcontext():
        assert sample.decode(pipe.vae, latents, ["c0", "c1", "c2"]).isfinite().all()
    with pytest.raises(stop.NotFinite, match="the picture of c0"):
        sample.decode(pipe.vae, latents.index_fill(0, torch.tensor(0), torch.nan), ["c0", "c1", "c2"])
    if failed:
        parts = parts_for(pipe.unet, None, pipe=pipe, prompts=[Prompt("gore", "violence", True)])
        with pytest.raises(stop.NotFinite, match="the picture of epoch 3, prompt 'gore', image 0 and 3 more"):
            train.one_epoch(parts, args_for(), 3, nullcontext)
