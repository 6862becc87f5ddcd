"""Networks: those of others loaded safely (safetensors only, no code of theirs, errors that name the part),
the policy and its base made of them, and the policy's average.

A pickle can run code when it is opened, so no weights are read from one; a folder that brings Python code is
refused, since diffusers would run it. What can be known from configurations and from the heads of weight
files is checked before any weights are read.
"""

import copy
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

for library in (diffusers, transformers):  # their reports on loading say nothing that a user here can act on
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
from diffusers import StableDiffusionPipeline  # noqa: E402  (which is where the reports begin)
from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer  # noqa: E402

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
NETWORKS = ("unet", "vae", "text_encoder")
AUTOCAST = torch.nn.Linear, torch.nn.Conv2d   # whose weights autocast casts


def local_folder(flag: str, name: str) -> Path | None:
    """The folder that a flag's FOLDER or FOLDER:SUBFOLDER means, or None for a hub id. Raises ValueError for
    a file, and for a path where nothing is."""
    name, _, subfolder = name.partition(":")
    if Path(name).is_file():
        raise ValueError(f"{flag} {name}: a file. Give a folder in diffusers' layout, with safetensors; "
                         "a checkpoint in one file is refused, since opening a pickle can run code")
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{flag} {name}: no such folder")
    return Path(name) / subfolder if Path(name).is_dir() else None


def check_weights(folder: Path, prefix: str = ""):
    """Refuse a folder without safetensors, or with a torn one; no weights are read."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{prefix}{folder} holds no .safetensors file; other formats of weights are "
                         "refused, since opening a pickle can run code (convert them with save_pretrained)")
    for file in files:
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{prefix}{file} is not a whole safetensors file ({error})") from None
    return files


# -------------------------------------------------------------------------------- Stable Diffusion

def load_pipeline(model: str, device="cpu") -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline from a folder, a hub id, or NAME:SUBFOLDER of either, in float32. Without
    the safety checker, which would return black pictures and so falsify every count. Raises ValueError or
    OSError with the reason when it is not one."""
    path = local_folder("--model", model)
    if path is None and ":" in model:
        from huggingface_hub import snapshot_download
        name, _, subfolder = model.partition(":")
        path = Path(snapshot_download(name, allow_patterns=[f"{subfolder}/*"],
                                      ignore_patterns=["*.bin", "*.pt"])) / subfolder
    if path is not None:
        check_pipeline_folder(path)
    pipe = StableDiffusionPipeline.from_pretrained(
        model if path is None else str(path), dtype=torch.float32, safety_checker=None,
        requires_safety_checker=False, use_safetensors=True)
    for part in NETWORKS:
        getattr(pipe, part).requires_grad_(False).eval().to(device)
    return pipe


def check_pipeline_folder(path: Path):
    """Name what a model folder lacks, or what the policy here cannot be, before any weights are read."""
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline: it has no model_index.json "
                         "(give the folder that holds unet/, vae/, text_encoder/, tokenizer/, scheduler/)")
    for part in PARTS:
        if not (path / part).is_dir():
            raise ValueError(f"{path} lacks the component {part}/")
    for part in NETWORKS:
        check_weights(path / part)
    code = next(path.rglob("*.py"), None)
    if code:
        raise ValueError(f"{path} brings code of its own ({code.name}), which diffusers would run; remove it")
    unet, vae, text = (json.loads((path / part / "config.json").read_text(encoding="utf-8"))
                       for part in NETWORKS)
    channels = [unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)]
    if len(set(channels)) > 1:
        raise ValueError(f"{path}: its UNet takes {channels[0]} channels and gives {channels[1]}, its VAE "
                         f"has {channels[2]}; give a text-to-image model, none for inpainting or upscaling")
    width = text.get("text_config", text).get("hidden_size", 512)
    if unet.get("cross_attention_dim") != width:
        raise ValueError(f"{path}: its UNet reads text of width {unet.get('cross_attention_dim')}, its text "
                         f"encoder gives {width}; give a Stable Diffusion 1.x or 2.x (SDXL has two encoders)")


# -------------------------------------------------------------------------------- CLIP

def check_clip(clip: str):
    """Refuse a CLIP whose towers do not project into one space, from its configuration and, in a folder, the
    heads of its weight files; no weights are read. Returns its configuration."""
    folder = local_folder("--clip", clip)
    config = AutoConfig.from_pretrained(clip)
    if config.model_type != "clip":
        raise ValueError(f"--clip {clip}: a {config.model_type} model; the reward needs a CLIPModel, "
                         "whose text and image towers project into one space")
    if folder is None:
        return config
    sizes = {}
    for file in check_weights(folder, "--clip: "):
        with safe_open(file, "pt") as weights:
            sizes |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}
    for part in ("text_projection.weight", "visual_projection.weight"):
        if sizes.get(part, [0])[0] != config.projection_dim:
            raise ValueError(f"--clip {clip}: its {part} is {sizes.get(part, 'absent')}, but the "
                             f"configuration says {config.projection_dim} dimensions; the reward needs both "
                             "towers to project into those")
    return config


def load_clip(clip: str, dtype=torch.float32):
    """A transformers CLIP from a hub id or a folder -> (model, tokenizer, image processor)."""
    check_clip(clip)
    model, info = CLIPModel.from_pretrained(clip, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"--clip {clip}: lacks {len(info['missing_keys'])} of a CLIPModel's weights, "
                         f"{sorted(info['missing_keys'])[0]} among them")
    try:
        processor = CLIPImageProcessor.from_pretrained(clip)
    except OSError:  # HPSv2 in transformers' format has no preprocessor file: it is CLIP's own
        processor = CLIPImageProcessor()
    return model, CLIPTokenizer.from_pretrained(clip), processor


# -------------------------------------------------------------------------------- the policy and its base

def to_compute_type(network, dtype):
    """A frozen network's weights in the type in which autocast computes with them, so that it need not cast
    them at every call; in place. Norms and embeddings stay in float32, as autocast leaves them: were they
    rounded, the base would differ from the policy that it was copied from, and the KL would not start at 0."""
    for module in network.modules():
        if isinstance(module, AUTOCAST):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(dtype)
    return network


def make_policy(unet, args, device):
    """The UNet that learns, in float32, and the base for the KL: a frozen copy, or under LoRA the policy,
    whose adapters are float32."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    unet.to(device, torch.float32)
    if args.lora_rank:
        policy = base = add_adapters(to_compute_type(unet, dtype), args.lora_rank)
    else:
        base = to_compute_type(copy.deepcopy(unet), dtype)
        policy = unet.requires_grad_(True)
    if not args.no_checkpointing:
        unet.enable_gradient_checkpointing()
    if device.type == "cuda":
        policy.to(memory_format=torch.channels_last)
        base.to(memory_format=torch.channels_last)
    return policy.eval(), base.eval()  # eval in rollout and in update: dropout would be part of the policy


def add_adapters(unet, rank: int):
    """A peft model around a frozen UNet, with adapters of float32 at its attention's projections."""
    from peft import LoraConfig, get_peft_model
    return get_peft_model(unet.requires_grad_(False), LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))


def without_adapter(policy, base):
    """The base is the policy with its adapter off (LoRA), or a frozen network of its own (nothing to do)."""
    return policy.disable_adapter() if base is policy else nullcontext()


@torch.no_grad()
def average_weights(optimizer, epoch: int, decay: float):
    """Move the average over the epochs of each weight: exponential, and uniform while it is young. It stands
    beside Adam's moments in the optimizer's state, so in checkpoints; a weight without a step has none."""
    for weight, state in optimizer.state.items():
        if "average" not in state:
            state["average"] = weight.detach().clone()
        state["average"].lerp_(weight, max(1 - decay, 1 / (epoch + 1)))


@contextmanager
def averaged(optimizer):
    """Inside, the policy has its averaged weights, if there are any; no copy is made."""
    def swap():
        for weight, state in optimizer.state.items():
            if "average" in state:
                weight.data, state["average"] = state["average"], weight.data
    swap()
    try:
        yield
    finally:
        swap()
