"""Networks: those of others loaded safely (safetensors only, no code of theirs, errors that name the part),
the policy and its base made of them, and the policy's average.

A pickle can run code when it is opened, so no weights are read from one; a folder that brings Python code is
refused, since diffusers would run it. What can be known from configurations and from the heads of weight
files is checked before any weights are read.
"""

import copy
import math
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from plumbing.names import check_weights, local_folder, offers, read_json, reading, trace
from sample import ddim_schedule

NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
# whose betas and timesteps a DDIMScheduler reads as they do
SCHEDULERS = [kind.name for kind in KarrasDiffusionSchedulers if kind.name != "EDMEulerScheduler"] + [
    "LCMScheduler", "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"]
CLASSES = {part: [network.__name__] for part, network in NETWORKS.items()} | {
    "tokenizer": ["CLIPTokenizer", "CLIPTokenizerFast"]}
SETTINGS = {"num_train_timesteps": int, "beta_start": float, "beta_end": float, "beta_schedule": str}
MOST_EDGE = 4096       # pixels that a picture is scaled to for CLIP
MOST_SIDE = 1024       # latents; a picture of 8192 x 8192
MOST_STEPS = 100_000   # timesteps; a schedule is a table of them
# model.safetensors, model.fp16.safetensors, and of several files model.fp16-00001-of-00002.safetensors or
# model-00001-of-00002.fp16.safetensors
VARIANT = re.compile(r"[\w]+?(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors$")
# of a checkpoint: all of the UNet, or the adapters, which pipe.load_lora_weights(folder) reads
WEIGHTS = {False: "unet/diffusion_pytorch_model.safetensors", True: "pytorch_lora_weights.safetensors"}
AUTOCAST = torch.nn.Linear, torch.nn.Conv2d   # whose weights autocast casts


def variant(folder: Path) -> str | None:
    """The variant of a folder's weight files, fp16 in model.fp16.safetensors, or None for plain ones."""
    names = {match[1] or match[2] for file in folder.glob("*.safetensors")
             if (match := VARIANT.match(file.name))}
    if None in names or not names:
        return None
    if len(names) > 1:
        raise ValueError(f"{folder} holds the weights of {' and '.join(sorted(names))}, none of them plain: "
                         "leave one there")
    return names.pop()


def load_network(network: type, folder: str | Path, dtype=torch.float32, **more):
    """The one loader of networks: from_pretrained on safetensors, all of them there and of the right shape.
    For what is not, both libraries would put random numbers, or nothing."""
    kind = variant(Path(folder)) if Path(folder).is_dir() else None
    model, found = network.from_pretrained(
        str(folder), dtype=dtype, use_safetensors=True, variant=kind, output_loading_info=True,
        ignore_mismatched_sizes=True, **more)
    found = found if isinstance(found, dict) else vars(found)
    missing, misshapen = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of a {network.__name__}, "
                         f"{missing[0]} among them")
    if misshapen:
        name, there, wanted = misshapen[0]
        raise ValueError(f"{folder}: {name} is {list(there)}, but its config.json asks for {list(wanted)}")
    return model


# -------------------------------------------------------------------------------- Stable Diffusion

def load_pipeline(model: str, device="cpu") -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline by the name of a model (plumbing/names.py), in float32. Without the safety
    checker, which would return black pictures and so falsify every count. Raises ValueError or OSError with
    the reason when it is not one."""
    path, chain = pipeline_folder(model), trace("--model", model)[1]
    check_pipeline_folder(path)
    parts = {part: load_network(network, path / part) for part, network in NETWORKS.items()}
    pipe = StableDiffusionPipeline.from_pretrained(
        str(path), safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False, **parts)
    for checkpoint in chain:
        pipe.unet = with_checkpoint(pipe.unet, *checkpoint)
    for part in NETWORKS:
        getattr(pipe, part).requires_grad_(False).eval().to(device)
    return pipe


def pipeline_folder(model: str) -> Path:
    """The folder of the pipeline that a model is, or a checkpoint starts from; a hub id's is fetched."""
    model, _ = trace("--model", model)
    path = local_folder("--model", model)
    if path is not None:
        return path
    if ":" not in model:
        return Path(StableDiffusionPipeline.download(model, use_safetensors=True, safety_checker=None))
    from huggingface_hub import snapshot_download
    name, _, subfolder = model.rpartition(":")
    return Path(snapshot_download(name, allow_patterns=[f"{subfolder}/*"],
                                  ignore_patterns=["*.bin", "*.pt"])) / subfolder


def check_pipeline_folder(path: Path):
    """Name what a model folder lacks, or what the policy here cannot be, before any weights are read."""
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline: it has no model_index.json" + (offers(path) or
                         " (give the folder that holds unet/, vae/, text_encoder/, tokenizer/, scheduler/)"))
    index = read_json(path / "model_index.json")
    for part in (*CLASSES, "scheduler"):
        if not (path / part).is_dir():
            raise ValueError(f"{path} lacks the component {part}/")
    for part, network in CLASSES.items():
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or named[1] not in network:
            raise ValueError(f"{path / 'model_index.json'}: {part} is {named}; it has to be a "
                             f"{' or '.join(network)}, as in Stable Diffusion 1.x and 2.x")
    for part in NETWORKS:
        check_weights(path / part)
    code = next(path.rglob("*.py"), None)
    if code:
        raise ValueError(f"{path} brings code of its own ({code.name}), which diffusers would run; remove it")
    check_scheduler(path)
    unet, vae, text = (read_json(path / part / "config.json") for part in NETWORKS)
    check_sample_size(path, unet)
    channels = [unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)]
    if len(set(channels)) > 1:
        raise ValueError(f"{path}: its UNet takes {channels[0]} channels and gives {channels[1]}, its VAE "
                         f"has {channels[2]}; give a text-to-image model, none for inpainting or upscaling")
    width = text.get("text_config", text).get("hidden_size", 512)
    if unet.get("cross_attention_dim") != width:
        raise ValueError(f"{path}: its UNet reads text of width {unet.get('cross_attention_dim')}, its text "
                         f"encoder gives {width}; give a Stable Diffusion 1.x or 2.x (SDXL has two encoders)")


def check_model(flag: str, model: str, steps: int, eta: float):
    """Refuse a model that cannot be drawn from so; a hub id is checked when it is fetched."""
    folder = local_folder(flag, trace(flag, model)[0])
    if folder is not None:
        check_pipeline_folder(folder)
        check_scheduler(folder, steps, eta)


def check_scheduler(path: Path, steps: int = 2, eta: float = 1.0):
    """The ddim_schedule of a pipeline's folder, from its scheduler_config.json. Raises ValueError that names
    the file for another process than the DDPM's, and for values that give no schedule."""
    file = path / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    name, kind = config.get("_class_name"), config.get("prediction_type", "epsilon")
    if name not in SCHEDULERS or config.get("use_flow_sigmas"):
        raise ValueError(f"{file}: {name} is another process than the DDPM's (a flow, EDM, or none that is "
                         "known here); give a Stable Diffusion 1.x or 2.x")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"{file}: prediction_type must be epsilon or v_prediction, not {kind!r}")
    for key, wanted in SETTINGS.items():
        value = config.get(key)
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
            raise ValueError(f"{file}: {key} is {value!r}, which has to be a {wanted.__name__}")
    if not 2 <= config["num_train_timesteps"] <= MOST_STEPS:
        raise ValueError(f"{file}: num_train_timesteps must lie between 2 and {MOST_STEPS}")
    try:
        getattr(diffusers, name).from_config(config)
        schedule = ddim_schedule(SimpleNamespace(config=config), steps, eta)
    except (ValueError, TypeError, LookupError, NotImplementedError, RuntimeError, ImportError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(said if "--" in said else f"{file}: {said}") from None
    a_t, a_p = schedule.alpha_t, schedule.alpha_prev
    if not ((0 < a_t) & (a_t <= a_p) & (a_p <= 1)).all():
        raise ValueError(f"{file}: alpha-bar does not fall from 1 towards 0 with these betas")
    return schedule


def check_sample_size(path: Path, unet: dict):
    """sample.latent_shape reads a number, or [height, width]."""
    size = unet.get("sample_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and 0 < side <= MOST_SIDE for side in sides):
        raise ValueError(f"{path / 'unet' / 'config.json'}: sample_size is {size}; write the latents' there, "
                         "one number or [height, width]: 64 for pictures of 512 x 512")


# -------------------------------------------------------------------------------- CLIP

def check_clip(clip: str):
    """Refuse a CLIP whose towers do not project into one space, from its configuration and, in a folder, the
    heads of its weight files; no weights are read. Returns its configuration."""
    folder = local_folder("--clip", clip)
    config = AutoConfig.from_pretrained(clip)
    if config.model_type != "clip":
        raise ValueError(f"--clip {clip}: a {config.model_type} model; the reward needs a CLIPModel, "
                         "whose text and image towers project into one space")
    clip_processor(clip, config)
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
    config = check_clip(clip)
    return (load_network(CLIPModel, clip, dtype), CLIPTokenizer.from_pretrained(clip),
            clip_processor(clip, config))


def clip_processor(clip: str, config) -> CLIPImageProcessor:
    """What a CLIP's preprocessor_config.json says, in the one form that reward.py reads: shorter side or
    [height, width], centre crop, mean, deviation. Without the file, as HPSv2's in transformers' format has
    none, it is CLIP's own. Raises ValueError for what reward.preprocess does not do."""
    file = cached_file(clip, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    raw, side = read_json(Path(file)) if file else {}, config.vision_config.image_size
    size, crop = (raw.get(key, side if not file else 224) for key in ("size", "crop_size"))
    size = {"shortest_edge": size} if type(size) is int else size
    crop = {"height": crop, "width": crop} if type(crop) is int else crop
    normal = raw.get("do_normalize", True)
    mean, std = (raw.get(key, own) if normal else [plain] * 3 for key, own, plain in (
        ("image_mean", OPENAI_CLIP_MEAN, 0.0), ("image_std", OPENAI_CLIP_STD, 1.0)))
    edges = list(size.values()) if isinstance(size, dict) else []
    whole = crop == {"height": side, "width": side} and raw.get("do_center_crop", True) is True
    triple = lambda values: (isinstance(values, (list, tuple)) and len(values) == 3
                             and all(type(v) in (int, float) and math.isfinite(v) for v in values))
    rules = [
        ("do_resize", raw.get("do_resize", True) is True, "must be true"),
        ("resample", raw.get("resample", 3) == 3, "must be 3, bicubic, as CLIP's"),
        ("do_rescale", raw.get("do_rescale", True) is True, "must be true"),
        ("rescale_factor", raw.get("rescale_factor", 1 / 255) == 1 / 255, "must be 1/255"),
        ("do_normalize", type(normal) is bool, "must be true or false"),
        ("size", isinstance(size, dict) and set(size) in ({"shortest_edge"}, {"height", "width"})
         and all(type(edge) is int and side <= edge <= MOST_EDGE for edge in edges),
         f"must be {side} (image_size in config.json) or more: a number, shortest_edge, or height and width"),
        ("crop_size", whole or edges and set(edges) == {side} and raw.get("do_center_crop") is False,
         f"must be {side}, as image_size in config.json, with do_center_crop true"),
        ("image_mean", triple(mean), "must be three numbers"),
        ("image_std", triple(std) and all(v > 0 for v in std), "must be three numbers above 0")]
    for key, fine, say in rules:
        if not fine:
            raise ValueError(f"--clip {clip}: preprocessor_config.json: {key} is {raw.get(key, 'absent')}; "
                             f"it {say}")
    return CLIPImageProcessor(size=size, crop_size=side, image_mean=list(mean), image_std=list(std))


# -------------------------------------------------------------------------------- the policy and its base

def to_compute_type(network, dtype):
    """A frozen network's weights in the type in which autocast computes with them, so that it need not cast
    them at every call; in place. Norms and embeddings stay in float32, as autocast leaves them: were they
    rounded, the base would differ from the policy that it was made of, and the KL would not start at 0."""
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


def weights(policy, rank: int) -> dict:
    """What is trained: the UNet's weights, or the adapters' under the names that diffusers gives them."""
    if not rank:
        return policy.state_dict()
    return {"unet." + name.removeprefix("base_model.model.").replace(".default", ""): p.detach()
            for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_weights(policy, learnt: dict, rank: int):
    """Into a policy what `weights` took from one. Raises ValueError where that was another model's."""
    own = weights(policy, rank)
    if {name: t.shape for name, t in learnt.items()} != {name: t.shape for name, t in own.items()}:
        raise ValueError("the weights are not of this model")
    for name, tensor in own.items():
        tensor.copy_(learnt[name])


@torch.no_grad()
def with_checkpoint(unet, folder: Path, rank: int, average: bool):
    """A UNet with what a checkpoint holds: all weights, or adapters of a rank, which are merged into it; as
    they are, or their average."""
    policy = add_adapters(unet, rank) if rank else unet.requires_grad_(True)
    with reading(folder):
        put_weights(policy, load_file(folder / WEIGHTS[bool(rank)]), rank)
        if average:
            trained = [p for p in policy.parameters() if p.requires_grad]  # as the optimizer counts them
            state = torch.load(folder / "optimizer.pt", "cpu", weights_only=True, mmap=True)["state"]
            for number, values in state.items():
                trained[number].copy_(values["average"])
    return policy.merge_and_unload() if rank else unet


def without_adapter(policy, base):
    """The base is the policy with its adapter off (LoRA), or a frozen network of its own (nothing to do)."""
    return policy.disable_adapter() if base is policy else nullcontext()


@torch.no_grad()
def average_weights(optimizer, epoch: int, decay: float):
    """Move the average over the epochs of each weight: exponential, and uniform while it is young; decay 0:
    no average. It stands beside Adam's moments in the optimizer's state, so in checkpoints; a weight without a
    step has none."""
    for weight, state in optimizer.state.items() if decay else ():
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
