"""Networks: those of others loaded safely, the policy and its base made of them, and the policy's average.

A pickle can run code when it is opened, so weights are read from safetensors alone; a folder with Python code
is refused, since diffusers would run it. A model is a pipeline's folder, a hub id, NAME:SUBFOLDER of either,
or a run's checkpoint: a pipeline, or adapters that go onto the model which its state.json names.
"""

import copy
import json
import os
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch.optim.swa_utils import AveragedModel
from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from plumbing.flags import usable
from plumbing.hub import CLIP_FILES, fetch

NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
CLASSES = {part: network.__name__ for part, network in NETWORKS.items()} | {"tokenizer": "CLIPTokenizer"}
ADAPTERS = "pytorch_lora_weights.safetensors"  # diffusers' name; a checkpoint under --lora-rank has this file
NAMED = 5                                      # prompts in one message
CPU_WEIGHTS = 2**28                            # bytes of a UNet that a CPU trains in minutes; SD's are 3.4 GB
LAYERS = {"all": "", "cross-attention": "attn2."}  # --layers: what diffusers' names of them share
AUTOCAST = torch.nn.Linear, torch.nn.Conv2d    # whose weights autocast casts


# -------------------------------------------------------------------------------- what a name means

def local_folder(flag: str, name: str) -> Path | None:
    """The folder that FOLDER or FOLDER:SUBFOLDER means, or None for a hub id."""
    whole, _, subfolder = name.rpartition(":")
    if not whole or Path(name).is_dir():  # a folder's own name may hold colons
        whole, subfolder = name, ""
    if Path(whole).is_dir():
        return Path(whole) / subfolder
    if Path(whole).is_file():
        raise ValueError(f"{flag} {whole}: a file; a pickle can run code. Give a folder with safetensors")
    if whole.startswith((".", "/", "~")) or whole.count("/") != 1 or Path(whole).parent.is_dir():
        raise ValueError(f"{flag} {name}: no such folder")
    return None


def trace(flag: str, model: str) -> tuple[Path, list[Path]]:
    """A pipeline's folder, and the adapters' folders that go onto it in order. A hub id is fetched first."""
    folder = local_folder(flag, model) or fetch(flag, model)
    if (folder / "model_index.json").is_file() or not (folder / ADAPTERS).is_file():
        return folder, []
    state = read_json(folder / "state.json")
    start = state["start"] if Path(state["start"]).is_dir() else state["model"]  # the folder may have moved
    base, below = trace(f"{flag} {model}, which starts from", start)
    return base, [*below, folder]


def read_json(path: Path) -> dict:
    """The object in a configuration file. Raises ValueError that names the file, or OSError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:  # not UTF-8 is a ValueError, too
        raise ValueError(f"{path}: not a JSON object ({error})") from None


# -------------------------------------------------------------------------------- loading

def load_network(network: type, folder: str | Path, dtype=torch.float32):
    """The one loader of networks: from_pretrained on safetensors, all of them there and of the right shape.
    For what is not, both libraries would put random numbers, or nothing."""
    files = [path.name for path in Path(folder).glob("*.safetensors")]
    variant = "fp16" if files and all(".fp16" in name for name in files) else None
    model, found = network.from_pretrained(
        str(folder), dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True,
        ignore_mismatched_sizes=True)
    found = found if isinstance(found, dict) else vars(found)
    if wrong := [*sorted(found["missing_keys"]), *sorted(found["mismatched_keys"])]:
        raise ValueError(f"{folder}: {len(wrong)} weights of a {network.__name__} are missing, or not of the "
                         f"shape that its config.json asks for: {wrong[0]}")
    return model


def check_model(flag: str, model: str):
    """Refuse a model that cannot be the policy, from its heads; returns the scheduler, for ddim_schedule."""
    folder, _ = trace(flag, model)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{flag} {model}: no model_index.json in {folder}; of a run give "
                         "final/ or a checkpoint")
    index = read_json(folder / "model_index.json")
    for part, known in CLASSES.items():
        named = index.get(part)
        fits = isinstance(named, list) and {known, f"{known}Fast"} & set(map(str, named))  # of tokenizers
        if not fits or not (folder / part).is_dir():
            raise ValueError(f"{flag} {model}: its {part} is {named}, and has to be a folder with a {known}, "
                             "as in Stable Diffusion 1.x and 2.x")
    if code := next(folder.rglob("*.py"), None):
        raise ValueError(f"{flag} {model} brings code of its own ({code.name}), which diffusers would run")
    for part in NETWORKS:
        check_weights(folder / part)
    unet, vae, text = (read_json(folder / part / "config.json") for part in NETWORKS)
    channels = [unet.get("in_channels", 4), unet.get("out_channels", 4), vae.get("latent_channels", 4)]
    widths = [unet.get("cross_attention_dim"), text.get("text_config", text).get("hidden_size", 512)]
    if len(set(channels)) > 1 or len(set(widths)) > 1 or not unet.get("sample_size"):
        raise ValueError(f"{flag} {model}: no Stable Diffusion 1.x or 2.x, text to image (channels of UNet "
                         f"and VAE {channels}, text widths {widths}, sample_size {unet.get('sample_size')})")
    return read_scheduler(folder / "scheduler" / "scheduler_config.json")


def check_weights(folder: Path):
    """Refuse a folder without safetensors, or with a torn one, from their heads."""
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors (save_pretrained makes one); a pickle can run code")
    for file in files:
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error})") from None


def read_scheduler(file: Path):
    """The scheduler of a pipeline, by its configuration."""
    config = read_json(file)
    try:
        return getattr(diffusers, str(config.get("_class_name"))).from_config(config)
    except (AttributeError, ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        raise ValueError(f"{file}: no scheduler of diffusers ({str(error).splitlines()[0]})") from None


def load_pipeline(model: str, device="cpu") -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline by the name of a model that check_model has passed, in float32, frozen.
    Without the safety checker, which would return black pictures and so falsify every count."""
    folder, adapters = trace("--model", model)
    parts = {part: load_network(network, folder / part) for part, network in NETWORKS.items()}
    pipe = StableDiffusionPipeline.from_pretrained(
        str(folder), safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False, **parts)
    for adapter in adapters:
        pipe.load_lora_weights(str(adapter))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    for part in NETWORKS:
        getattr(pipe, part).requires_grad_(False).eval().to(device)
    return pipe


def find_clip(clip: str, flag: str = "--clip") -> Path:
    """The folder of a CLIP; a hub id's files are fetched. What is no CLIP is refused, from its heads."""
    folder = local_folder(flag, clip) or fetch(flag, clip, CLIP_FILES)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{flag} {clip}: a {kind} model; a CLIP's text and image project into one space")
    check_weights(folder)
    return folder


def load_clip(clip: str, dtype=torch.float32, flag: str = "--clip"):
    """A transformers CLIP from a hub id or a folder -> (model, tokenizer, image processor). Without a
    preprocessor_config.json, as HPSv2's in transformers' format has none, the processor is CLIP's own."""
    folder = find_clip(clip, flag)
    side = AutoConfig.from_pretrained(folder).vision_config.image_size
    if (folder / "preprocessor_config.json").is_file():
        processor = CLIPImageProcessor.from_pretrained(folder)
    else:
        processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    made = processor.crop_size if processor.do_center_crop else processor.size
    steps = processor.do_resize and processor.do_rescale and processor.do_normalize
    if not steps or processor.resample != 3 or dict(made) != {"height": side, "width": side}:
        raise ValueError(f"{flag} {clip}: preprocessor_config.json has to resize (bicubic), crop to {side} "
                         "(image_size in config.json), rescale and normalise, as CLIP's does")
    return load_network(CLIPModel, folder, dtype), CLIPTokenizer.from_pretrained(folder), processor


def note_long(clip: str, prompts: list):
    """Name the prompts that CLIP cuts off."""
    tokenizer = CLIPTokenizer.from_pretrained(find_clip(clip)).backend_tokenizer
    limit = AutoConfig.from_pretrained(find_clip(clip)).text_config.max_position_embeddings
    long = [f"{p.text[:60]!r} ({len(tokens)} tokens)" for p, tokens
            in zip(prompts, tokenizer.encode_batch_fast([p.text for p in prompts])) if len(tokens) > limit]
    if long:
        print(f"note: {len(long)} of {len(prompts)} prompts are longer than CLIP's {limit} tokens and are "
              f"cut there, as CLIP does: {', '.join(long[:NAMED])}" + ", ..." * (len(long) > NAMED))


# -------------------------------------------------------------------------------- the policy and its base

def choose_device(args):
    """Write the choice of device and precision into args: the GPU if there is one. A full-size model on a CPU
    is refused, unless the user named the CPU."""
    cuda = torch.cuda.is_available()
    if args.device is None and not cuda:
        files = trace("--model", args.model)[0].glob("unet/*.safetensors")
        if sum(file.stat().st_size for file in files) > CPU_WEIGHTS:
            raise ValueError(f"no GPU found, and {args.model} needs one (24 GB; 12 with --lora-rank 16).\n"
                             "  python -m shapes.train    shows the whole method on a CPU in minutes\n"
                             "  --device cpu              runs it here all the same")
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    device = usable(args.device or ("cuda" if cuda else "cpu"))
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not bf16:
        raise ValueError("--precision bf16: this GPU has none; use --precision float32")
    args.device = str(device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" and bf16 else "float32")


def to_compute_type(network, dtype):
    """A frozen network's weights in the type in which autocast computes with them, so that it need not cast
    them at every call; in place. Norms and embeddings stay in float32, as autocast leaves them: were they
    rounded, the base would differ from the policy that it was made of, and the KL would not start at 0."""
    for module in network.modules():
        if isinstance(module, AUTOCAST):
            module.to(dtype)
    return network


def make_policy(unet, args, device):
    """The UNet that learns, in float32, and the base for the KL: a frozen copy, or under LoRA the policy
    itself, whose adapters are float32. --layers cross-attention: what reads the prompt learns alone."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    unet.to(device, torch.float32)
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    if args.lora_rank:  # at the attention's projections, by diffusers' own method
        from peft import LoraConfig
        names = [LAYERS[args.layers] + name for name in ("to_q", "to_k", "to_v", "to_out.0")]
        policy = base = to_compute_type(unet, dtype).requires_grad_(False)
        policy.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=names))
        for weight in trained(policy):
            weight.data = weight.data.float()
    else:
        policy, base = unet, to_compute_type(copy.deepcopy(unet), dtype)
        for name, weight in policy.named_parameters():
            weight.requires_grad_(LAYERS[args.layers] in name)
    if not args.no_checkpointing:
        unet.enable_gradient_checkpointing()
    return policy.eval(), base.eval()  # eval in rollout and in update: dropout would be part of the policy


def trained(policy) -> list:
    return [weight for weight in policy.parameters() if weight.requires_grad]


@contextmanager
def without_adapter(policy, base):
    """Inside, the base is itself: under LoRA the policy with its adapters off, else a network of its own."""
    if base is policy:
        policy.disable_adapters()
    try:
        yield
    finally:
        if base is policy:
            policy.enable_adapters()


def make_average(policy, decay: float) -> AveragedModel | None:
    """The policy's average over the rollouts, exponential, and uniform while it is young; None for decay 0.
    What is frozen is shared with the policy."""
    def move(averages, weights, count):
        torch._foreach_lerp_(averages, weights, max(1 - decay, 1 / (int(count) + 1)))
    if not decay:
        return None
    average = AveragedModel(policy, multi_avg_fn=move).requires_grad_(False)
    for own, weight in zip(average.parameters(), policy.parameters()):
        if not weight.requires_grad:
            own.data = weight.data
    return average


def tensor_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
