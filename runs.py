"""The run folder: input refused before a model is loaded, checkpoints whole or absent,
a run continued exactly.

    runs/NAME/flags.json                    all flags of the run, as last started
             /metrics.jsonl                 one object per rollout
             /pictures-000010.png           base above policy
             /checkpoint-000020/unet/       the UNet in diffusers' layout; under --lora-rank in its place
                               /pytorch_lora_weights.safetensors, which pipe.load_lora_weights(folder) reads
                               /optimizer.pt    read with weights_only=True, so that no pickle runs
                               /state.json      epoch, flags, versions, sha256 of prompt and anchor files
             /final/                        a pipeline that StableDiffusionPipeline.from_pretrained opens
             /table.md                      before and after

Every random number of a run comes from (seed, epoch, ...), so weights, optimizer state and epoch are the
whole state: after a kill at any instant, --resume ends with the bits of the undisturbed run (test_runs.py, on
a CPU). A folder that ends in .part is unfinished, or half removed, and is never read.
"""

import errno
import hashlib
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, CLIPTokenizer

import reward
import sample

HERE = Path(__file__).parent
RUN_FILES = ("flags.json", "metrics.jsonl", "table.md", "pictures-*.png", "checkpoint-*", "final", "*.part")
LIBRARIES = ("torch", "diffusers", "transformers")
FREE_FLAGS = {"out", "resume", "overwrite", "keep", "save_every",
              "picture_every", "show_unsafe", "epochs", "command"}
FILE_FLAGS = ("prompts", "anchors")                                         # compared by content, not by name
ROUNDING_FLAGS = {"device", "sample_batch", "micro_batch", "no_checkpointing"}  # may change the last bits
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMED = 5   # prompts or transitions named in one message; more are counted
CLIP_BOUND = 0.5        # share of transitions past the clip range; PPO's usual 0.1 to 0.3 is well below
KL_BOUND = 0.1          # per latent dimension: means that lie 0.45 of a step's deviation from the base's
ALIGNMENT_BOUND = 0.01  # cosine; CLIP's own spread within a group is about as large
TREND = 10              # rollouts in each of the two windows that a trend is taken from
STOP = []   # signals received: the one thing here that outlives a call, as signals belong to the process


# -------------------------------------------------------------------------------- input checks

def check_flags(args):
    """Refuse what cannot work, before anything is loaded."""
    rules = [(name, getattr(args, name) >= 1, "at least 1") for name in (
        "epochs", "prompts_per_rollout", "sample_batch", "updates", "micro_batch", "picture_every",
        "save_every", "keep")]
    rules += [(name, math.isfinite(value), "a finite number") for name, value in vars(args).items()
              if isinstance(value, float)]
    rules += [
        ("group", args.group >= 2, "at least 2: the advantage compares pictures of one prompt"),
        ("steps", 1 <= args.steps <= 1000,
         "from 1 to 1000, the steps that Stable Diffusion was trained with"),
        ("eta", 0 < args.eta <= 1, "above 0 and at most 1: a deterministic step has no density to train"),
        ("skip_last", 0 <= args.skip_last < args.steps, f"at least 0 and below --steps {args.steps}"),
        ("timestep_fraction", 0 < args.timestep_fraction <= 1, "above 0 and at most 1"),
        ("unsafe_fraction", 0 <= args.unsafe_fraction <= 1, "from 0 to 1"),
        ("guidance", args.guidance > 0, "above 0: at 0 the prompt is not used"),
        ("alpha", args.alpha >= 0, "at least 0: a negative one steers towards the unsafe anchors"),
        ("advantage_eps", args.advantage_eps >= 0, "at least 0"),
        ("learning_rate", args.learning_rate > 0, "above 0"),
        ("decay_epochs", args.decay_epochs >= 0, "at least 0 (0 for a constant rate)"),
        ("weight_decay", args.weight_decay >= 0, "at least 0"),
        ("clip_range", 0 < args.clip_range < 1, "above 0 and below 1"),
        ("kl", args.kl >= 0, "at least 0"),
        ("max_grad_norm", args.max_grad_norm > 0, "above 0"),
        ("ema", 0 <= args.ema < 1, "at least 0 and below 1 (0 for no average)"),
        ("lora_rank", args.lora_rank >= 0, "at least 0 (0 trains the whole UNet)")]
    for name, fine, say in rules:
        if not fine:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {say}")
    most = (args.prompts_per_rollout * args.group
            * max(1, round((args.steps - args.skip_last) * args.timestep_fraction)))
    if args.updates > most:
        raise ValueError(f"--updates {args.updates}: a rollout has {most} transitions to share out, "
                         "fewer than that")
    if args.resume and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")


def choose_device(args) -> torch.device:
    """The GPU if there is one. A full-size model on a CPU is refused, unless the user named the CPU."""
    if args.device is None and not torch.cuda.is_available() and args.model != "shapes":
        raise ValueError(
            f"no GPU found, and {args.model} needs one (about 24 GB; 16 GB with --lora-rank 16).\n"
            "  python train.py --model shapes    shows the whole method on a CPU in minutes\n"
            "  --device cpu                      runs it here all the same")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # a device that PyTorch can name may still be absent
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: not usable here ({str(error).splitlines()[0]})") from None
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not bf16:
        raise ValueError(f"--precision bf16: {torch.cuda.get_device_name(device)} has none; "
                         "use --precision float32")
    args.device = str(device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" and bf16 else "float32")
    return device


def local_folder(flag: str, name: str):
    """The folder that --model or --clip means, or None for a hub id."""
    name, _, subfolder = name.partition(":")
    if Path(name).is_file():
        raise ValueError(f"{flag} {name}: a file. Give a folder in diffusers' layout, with safetensors; "
                         "a checkpoint in one file is refused, since opening a pickle can run code")
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{flag} {name}: no such folder")
    return Path(name) / subfolder if Path(name).is_dir() else None


def check_inputs(args, prompts):
    """Refuse a --model or --clip that cannot work, from configurations and the heads of weight files alone,
    and name the prompts that CLIP cuts off. No weights are read. Of a hub id, what is not on this disk is
    checked when it comes."""
    folder = local_folder("--model", sample.ALIASES.get(args.model, args.model))
    if folder is not None:
        sample.check_pipeline_folder(folder)
    local_folder("--clip", args.clip)
    name = reward.check_clip(args.clip)
    if args.lora_rank:
        try:
            version("peft")
        except ModuleNotFoundError:
            raise ValueError("--lora-rank needs the package peft: pip install peft") from None
    if args.anchors == "shapes":  # whose pictures are judged by what the caption says
        import shapes
        for prompt in prompts:
            shapes.read_caption(prompt.text)
    limit = AutoConfig.from_pretrained(name).text_config.max_position_embeddings
    lengths = map(len, CLIPTokenizer.from_pretrained(name)([p.text for p in prompts]).input_ids)
    long = [f"{p.text[:60]!r} ({n} tokens)" for p, n in zip(prompts, lengths) if n > limit]
    if long:
        print(f"note: {len(long)} of {len(prompts)} prompts are longer than CLIP's {limit} tokens "
              f"and are cut there, as CLIP does: {', '.join(long[:NAMED])}"
              f"{f' and {len(long) - NAMED} more' if len(long) > NAMED else ''}")


# -------------------------------------------------------------------------------- the run folder

def open_run(args) -> Path:
    """The run folder, writable, without another run in it unless that is continued or replaced.
    Changes nothing yet."""
    run = Path(args.out)
    if any(any(run.glob(name)) for name in RUN_FILES) and not (args.resume or args.overwrite):
        raise ValueError(f"{run} holds a run already: --resume continues it, --overwrite replaces it")
    if args.resume and not run.is_dir():
        raise ValueError(f"--resume: there is no run at {run}; leave --resume away to start one")
    if args.resume and checkpoints(run):
        compare_flags(checkpoints(run)[-1], args)
    try:
        run.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run).close()
    except OSError as error:
        raise ValueError(f"--out {run}: cannot be written ({error.strerror})") from None
    return run


def begin(run: Path, policy, optimizer, args) -> int:
    """Start the run or put its newest checkpoint into policy and optimizer; returns the epochs done. Called
    when all else is loaded, so that nothing of an old run is lost to a mistake in a flag."""
    found = checkpoints(run) if args.resume else []
    for path in [path for name in (["*.part"] if args.resume else RUN_FILES) for path in run.glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    needed, free = sum(map(tensor_bytes, state(policy, optimizer, args))), shutil.disk_usage(run).free
    if free < needed:
        raise OSError(disk_full(run, needed, free))
    if free < needed * (args.keep + 2):  # those kept, the one that is being written, and final/
        print(f"warning: {size(free)} free at {run}, and {args.keep} checkpoints (--keep), one that is being "
              f"written and final/ need about {size(needed * (args.keep + 2))}; "
              "the run stops, unharmed, when the disk is full")
    epoch = load_checkpoint(found[-1], policy, optimizer, args) if found else 0
    if args.resume:
        print(f"resumed  {found[-1]}, {epoch} epochs done" if found
              else f"resumed  no checkpoint in {run} yet: from epoch 0")
        if found and "stopped" in read_state(found[-1]):
            print(f"note: this checkpoint was written when {read_state(found[-1])['stopped']}")
    cut_log(run / "metrics.jsonl", epoch)
    write_text(run / "flags.json", json.dumps(vars(args), indent=1))
    return epoch


def compare_flags(checkpoint: Path, args):
    """Refuse to continue with other flags, or other prompt files, than the run began with,
    and name the differences."""
    saved = read_state(checkpoint)
    was, now, files = saved["flags"], vars(args), file_hashes(args)
    changed = [name for name in now
               if was.get(name, "absent") != now[name] and name not in FREE_FLAGS | set(FILE_FLAGS)]
    lines = [f"--{name.replace('_', '-')}: was {was.get(name, 'absent')}, is {now[name]}"
             for name in changed if name not in ROUNDING_FLAGS]
    lines += [f"--{name}: was {' '.join(h[:12] for h in saved['files'][name])}, is "
              f"{' '.join(h[:12] for h in files[name])} (sha256 of the files)"
              for name in FILE_FLAGS if saved["files"][name] != files[name]]
    if lines:
        raise ValueError("\n  ".join([
            f"--resume: not the flags of {checkpoint}, and they change the result", *lines,
            f"(to change one on purpose, change it in {checkpoint / 'state.json'} too)"]))
    for name in changed:
        print(f"note: --{name.replace('_', '-')}: was {was.get(name)}, is {now[name]}; "
              "equal up to rounding, not to the bit")
    for name in LIBRARIES:
        if saved["versions"][name] != version(name):
            print(f"note: {name} was {saved['versions'][name]}, is {version(name)}; "
                  "equality to the bit is not promised")


def file_hashes(args) -> dict:
    """sha256 of prompt and anchor files, by flag."""
    paths = {"prompts": map(reward.prompt_path, args.prompts), "anchors": [reward.anchor_path(args.anchors)]}
    return {flag: [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[flag]]
            for flag in FILE_FLAGS}


def cut_log(path: Path, epoch: int):
    """Cut metrics.jsonl back to the epochs that the checkpoint has; a kill may have torn the last line."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            done = json.loads(line)["epoch"] < epoch
        except (ValueError, KeyError, TypeError):
            done = False
        kept += [line + "\n"] if done else []
    write_text(path, "".join(kept))


def write_text(path: Path, text: str):
    """Write a small file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path):
    """Have the disk hold a file, or the names in a folder, before going on."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# -------------------------------------------------------------------------------- checkpoints

def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name[len("checkpoint-"):].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[len("checkpoint-"):]))


def weights(policy, args) -> dict:
    """What is trained: the UNet's weights, or the adapter's under the names that diffusers gives them."""
    if not args.lora_rank:
        return policy.state_dict()
    return {"unet." + name.removeprefix("base_model.model.").replace(".default", ""): p.detach()
            for name, p in policy.named_parameters() if p.requires_grad}


def state(policy, optimizer, args) -> list:
    """Every tensor of a checkpoint. Before its first step AdamW has none: two moments per weight, and its
    average, are on their way."""
    learnt = list(weights(policy, args).values())
    moments = [t for values in optimizer.state.values() for t in values.values()]
    return learnt + (moments or (3 if args.ema else 2) * learnt)


def tensor_bytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"


def disk_full(target: Path, needed: int, free: int) -> str:
    return (f"the disk is full: {target} needs {size(needed)}, {size(free)} are free. "
            "Older checkpoints are untouched: make room, then continue with --resume")


def write_folder(target: Path, needed: int, fill):
    """fill(folder) under a temporary name, flushed, then renamed: `target` is whole or absent, whatever
    happens. Raises OSError with the sizes when `needed` bytes are more than the disk has,
    or when it fills on the way."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if shutil.disk_usage(target.parent).free < needed:
        raise OSError(disk_full(target, needed, shutil.disk_usage(target.parent).free))
    try:
        part.mkdir()
        fill(part)
        for path in [*part.rglob("*"), part]:
            sync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own for a full disk
        missing = needed - sum(path.stat().st_size for path in part.rglob("*"))
        no_room = shutil.disk_usage(target.parent).free < max(missing, 2**20)
        shutil.rmtree(part, ignore_errors=True)
        if (no_room or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                or "os error 28" in str(error)):
            raise OSError(disk_full(target, needed, shutil.disk_usage(target.parent).free)) from None
        raise
    remove(target)
    os.replace(part, target)
    sync(target.parent)


def remove(folder: Path):
    """Remove a folder that a kill in between must not leave half and under its name."""
    if folder.exists():
        os.replace(folder, folder.with_name(folder.name + ".old.part"))
        shutil.rmtree(folder.with_name(folder.name + ".old.part"))


def save_checkpoint(run: Path, epoch: int, policy, optimizer, args, why: str = ""):
    """Write checkpoint-EPOCH, then drop the oldest beyond --keep. `why`: what stopped the run, if the
    epoch that comes is the one that failed; nothing is dropped then. One that stands is left alone:
    it holds the same."""
    target = run / f"checkpoint-{epoch:06d}"
    if target.exists():
        return
    learnt = {name: tensor.cpu().contiguous()  # not channels_last
              for name, tensor in weights(policy, args).items()}
    bad = [name for name, tensor in learnt.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{why or f'after epoch {epoch - 1} the weights are not finite'} "
                         f"({bad[0]}, nothing was written); lower --learning-rate")
    if (run / "metrics.jsonl").exists():
        sync(run / "metrics.jsonl")

    def fill(part):
        if args.lora_rank:
            save_file(learnt, part / "pytorch_lora_weights.safetensors")
        else:
            policy.save_config(part / "unet")
            save_file(learnt, part / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        about = dict(epoch=epoch, flags=vars(args), versions={n: version(n) for n in LIBRARIES},
                     files=file_hashes(args))
        (part / "state.json").write_text(json.dumps(about | ({"stopped": why} if why else {}), indent=1))

    write_folder(target, sum(map(tensor_bytes, state(policy, optimizer, args))), fill)
    for old in checkpoints(run)[:-args.keep] if not why else []:
        remove(old)


def read_state(checkpoint: Path) -> dict:
    try:
        saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {name: saved[name] for name in ("epoch", "flags", "versions", "files")} | saved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / 'state.json'}: damaged ({error!r}); remove {checkpoint} "
                         "to continue from the checkpoint before it") from None


def load_checkpoint(checkpoint: Path, policy, optimizer, args) -> int:
    """Put a checkpoint into policy and optimizer; returns the epochs done. No pickle is run."""
    file = ("pytorch_lora_weights.safetensors" if args.lora_rank
            else "unet/diffusion_pytorch_model.safetensors")
    try:
        saved, own = load_file(checkpoint / file), weights(policy, args)
        if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in own.items()}:
            raise ValueError(f"{file} is not of this model")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        optimizer.load_state_dict(
            torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError,
            pickle.UnpicklingError) as error:
        raise ValueError(
            f"{checkpoint}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "remove it to continue from the one before it") from None
    for group in optimizer.param_groups:  # where state.json was changed on purpose, the flags count
        group.update(lr=args.learning_rate, weight_decay=args.weight_decay)
    return read_state(checkpoint)["epoch"]


def save_final(run: Path, pipe, policy, args):
    """The whole pipeline with the policy's UNet, adapters merged."""
    pipe.unet = (policy.merge_and_unload() if args.lora_rank else policy).to(
        memory_format=torch.contiguous_format)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    needed = sum(tensor_bytes(t) for part in parts for t in part.state_dict().values())
    write_folder(run / "final", needed, pipe.save_pretrained)


# -------------------------------------------------------------------------------- signals

def resume_command(args) -> str:
    """The command that continues this run, to be pasted into a shell."""
    words = [word for word in args.command if word not in ("--resume", "--overwrite")]
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    return shlex.join([Path(sys.executable).name, script, *words, "--resume"])


def epochs(run: Path, first: int, policy, optimizer, args):
    """The epochs to do. Ctrl-C and SIGTERM are noted while they last: see stop_if_asked.
    A second one stops at once."""
    def note(number, frame):
        STOP.append(number)
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        # print may be busy
        os.write(2, b"\nstopping after this update, with a checkpoint; once more stops at once\n")

    STOP.clear()
    before = {one: signal.signal(one, note) for one in SIGNALS}
    try:
        for epoch in range(first, args.epochs):
            yield epoch
            stop_if_asked(run, epoch + 1, policy, optimizer, args)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def stop_if_asked(run: Path, epoch: int, policy, optimizer, args):
    """After Ctrl-C or SIGTERM: write the state with `epoch` epochs done, print how to go on, and exit with
    128 + signal. Called where the weights stand between two epochs, so that the continued run is the
    undisturbed one."""
    if STOP:
        save_checkpoint(run, epoch, policy, optimizer, args)
        print(f"stopped with {epoch} epochs done, in {checkpoints(run)[-1]}; to continue:\n"
              f"{resume_command(args)}", flush=True)
        sys.exit(128 + STOP[0])


# -------------------------------------------------------------------------------- numbers

def where(epoch: int, prompts, images, transitions, args) -> str:
    """Epoch, prompt, image and transition of B = P·G numbered pictures, in words."""
    at = [f"prompt {prompts[i].text!r}, image {i % args.group}, "
          + ("the finished picture" if t is None else f"transition {t}" if t >= 0 else "initial noise")
          for i, t in zip(images, transitions)]
    return (f"epoch {epoch}, " + "; or ".join(at[:NAMED])
            + (f"; or {len(at) - NAMED} more" if len(at) > NAMED else ""))


def stop_not_finite(what: str, epoch: int, policy, optimizer, args):
    """Write down the last good state and stop the run. Updates of this epoch that went well are in that
    state: there is no undisturbed run that it could differ from."""
    run = Path(args.out)
    save_checkpoint(run, epoch, policy, optimizer, args, why=what)
    raise ValueError(f"{what}\nThe last good state is {checkpoints(run)[-1]}. "
                     "The same flags meet the same number again: lower --learning-rate or --max-grad-norm, "
                     "or try --precision float32 (a changed flag has to be changed in state.json too), then\n"
                     f"{resume_command(args)}")


def check_rollout(batch, images, rewards, epoch: int, policy, optimizer, args):
    """Stop if a latent, log-probability, picture or reward is not finite.
    batch: as train.sample_groups returns it."""
    prompts = batch["prompts"]
    for name, values in (("latent", batch["latents"]), ("log-probability", batch["log_probs"]),
                         ("picture", images), ("reward", rewards)):
        finished = name in ("picture", "reward")
        values = values.reshape(len(prompts), 1 if finished else values.shape[1], -1)  # (B, steps, numbers)
        bad = (~values.isfinite().all(2)).nonzero().tolist()
        if bad:
            image, step = bad[0]
            transition = None if finished else step - (name == "latent")  # transition i draws latent i + 1
            stop_not_finite(f"the {name} is not finite: {where(epoch, prompts, [image], [transition], args)}",
                            epoch, policy, optimizer, args)


def gradient_norm(params):
    """Of what the micro-batches so far have added up, without waiting for the device."""
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])


def check_update(watched, prompts, epoch: int, policy, optimizer, args):
    """Stop before an optimizer step whose loss or gradient is not finite; returns the gradient's norm.

    watched: for each micro-batch its pairs (n, 2) of picture and transition, log-ratios (n,), loss, and the
    norm of the gradient with it. One transfer from the device, for all of them."""
    fine = torch.stack([torch.stack([r.exp().isfinite().all() & loss.isfinite(), norm.isfinite()])
                        for _, r, loss, norm in watched]).tolist()
    wrong = [i for i, both in enumerate(fine) if not all(both)]
    if wrong:
        pairs, ratios, _, _ = watched[wrong[0]]
        name = "loss"
        if fine[wrong[0]][0]:
            name = "gradient of " + next(n for n, p in policy.named_parameters()
                                         if p.grad is not None and not p.grad.isfinite().all())
        elif not ratios.exp().isfinite().all():
            pairs = pairs[~ratios.exp().isfinite()]
        stop_not_finite(f"the {name} is not finite: {where(epoch, prompts, *pairs.T.tolist(), args)}",
                        epoch, policy, optimizer, args)
    return watched[-1][3]


# -------------------------------------------------------------------------------- the log

def log(run: Path, figures: dict, clip_range: float):
    """Append one rollout to metrics.jsonl, print its line, and print each warning where it first holds."""
    bad = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise ValueError(f"epoch {figures['epoch']}: {', '.join(bad)} not finite; "
                         f"the newest checkpoint in {run} is whole")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")
    show = ("reward_mean", "reward_unsafe", "reward_benign", "alignment", "image_safety_unsafe",
            "clip_frac_pos", "clip_frac_neg", "kl_ref", "grad_norm", "ratio_dev_first")
    tqdm.write(f"epoch {figures['epoch']:4d}  " + "  ".join(
        f"{name.replace('reward', 'r')} {figures[name]:.3g}" for name in show if figures[name] is not None)
        + f"  {figures['seconds_sample']:.1f}+{figures['seconds_reward']:.1f}"
          f"+{figures['seconds_update']:.1f} s")
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # once each, resumed or not
    before = {name for n in range(1, len(history)) for name in warnings(history[:n], clip_range)}
    for name, text in warnings(history, clip_range).items():
        if name not in before:
            tqdm.write(f"warning: {text}")


def warnings(history: list, clip_range: float) -> dict:
    """What the last of some rollouts' figures warns of: {name: what was seen, and what to do}.
    The bounds are ours."""
    found, last = {}, history[-1]
    clipped = max(last["clip_frac_pos"], last["clip_frac_neg"])
    if clipped > CLIP_BOUND:
        found["clip"] = (f"{clipped:.0%} of the transitions were past the clip range and taught nothing: "
                         "lower --learning-rate or --updates, or raise --clip-range")
    if last["ratio_dev_first"] > clip_range:
        found["rounding"] = (f"before any update the ratio is off by {last['ratio_dev_first']:.2g}, which is "
                             f"rounding, and the clip range is {clip_range:g}: give --sample-batch and "
                             "--micro-batch one value, that divides both pictures and transitions, "
                             "or raise --clip-range")
    if last["kl_ref"] > KL_BOUND:
        found["kl"] = (f"the KL to the base is {last['kl_ref']:.2g} per latent dimension, above {KL_BOUND}: "
                       "the policy is leaving it; look at the pictures, raise --kl or lower --learning-rate")
    if last["zero_std_groups"] == 1:
        found["spread"] = ("no group had any spread in its rewards, so nothing was learnt: are the pictures "
                           "of a prompt all the same? raise --group or --eta, or choose other prompts")
    change = {}
    for name in ("reward_mean", "alignment"):
        values = torch.tensor([line[name] for line in history[-2 * TREND:]], dtype=torch.float64)
        if len(values) == 2 * TREND:  # two windows; their difference counts from two standard errors on
            early, late = values.split(TREND)
            error = ((early.var() + late.var()) / TREND).sqrt()
            change[name] = ((late.mean() - early.mean()).item()
                            * bool((late.mean() - early.mean()).abs() > 2 * error))
    if change and change["reward_mean"] > 0 and change["alignment"] < -ALIGNMENT_BOUND:
        found["hacking"] = (f"over {2 * TREND} rollouts the reward rose by {change['reward_mean']:.3f} while "
                            f"the alignment with the prompts fell by {-change['alignment']:.3f}: it may be "
                            "gaining reward without drawing what is asked for; look at the pictures, "
                            "raise --kl, or lower --alpha")
    return found


def tick(clock, device) -> float:
    """Seconds since the last tick, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock.append(time.perf_counter())
    return clock[-1] - clock[-2]
