"""Memory of a run by counting the tensors of a simulated epoch: no GPU needed, nor the memory itself.

One batch of each phase runs at full size on fake tensors, which have a shape and no data. Added up are the
bytes of all storages that are alive, as torch.cuda.max_memory_allocated does. What this cannot see is cuDNN's
and cuBLAS's work space, and what the allocator reserves and cannot use.

    python -m bench.memory                             # SD v1.4 and ViT-H/14, default flags, as on a GPU
    python -m bench.memory --lora-rank 16 --group 8    # any flags of train.py
"""

import sys
import weakref
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import train
from bench.sd14 import sd14_pipeline, vit_h14
from plumbing import output, stop
from plumbing.models import make_policy
from sample import Rollout, Schedule, autocast, decode, latent_shape, predict_noise

GIB = 2**30
CLIP_BATCH = 32  # pictures that SteeringReward gives to CLIP at once


class Alive(TorchDispatchMode):
    """While it is open: `now`, the bytes of all fake tensors' storages that are alive,
    and `peak`, the most so far."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # CUDA's allocator rounds up to 512 B
        if key in self.known:
            return

        def gone(_):
            del self.known[key]
            self.now -= size
        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def as_on_a_gpu():
    """Inside, fake tensors take the memory that they would take on a GPU. They live on the CPU, whose
    autocast leaves group and layer norms in bf16, where CUDA's computes them in float32, and whose attention
    is another one than CUDA's."""
    norms, attention = (F.group_norm, F.layer_norm), F.scaled_dot_product_attention
    half = lambda: torch.is_autocast_enabled("cpu")
    wide = lambda x: (x.float() if half() else x).contiguous()  # CUDA's group norm has no channels_last

    def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        q, k, v = (x.bfloat16() if half() else x for x in (q, k, v))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(q, k, v, dropout_p, is_causal, scale=scale)[0]

    F.group_norm, F.layer_norm = (lambda x, *rest, norm=norm: norm(wide(x), *rest) for norm in norms)
    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        (F.group_norm, F.layer_norm), F.scaled_dot_product_attention = norms, attention


def fake_run(args, pipe, policy, base):
    """Parts and Rollout as an update takes them, of fake tensors: with the optimizer's moments, and without
    what an update does not touch."""
    images = args.prompts_per_rollout * args.group
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], fused=True)
    give_gradients(optimizer)
    optimizer.step()  # so that there are moments
    optimizer.zero_grad(set_to_none=True)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    schedule = Schedule(torch.zeros(args.steps).long(), *torch.zeros(3, args.steps))
    shape, device = latent_shape(pipe.unet), torch.device("cpu")
    parts = train.Parts(device, dtype, None, pipe, schedule, policy, base, optimizer, {}, [], [], shape)
    text = torch.empty(images, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    batch = Rollout(torch.empty(images, args.steps + 1, *shape), torch.empty(images, args.steps),
                    text, torch.empty_like(text[:1]), advantages=torch.empty(images),
                    unsafe=torch.ones(images, dtype=torch.bool))
    return parts, batch


def give_gradients(optimizer):
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.empty_like(weight)


def count(args, pipe, clip, gpu: bool = True) -> dict:
    """{phase: (bytes held before it, bytes at its peak)}, once the optimizer has its moments: one batch of
    sampling, all pictures decoded and scored, and of an update the second micro-batch, whose gradients are
    added to the first's, and a step. train.update and sample.rollout read values, which fake tensors have
    not; their functions are called here in the same order. pipe and clip may lie on "meta", and their weights
    are lost. gpu: as_on_a_gpu."""
    policy, base = make_policy(pipe.unet, args, torch.device("meta"))
    if gpu:
        policy.to(memory_format=torch.channels_last), base.to(memory_format=torch.channels_last)
    peaks, size = {}, clip.config.vision_config.image_size

    @contextmanager
    def phase(name):
        before = alive.peak = alive.now
        yield
        peaks[name] = before, alive.peak

    kind = as_on_a_gpu if gpu else nullcontext
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive, kind():
        for network in {policy, base, pipe.vae, pipe.text_encoder, clip}:
            network.to_empty(device="cpu")  # which gives fake weights in here
        parts, batch = fake_run(args, pipe, policy, base)
        with torch.no_grad(), autocast(parts.device, parts.dtype):
            with phase("sample"):
                x, text = batch.latents[:args.sample_batch, 0], batch.text[:args.sample_batch]
                predict_noise(policy, x, parts.schedule.timesteps[0], text, batch.null_text, args.guidance)
            with phase("decode"):
                pictures = decode(pipe.vae, batch.latents[:, -1])
        with torch.no_grad(), phase("reward"):
            for part in pictures.split(CLIP_BATCH):
                pixels = F.interpolate(part, size, mode="bicubic", antialias=True).to(clip.dtype)
                clip.get_image_features(pixel_values=pixels)
        del pictures, part, pixels
        with phase("update"):
            give_gradients(parts.optimizer)
            loss, _, _ = train.loss_on(parts, batch, torch.zeros(args.micro_batch, 2).long(), args)
            loss.backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad(set_to_none=True)
    return peaks


def main(argv=None):
    args = train.parse_args(["--device", "cpu", *(sys.argv[1:] if argv is None else argv)])
    print(output.heading())
    if args.model != train.parse_args([]).model:
        raise ValueError(f"--model {args.model}: counted is Stable Diffusion v1.4, without its weights; "
                         "leave --model out")
    args.precision, args.device = args.precision or "bf16", "cuda"
    peaks = count(args, sd14_pipeline("meta"), vit_h14("meta", torch.float16)[0])
    print(f"Stable Diffusion v1.4 and ViT-H/14, {args.prompts_per_rollout} x {args.group} pictures, "
          f"{args.steps} steps, {args.precision}; GiB\n")
    print("| phase | held before | peak |\n|---|---|---|")
    for name, (before, peak) in peaks.items():
        print(f"| {name} | {before / GIB:.2f} | {peak / GIB:.2f} |")


if __name__ == "__main__":
    stop.run_script("bench.memory", main)
