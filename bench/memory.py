"""Memory of a run by counting the tensors of a simulated epoch: no GPU needed, nor the memory itself.

One batch of each phase runs at full size on fake tensors, which have a shape and no data. Added up are the
bytes of all storages that are alive, as torch.cuda.max_memory_allocated does, without the work space of cuDNN
and cuBLAS.

    python -m bench.memory                             # SD v1.4 and ViT-H/14, default flags, as on a GPU
    python -m bench.memory --lora-rank 16 --group 8    # any flags of train.py
"""

import weakref
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import sample
import train
from bench.sd14 import sd14_pipeline, vit_h14
from plumbing import log, stop
from plumbing.models import make_average, make_policy, to_compute_type, trained
from sample import Rollout, Schedule, autocast, latent_shape, predict_noise

CLIP_BATCH = 32  # pictures that SteeringReward gives to CLIP at once


class Alive(TorchDispatchMode):
    """While it is open: `now`, the bytes of all storages that are alive, and `peak`, the most so far."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    @property
    def now(self) -> int:
        return sum(self.sizes.values())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = -(-storage.nbytes() // 512) * 512  # CUDA's allocator rounds up
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out


def as_on_a_gpu():
    """Inside, fake tensors take the memory that they would take on a GPU. They live on the CPU, whose
    autocast leaves group and layer norms in bf16, where CUDA's computes them in float32, and whose attention
    is another one than CUDA's."""
    half = lambda: torch.is_autocast_enabled("cpu")
    wide = lambda x: (x.float() if half() else x).contiguous()  # CUDA's group norm has no channels_last
    group_norm, layer_norm = F.group_norm, F.layer_norm

    def flash(q, k, v, *_, **__):
        q, k, v = (x.bfloat16() if half() else x for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    return mock.patch.multiple(F, scaled_dot_product_attention=flash,
                               group_norm=lambda x, *rest: group_norm(wide(x), *rest),
                               layer_norm=lambda x, *rest: layer_norm(wide(x), *rest))


def count(args, pipe, clip) -> dict:
    """{phase: (bytes held before it, bytes at its peak)}: a batch of sampling, all pictures decoded, some
    scored, the second micro-batch of an update, which adds to the first's gradients, and its step. What reads
    values is left out, so rollout's and update's own calls stand here. pipe and clip lose their weights."""
    policy, base = make_policy(pipe.unet, args, torch.device("meta"))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    to_compute_type(pipe.vae, dtype)  # as train.set_up
    shape, images = latent_shape(pipe.unet), args.prompts_per_rollout * args.group
    size, peaks = clip.config.vision_config.image_size, {}

    @contextmanager
    def phase(name):
        before = alive.peak = alive.now
        yield
        peaks[name] = before, alive.peak

    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        for network in {policy, base, pipe.vae, pipe.text_encoder, clip}:
            network.to_empty(device="cpu")  # which gives fake weights in here
        optimizer = torch.optim.AdamW(trained(policy), fused=True)
        schedule = Schedule(torch.zeros(args.steps).long(), *torch.zeros(3, args.steps))
        parts = train.Parts(torch.device("cpu"), dtype, None, pipe, schedule, policy, base,
                            make_average(policy, args.ema), optimizer, [], shape)
        text = torch.empty(images, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
        batch = Rollout(torch.empty(images, args.steps + 1, *shape), torch.empty(images, args.steps),
                        text, torch.empty_like(text[:1]), names=[""] * images)
        for _ in range(2):  # in the first epoch the optimizer's moments come to be
            with torch.no_grad(), autocast(parts.device, parts.dtype):
                with phase("sample"):
                    x, text = batch.latents[:args.sample_batch, 0], batch.text[:args.sample_batch]
                    predict_noise(policy, x, schedule.timesteps[0], text, batch.null_text, args.guidance)
                with phase("decode"), mock.patch.object(sample, "check_pictures", lambda *_: None):
                    pictures = sample.decode(pipe.vae, batch.latents[:, -1], batch.names)
            with torch.no_grad(), phase("reward"):
                x = F.interpolate(pictures[:CLIP_BATCH], size, mode="bicubic", antialias=True).to(clip.dtype)
                clip.get_image_features(pixel_values=x)
            del pictures, x
            with phase("update"):
                for weight in trained(policy):
                    weight.grad = torch.empty_like(weight)
                pairs, A = torch.zeros(args.micro_batch, 2).long(), torch.empty(images)  # A: advantages
                loss, *_ = train.loss_on(parts, batch, pairs, batch.log_probs, A, A > 0, args)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return peaks


def main(argv=None):
    args = train.parse_args(argv)
    print(log.heading())
    if args.model != train.parse_args([]).model:
        raise ValueError(f"--model {args.model}: leave --model out, Stable Diffusion v1.4 is what is counted")
    args.precision, args.device = args.precision or "bf16", "cuda"
    pipe, (clip, *_) = sd14_pipeline("meta"), vit_h14("meta", torch.float16)
    pipe.unet.to(memory_format=torch.channels_last)  # as make_policy has it on a GPU
    with as_on_a_gpu():
        peaks = count(args, pipe, clip)
    print(f"Stable Diffusion v1.4 and ViT-H/14, {args.prompts_per_rollout} x {args.group} pictures, "
          f"{args.steps} steps, {args.precision}; GiB\n")
    print("| phase | held before | peak |\n|---|---|---|")
    for name, (before, peak) in peaks.items():
        print(f"| {name} | {before / 2**30:.2f} | {peak / 2**30:.2f} |")


if __name__ == "__main__":
    stop.run_script("bench.memory", main)
