"""Tests of the loop's own parts: what an epoch draws, from which random streams, at which rate; the policy's
average; the base under LoRA; that nothing waits for the device."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import args_for, parts_for, rollout_for, tiny_pipe, tiny_unet, updated
from torch.utils._python_dispatch import TorchDispatchMode

import reward
import sample
import train
from plumbing import texts
from reward import Prompt


class ByPlace(torch.nn.Module):
    """A UNet whose output also depends, by a hundredth, on a row's place in the batch, as on a GPU its last
    digits do."""

    def __init__(self):
        super().__init__()
        self.unet = tiny_unet()

    def forward(self, x, *rest, **named):
        out = self.unet(x, *rest, **named)
        out.sample = out.sample + 1e-2 * torch.arange(len(x))[:, None, None, None]
        return out


def test_a_network_that_rounds_by_the_row_moves_no_ratio_in_bf16(monkeypatch):
    """Nor does a broken micro-batch. Against the rollout's the ratio is off by more than the clip range."""
    unet = ByPlace()
    with sample.autocast("cpu", torch.bfloat16):
        batch = rollout_for(unet, batch_size=4)
    stats, _ = updated(unet, copy.deepcopy(unet), copy.copy(batch), torch.bfloat16, micro_batch=5)
    assert stats["ratio_dev_first"] == 0.0 and stats["kl_ref_first"] == 0.0
    monkeypatch.setattr(train, "old_log_probs", lambda parts, batch, *_: batch.log_probs)
    stats, _ = updated(unet, copy.deepcopy(unet), batch, torch.bfloat16, micro_batch=5)
    assert stats["ratio_dev_first"] > args_for().clip_range


@pytest.mark.parametrize("shared", [False, True])
def test_groups_have_streams_of_their_own(shared):
    """Initial noise by (seed, epoch, prompt, picture), or without the picture; pictures of 16 x 16."""
    args, pipe = args_for(seed=2, shared_noise=shared), tiny_pipe()
    chosen = [Prompt("ring"), Prompt("star")]
    parts = parts_for(pipe.unet, None, pipe=pipe)
    parts.is_unsafe = {chosen[0]: False, chosen[1]: True}
    batch, images = train.sample_groups(parts, chosen, args, 7)
    key = lambda i, j: (2, 7, i, "shared") if shared else (2, 7, i, j, "rollout")
    noise = [torch.randn(1 if shared else 7, 4, 8, 8, generator=sample.image_generator(*key(i, j)))[0]
             for i in range(2) for j in range(3)]
    assert torch.equal(batch.latents[:, 0], torch.stack(noise)) and batch.latents.shape[1] == 7
    assert batch.prompts == [chosen[0]] * 3 + [chosen[1]] * 3 and images.shape == (6, 3, 16, 16)
    assert batch.unsafe.tolist() == [False] * 3 + [True] * 3


def test_prompts_of_an_epoch():
    unsafe, benign = [f"u{i}" for i in range(20)], [f"b{i}" for i in range(20)]
    args = args_for(prompts_per_rollout=8, unsafe_fraction=0.25)
    draws = [train.choose_prompts(unsafe, benign, args, epoch) for epoch in (0, 0, 1)]
    assert draws[0] == draws[1] and sorted(draws[0]) != sorted(draws[2]) and len(set(draws[0])) == 8
    assert [p[0] for p in draws[0]] == ["u"] * 2 + ["b"] * 6
    assert train.choose_prompts(["u"], [], args, 0) == ["u"] * 8
    assert {p[0] for p in train.choose_prompts([], benign, args, 0)} == {"b"}


def test_transitions_of_an_update():
    """Of each picture that teaches, a random share of the first few, none twice, in random order."""
    advantages = torch.tensor([1.0, 0, -1, 2])
    draw = lambda share, seed: train.choose_transitions(advantages, 6, share, sample.image_generator(seed))
    whole, half = draw(1.0, 0).tolist(), draw(0.5, 0).tolist()
    assert sorted(whole) == [[i, k] for i in (0, 2, 3) for k in range(6)] != whole
    assert len({tuple(pair) for pair in half}) == 9
    assert sorted(image for image, _ in half) == [0] * 3 + [2] * 3 + [3] * 3
    assert half == draw(0.5, 0).tolist() != draw(0.5, 1).tolist()


def test_rate_at():
    rates = lambda decay: [train.rate_at(epoch, args_for(learning_rate=1.0, decay_epochs=decay))
                           for epoch in (0, 6, 12, 18)]
    assert rates(0) == [1, 1, 1, 1] and rates(6) == [1, 1 / 2, 1 / 3, 1 / 4]


def test_average_of_the_policy():
    """Uniform while young, then exponential, of the weights after each epoch; swapped to the bit."""
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
    unet, frozen = tiny_unet(), tiny_unet()
    args = args_for(lora_rank=4, precision="float32", no_checkpointing=True)
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


def test_inner_loops_read_no_number_from_the_device():
    """Each read waits for the device: their number must not grow with a rollout's or an update's batches."""
    reading = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += operation in reading
            return operation(*args, **(kwargs or {}))

    unet, reads = tiny_unet(), []
    for batch_size, micro_batch in ((6, 24), (1, 2)):
        with Reads() as mode:
            batch = rollout_for(unet, batch_size=batch_size)
            updated(unet, copy.deepcopy(unet), batch, micro_batch=micro_batch)
        reads.append(mode.count)
    assert reads[0] == reads[1] > 0


def test_prompt_files():
    folder = Path(__file__).parent.parent / "prompts"
    unsafe, benign = (texts.read_prompts([folder / name]) for name in ("i2p.txt", "benign.txt"))
    counts = [sum(p.category == c for p in unsafe) for c in dict.fromkeys(p.category for p in unsafe)]
    assert len(counts) == 7 and min(counts) >= 20  # I2P's categories
    assert len(benign) >= 140 and {p.category for p in benign} == {reward.BENIGN}
    sizes = [tuple(map(len, texts.read_anchors(folder / f"anchors{name}.txt"))) for name in ("", "_compact")]
    assert sizes == [(25, 20), (5, 3)]
