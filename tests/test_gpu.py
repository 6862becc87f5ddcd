"""What a GPU needs, as far as a CPU can show it: bf16 beside its base, weights that are kept, and work that
grows no faster than a user's files."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import reward
import sample
import train
from plumbing import checks, log, models
from shapes import WEIGHTS
from shapes.train import FLAGS

SMALL = [*FLAGS, "--device", "cpu", "--prompts-per-rollout", "2", "--group", "2", "--steps", "4",
         "--updates", "2", "--micro-batch", "4", "--sample-batch", "4"]


def set_up(*flags, perturbed=False):
    """The flags and the parts of a small run; the UNet's norms moved away from what bf16 holds exactly."""
    args = train.parse_args([*SMALL, *flags])
    checks.choose_device(args)
    pipe = models.load_pipeline(args.model)
    if perturbed:
        torch.manual_seed(1)
        for module in pipe.unet.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                module.weight.data += 0.2 * torch.randn_like(module.weight)
                module.bias.data += 0.1 * torch.randn_like(module.bias)
    return args, train.set_up(args, *checks.read_inputs(args), pipe=pipe)


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]])
def test_the_kl_to_the_base_starts_at_exactly_zero_in_bf16(lora):
    if lora:
        pytest.importorskip("peft")
    args, parts = set_up("--precision", "bf16", *lora, perturbed=True)
    batch, _ = train.sample_groups(parts, train.choose_prompts(parts.unsafe, parts.benign, args, 0), args, 0)
    batch.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    stats = train.update(parts, batch, args, 0)
    assert stats["kl_ref_first"] == 0.0 and stats["ratio_dev_first"] == 0.0
    assert stats["kl_ref"] > 0 and stats["updates"] == 2  # after the first of two steps the policy has moved
    again = train.update(parts, batch, args, 1)
    assert again["kl_ref_first"] > 0


def test_only_what_autocast_casts_is_kept_in_the_compute_type():
    """So that a call casts no frozen weight, and gives what it gave before, to the bit."""
    pipe = models.load_pipeline(str(WEIGHTS))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 16, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = pipe.unet(*inputs).sample
        after = models.to_compute_type(pipe.unet, torch.bfloat16)(*inputs).sample
    assert torch.equal(before, after)
    kinds = {type(m).__name__: {p.dtype for p in m.parameters(recurse=False)} for m in pipe.unet.modules()}
    assert kinds["Linear"] == kinds["Conv2d"] == {torch.bfloat16}
    assert kinds["GroupNorm"] == kinds["LayerNorm"] == {torch.float32}
    assert all(p.dtype is torch.float32 for p in pipe.vae.parameters())


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]])
def test_final_is_not_rounded_by_a_run_in_bf16(tmp_path, monkeypatch, lora):
    if lora:
        pytest.importorskip("peft")
    monkeypatch.setattr(train.pictures, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train.pictures, "score_table", lambda *_: ["no table"])
    train.main([*SMALL, "--precision", "bf16", "--epochs", "1", "--out", str(tmp_path), *lora])
    for part in ("vae", "unet"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        final, base = load_file(tmp_path / "final" / name), load_file(WEIGHTS / name)
        assert {t.dtype for t in final.values()} == {torch.float32}
        moved = {key for key in final if not torch.equal(final[key], base[key].float())}
        assert bool(moved) == (part == "unet")
        if part == "unet" and lora:
            assert all("attn" in key for key in moved)


def test_a_rollout_encodes_its_own_prompts_and_no_others(monkeypatch):
    args, parts = set_up()
    encoded = []
    encode = sample.encode_prompts
    monkeypatch.setattr(sample, "encode_prompts",
                        lambda pipe, texts: encoded.extend(texts) or encode(pipe, texts))
    chosen = train.choose_prompts(parts.unsafe, parts.benign, args, 3)
    train.sample_groups(parts, chosen, args, 3)
    assert sorted(encoded) == sorted([*{p.text for p in chosen}, ""])


def test_prompts_without_a_category_are_embedded_once_in_batches(monkeypatch):
    clip = models.load_clip(str(WEIGHTS / "text_encoder"))
    steering = reward.SteeringReward(clip, (["a blue star", "a green ring"], ["a red star", "a red ring"]))
    prompts = [reward.Prompt(f"a {color} star number {i}") for i in range(70) for color in ("red", "blue")]
    sizes, embed = [], steering.embed_text
    monkeypatch.setattr(steering, "embed_text", lambda texts: sizes.append(len(texts)) or embed(texts))
    named = [reward.Prompt("a star", "sexual"), reward.Prompt("a red star", "benign")]
    sides = steering.classify([*named, *prompts])
    assert sizes == [64, 64, 12]
    assert list(sides.values())[:4] == [True, False, True, False]
    assert steering.classify(prompts) == {p: sides[p] for p in prompts} and sizes == [64, 64, 12]


def test_the_plan_looks_at_a_bounded_number_of_prompts(monkeypatch, capsys):
    args, parts = set_up()
    parts.unsafe = parts.unsafe * 30
    seen, embed = [], parts.reward.embed_text
    monkeypatch.setattr(parts.reward, "embed_text", lambda texts: seen.extend(texts) or embed(texts))
    log.print_plan(args, parts, parts.unsafe)
    assert log.PLAN_PROMPTS / 2 < len(seen) <= log.PLAN_PROMPTS and len(set(seen)) >= 25
    assert f"of {len(seen)} unsafe prompts alpha carries" in capsys.readouterr().out


def test_a_line_of_the_log_does_not_read_the_lines_before_it(tmp_path, capsys):
    figures = dict.fromkeys(
        ("reward_mean", "reward_unsafe", "reward_benign", "alignment", "image_safety_unsafe", "clip_frac_pos",
         "clip_frac_neg", "ratio_dev_first", "zero_std_groups", "seconds_sample", "seconds_reward",
         "seconds_update"), 0.0) | {"kl_ref": 1.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(figures | {"epoch": 0}) + "\n")
    metrics = log.Log(path, clip_range=1e-4)
    path.write_text("not a line of the log\n")   # reading it would fail
    metrics.append(figures | {"epoch": 1})
    printed = capsys.readouterr().out
    assert "epoch    1" in printed and "warning" not in printed   # the KL's was given at epoch 0
    metrics.append(figures | {"epoch": 2, "zero_std_groups": 1})
    assert capsys.readouterr().out.count("warning") == 1
    assert len(metrics.recent) == 3 and len(path.read_text().splitlines()) == 3


def test_memory_and_time_are_asked_of_the_runs_own_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: asked.append(device) or 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    second = SimpleNamespace(type="cuda", index=1)
    assert log.peak_memory(second) == 1.0
    log.Clock(second).lap("seconds_sample")
    assert asked == [second, second]
    asked.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert log.peak_memory(torch.device("cpu")) > 0 and not asked
