"""Stable Diffusion v1.4 and CLIP ViT-H/14 in their published shapes with random weights; no downloads.

Time and memory depend on shapes alone. The vocabulary of their tokenizer is not at hand, so that of the
shapes world stands in, at the full length of 77 tokens; it spells words that it does not know.
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel,
                          CLIPTextConfig, CLIPTextModel, CLIPTokenizer)

from shapes import WEIGHTS

TOKENIZER = CLIPTokenizer.from_pretrained(WEIGHTS / "text_encoder", model_max_length=77)


def sd14_pipeline(device, sample_size: int = 64) -> StableDiffusionPipeline:
    """CompVis/stable-diffusion-v1-4's published configuration. sample_size: width of the latents."""
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=sample_size, cross_attention_dim=768)  # the rest: defaults
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
                            down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    scheduler = DDIMScheduler.from_pretrained(WEIGHTS / "scheduler")  # the shapes world has the real one's
    pipe = StableDiffusionPipeline(vae, text, TOKENIZER, unet, scheduler, None, None,
                                   requires_safety_checker=False)
    for part in (unet, vae, text):
        part.requires_grad_(False).eval()
    return pipe


def vit_h14(device, dtype):
    """laion/CLIP-ViT-H-14-laion2B-s32B-b79K's published configuration, as load_clip would return it."""
    tower = dict(num_attention_heads=16, hidden_act="gelu", projection_dim=1024)
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, **tower,
                eos_token_id=TOKENIZER.eos_token_id)
    vision = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14, **tower)
    config = CLIPConfig(projection_dim=1024, text_config=text, vision_config=vision)
    with torch.device(device):
        clip = CLIPModel(config).to(dtype)
    return clip, TOKENIZER, CLIPImageProcessor()
