"""Memory of a run: by arithmetic for the plan that train.py prints,
and by counting the tensors of a simulated epoch.

`estimate` is a formula. `count` is what it was fitted to: one batch of each phase at full size on fake
tensors, which have a shape and no data, so that it needs neither a GPU nor the memory. It adds up the bytes
of all storages that are alive, as torch.cuda.max_memory_allocated does. What it cannot see is cuDNN's and
cuBLAS's work space, and what the allocator reserves and cannot use.

    python memory.py                             # SD v1.4 and ViT-H/14, default flags, as on a GPU
    python memory.py --lora-rank 16 --group 8    # any flags of train.py
"""

import sys
import weakref
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from grpo import gaussian_kl, policy_loss
from sample import DECODE_BATCH, ddim_mean, decode, log_prob, predict_noise

GIB = 2**30
SD_PARTS = 207e6  # weights of Stable Diffusion v1's text encoder (123 M) and VAE (84 M)
# Fitted to the count, for Stable Diffusion v1.4. In tensors of the first level's size: what inference
# has alive, what training keeps of the block that is recomputed, and of every block without
# checkpointing; LoRA's branches add a fifth.
WORKING, RECOMPUTED, KEPT, LORA = 27, 80, 55, 1.2
DECODER = 2700    # bytes for each pixel of the picture, of the pictures that are decoded at once


# -------------------------------------------------------------------------------- by arithmetic

def estimate(args, policy, clip) -> float:
    """GiB at the peak of a run, printed before it starts. clip: its configuration.

    N weights, n of them trained, p bytes per number of the UNet's compute (2 for bf16, 4 for float32):
      weights, two Adam moments      4·N + 8·n, float32; 4·n more for the average of --ema
      gradients, in an update        4·n
      what autocast keeps in bf16    2·n; frozen weights are cast anew at each call
      the frozen base                p·N; none under LoRA
      text encoder and VAE, CLIP     4 bytes and (on a GPU) 2 bytes each: SD_PARTS, and CLIP's configuration
      stored latents                 4·C·h·w·(T + 1) per picture
      activations                    of sampling, of decoding, or of an update
    One block of the UNet's level i holds c_i·h·w/4^i numbers per picture, and 2·layers + 1 blocks
    stand at each level. Checkpointing keeps the input of each block, and what is recomputed of one;
    guidance doubles the pictures."""
    unet = policy.get_base_model() if args.lora_rank else policy
    config, total = unet.config, sum(p.numel() for p in unet.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    p, pixels = 2 if args.precision == "bf16" else 4, config.sample_size**2
    images = args.prompts_per_rollout * args.group
    towers = (sum(t.num_hidden_layers * (4 * t.hidden_size**2 + 2 * t.hidden_size * t.intermediate_size)
                  for t in (clip.text_config, clip.vision_config))
              + clip.text_config.vocab_size * clip.text_config.hidden_size)
    fixed = (4 * total + (12 if args.ema else 8) * trained + (2 * trained if p == 2 else 0)
             + (0 if args.lora_rank else p * total) + (4 * SD_PARTS if total > SD_PARTS else 0)
             + towers * (4 if args.device == "cpu" else 2)
             + 4 * config.in_channels * pixels * (args.steps + 1) * images)
    block = [c * pixels / 4**i * (2 * config.layers_per_block + 1)
             for i, c in enumerate(config.block_out_channels)]
    widest, branches = config.block_out_channels[0] * pixels, 1 if args.guidance == 1 else 2
    sampling = min(args.sample_batch, images) * branches * WORKING * widest * p
    # 8 x 8 pixels of a latent's, 3 floats each
    decoding = 64 * pixels * (min(DECODE_BATCH, images) * DECODER + 12 * images)
    kept = KEPT * sum(block) if args.no_checkpointing else sum(block) + RECOMPUTED * widest
    update = 4 * trained + args.micro_batch * branches * kept * p * (LORA if args.lora_rank else 1)
    return (fixed + max(sampling, decoding, update)) / GIB


# -------------------------------------------------------------------------------- by counting

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
    norms, attention, half = ((F.group_norm, F.layer_norm), F.scaled_dot_product_attention,
                              torch.is_autocast_enabled)
    wide = lambda x: (x.float() if half("cpu") else x).contiguous()  # CUDA's group norm has no channels_last

    def flash(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        q, k, v = (x.bfloat16() if half("cpu") else x for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, scale=scale)[0]

    F.group_norm, F.layer_norm = (lambda x, *rest, norm=norm: norm(wide(x), *rest) for norm in norms)
    F.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        (F.group_norm, F.layer_norm), F.scaled_dot_product_attention = norms, attention


def fake(network):
    """Give a network fake weights, in place; call it while a FakeTensorMode is open."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(weight, device="cpu"),
                                                              weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def count(args, pipe, clip, gpu: bool = True) -> dict:
    """{phase: (bytes held before it, bytes at its peak)}, once the optimizer has its moments: one batch of
    sampling, all pictures decoded and scored, two micro-batches and a step. The order is that of
    train.update, which cannot run on fake tensors itself, since it reads values; the functions are those that
    it calls. pipe and clip may lie on "meta", and their weights are lost. gpu: as_on_a_gpu."""
    import train  # which imports this file, by way of report.py
    policy, base = train.make_policy(pipe.unet, args, torch.device("meta"))
    if gpu:
        policy.to(memory_format=torch.channels_last), base.to(memory_format=torch.channels_last)
    images = args.prompts_per_rollout * args.group
    n = min(images, args.sample_batch)
    channels, size, peaks = policy.config.in_channels, policy.config.sample_size, {}
    length, width = pipe.tokenizer.model_max_length, policy.config.cross_attention_dim
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")

    @contextmanager
    def phase(name):
        before = alive.peak = alive.now
        yield
        peaks[name] = before, alive.peak

    kernels = as_on_a_gpu() if gpu else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive, kernels:
        for network in {policy, base, pipe.vae, pipe.text_encoder, clip}:
            fake(network)
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        latents = torch.empty(images, args.steps + 1, channels, size, size)
        text, null_text = torch.empty(images, length, width), torch.empty(1, length, width)

        def mean(network, x, t, states, s):
            return ddim_mean(predict_noise(network, x, t, states, null_text, args.guidance), x, s, s, s)

        for weight in trained:
            weight.grad = torch.empty_like(weight)
        optimizer.step()  # so that there are moments
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), autocast():
            with phase("sample"):
                mean(policy, latents[:n, 0], torch.zeros(n).long(), text[:n], torch.zeros(n))
            with phase("decode"):
                pictures = decode(pipe.vae, latents[:, -1])
        with torch.no_grad(), phase("reward"):
            for part in pictures.split(32):
                pixels = F.interpolate(part, clip.config.vision_config.image_size,
                                       mode="bicubic", antialias=True)
                clip.get_image_features(pixel_values=pixels.to(clip.dtype))
        del pictures, part, pixels
        with phase("update"):
            for _ in range(2):
                image, s = torch.zeros(args.micro_batch).long(), torch.zeros(args.micro_batch)
                inputs = latents[image, 0], image, text[image], s
                x_prev = latents[image, 1]
                with autocast():
                    mu = mean(policy, *inputs)
                logp = log_prob(x_prev, mu, s)
                loss, _ = policy_loss(logp, logp.detach(), s, args.clip_range)
                if args.kl:
                    with torch.no_grad(), autocast(), train.without_adapter(policy, base):
                        mu_base = mean(base, *inputs)
                    loss = loss + args.kl * gaussian_kl(mu, mu_base, s).mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return peaks


def main():
    import bench
    import train
    args = train.parse_args(["--device", "cpu", *sys.argv[1:]])
    if args.model != train.parse_args([]).model:
        raise ValueError(f"--model {args.model}: counted is Stable Diffusion v1.4, without its weights; "
                         "leave --model out")
    args.precision, args.device = args.precision or "bf16", "cuda"
    pipe, (clip, *_) = bench.sd14_pipeline("meta"), bench.vit_h14("meta", torch.float16)
    peaks = count(args, pipe, clip)
    policy, _ = train.make_policy(bench.sd14_pipeline("meta").unet, args, torch.device("meta"))
    print(f"Stable Diffusion v1.4 and ViT-H/14, {args.prompts_per_rollout} x {args.group} pictures, "
          f"{args.steps} steps, {args.precision}; GiB\n")
    print("| phase | held before | peak |\n|---|---|---|")
    for name, (before, peak) in peaks.items():
        print(f"| {name} | {before / GIB:.2f} | {peak / GIB:.2f} |")
    print(f"\nestimate of train.py's plan: {estimate(args, policy, bench.vit_h14_config()):.2f}, "
          f"counted: {max(peak for _, peak in peaks.values()) / GIB:.2f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"memory.py: {error}")
