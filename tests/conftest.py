"""What several files of tests share: two tiny models in folders, and train.py in this process."""

import sys

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

torch.set_num_threads(1)  # to the bit means with as many threads, here and in the processes that are started


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two tiny random pipelines on the shapes world's captions, epsilon and v-prediction, in folders a and b,
    and a CLIP in the folder clip."""
    from shapes.build import make_tokenizer  # the world may be deleted, and tests of the method stay
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    for seed, (name, kind) in enumerate((("a", "epsilon"), ("b", "v_prediction"))):
        torch.manual_seed(seed)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                            num_hidden_layers=2, num_attention_heads=2,
                                            max_position_embeddings=16, **ends))
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32,
            norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
        for key, value in unet.named_parameters():  # random weights hardly listen to the text: make them
            value.data *= 20 if "attn2.to_v" in key else 1
        vae = AutoencoderKL(block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
                            norm_num_groups=4, sample_size=64)
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                  clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                                  prediction_type=kind)
        made = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False)
        made.save_pretrained(root / name)
    tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(tower, vocab_size=len(tokenizer), max_position_embeddings=16, **ends)
    vision = dict(tower, image_size=32, patch_size=16)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    clip.save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    return root


@pytest.fixture
def quick(models, monkeypatch):
    """train.main in this process, on the flags of started.tiny, without the pictures and the table at its
    end."""
    import started
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with started.nothing_drawn():
        yield lambda *argv: started.train.main(started.tiny(models, *argv))
