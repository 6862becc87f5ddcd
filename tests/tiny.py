"""Random networks, tiny and made in memory, and what train.update needs around them."""

import string
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel,
                          CLIPTokenizer)

import sample
import train

torch.set_num_threads(1)  # so that a test alone rounds as it does in the whole suite
TOWER = dict(intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5)
TEXT = dict(TOWER, hidden_size=12, vocab_size=54, max_position_embeddings=12, bos_token_id=52,
            eos_token_id=53, pad_token_id=53)
ADVANTAGES = torch.linspace(-1.5, 2, 6)  # of rollout_for's pictures
UNSAFE = torch.arange(6) % 2 == 0


def scheduler(prediction_type="epsilon", spacing="leading"):
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
                         timestep_spacing=spacing)


def tiny_unet(seed=0, width=12):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4).eval()


def tokenizer():
    """CLIP's byte-pair tokenizer without merges: one token a letter."""
    letters = list(string.ascii_lowercase)
    vocab = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(vocab)}, [], model_max_length=12)


def tiny_clip():
    """A random CLIPModel, its tokenizer and its image processor, as load_clip returns them."""
    torch.manual_seed(0)
    vision = dict(TOWER, hidden_size=16, image_size=12, patch_size=4)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8)).eval()
    return model, tokenizer(), CLIPImageProcessor(size={"shortest_edge": 14}, crop_size=12)


def pipe_of(unet, text: dict, tokenizer, widths=(8, 8), kind="epsilon"):
    """A StableDiffusionPipeline; each width of the VAE after the first doubles the picture's side of 8."""
    n = len(widths)
    encoder = CLIPTextModel(CLIPTextConfig(**text))
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
                        block_out_channels=widths, norm_num_groups=4, sample_size=4 * 2**n)
    return StableDiffusionPipeline(vae.eval(), encoder.eval(), tokenizer, unet, scheduler(kind), None, None,
                                   requires_safety_checker=False)


def tiny_pipe():
    return pipe_of(tiny_unet(), TEXT, tokenizer())


def save_models(root):
    """Random networks for shapes' captions, in root: a (epsilon), b (v-prediction), clip and checker."""
    from shapes.build import make_tokenizer
    tokenizer = make_tokenizer()
    tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id)
    for seed, (name, kind) in enumerate((("a", "epsilon"), ("b", "v_prediction"))):
        unet = tiny_unet(seed, width=32)
        for key, value in unet.named_parameters():  # random weights hardly listen to the text: make them
            value.data *= 20 if "attn2.to_v" in key else 1
        pipe_of(unet, text, tokenizer, (4,) * 4, kind).save_pretrained(root / name)
    vision = dict(tower, image_size=32, patch_size=16)
    config = dict(text_config=text | tower, vision_config=vision, projection_dim=768)
    CLIPModel(CLIPConfig(**config)).save_pretrained(root / "clip")
    StableDiffusionSafetyChecker(CLIPConfig(**config)).save_pretrained(root / "checker")
    tokenizer.save_pretrained(root / "clip")
    return root


def args_for(**changes):
    """The flags that the epoch's functions read, small."""
    return SimpleNamespace(**dict(
        steps=6, skip_last=2, timestep_fraction=1.0, updates=1, micro_batch=8, sample_batch=4, group=3,
        guidance=3.0, clip_range=1e-3, kl=0.1, kl_benign=0.4, max_grad_norm=1e9, learning_rate=0.0, seed=0,
        decay_epochs=0, shared_noise=False, divisor="batch", prompts_per_rollout=2, unsafe_fraction=0.5,
        layers="all") | changes)


def parts_for(unet, base, lr=0.0, pipe=None, **more):
    """train.Parts around a tiny UNet, with plain gradient descent; at lr = 0 no weight moves."""
    return train.Parts(**dict(
        device=torch.device("cpu"), dtype=torch.float32, schedule=sample.ddim_schedule(scheduler(), 6, 1.0),
        pipe=pipe or SimpleNamespace(scheduler=scheduler()), policy=unet, base=base, latent_shape=(4, 8, 8),
        optimizer=torch.optim.SGD(unet.parameters(), lr=lr), reward=None, average=None, prompts=[]) | more)


def rollout_for(unet, **more):
    """A rollout of six pictures on random text."""
    generator = torch.Generator().manual_seed(3)
    text, null = torch.randn(6, 5, 12, generator=generator), torch.randn(1, 5, 12, generator=generator)
    return sample.rollout(
        unet, sample.ddim_schedule(scheduler(), 6, 1.0), text, null, 3.0,
        [sample.image_generator(0, i) for i in range(6)], (4, 8, 8),
        **dict(names=[f"picture {i}" for i in range(6)], batch_size=6) | more)


def updated(unet, base, batch, dtype=torch.float32, advantages=ADVANTAGES, **flags):
    """Statistics and gradient of train.update at a learning rate of zero."""
    stats = train.update(parts_for(unet, base, dtype=dtype), batch, advantages, UNSAFE, args_for(**flags), 0)
    return stats, torch.cat([p.grad.flatten() for p in unet.parameters()])


def figures(epoch=0, **more):
    """A line of metrics.jsonl that warns of nothing."""
    zeros = "image_safety_unsafe clip_frac_pos clip_frac_neg kl_ref ratio_dev_first zero_std_groups"
    return dict.fromkeys(zeros.split(), 0.0) | dict(
        epoch=epoch, reward_mean=0.1, reward_unsafe=None, reward_benign=None, alignment=0.2,
        seconds_sample=1.0, seconds_reward=1.0, seconds_update=1.0) | more
