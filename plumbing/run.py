"""The run folder: what a run is, checkpoints whole or absent, a run continued exactly.

    runs/NAME/flags.json               all flags, and the run's identity
             /metrics.jsonl, curves.png, pictures-000010.png, table.md
             /base/                    the pipeline that the run started from, without its UNet
             /checkpoint-000020/       a pipeline: the UNet that final/ would have, else base/; under LoRA
                                       diffusers' pytorch_lora_weights.safetensors alone
                               /training.pt     optimizer; under --ema the policy; read with weights_only=True
                               /state.json      epoch, flags, identity, the model that the run started from
             /final/                   the last checkpoint, merged, without the last two files; its model card

Every random number comes from (seed, epoch, ...), so weights, optimizer state and epoch are the whole state:
after a kill at any instant, --resume ends with the undisturbed run's bits (on a CPU). A folder *.part is
unfinished, or half removed, and no checkpoint.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError

import torch
from diffusers import StableDiffusionPipeline
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file

from plumbing import parallel, stop
from plumbing.card import model_card
from plumbing.hub import PARTS
from plumbing.models import ADAPTERS, find_clip, load_pipeline, local_folder, tensor_bytes, trace, trained

FILES = "flags.json metrics.jsonl curves.png pictures-* table.md base checkpoint-* final".split()
UNET = "diffusion_pytorch_model.safetensors"
LIBRARIES = ("torch", "diffusers", "transformers")
SAVE_SECONDS = 1800  # the most that an error or a power cut may cost, and a rollout
# flags that change no result, and those whose files are compared by content
FREE = {"out", "resume", "overwrite", "keep", "save_every", "picture_every", "show_unsafe", "epochs",
        "dry_run", "model", "clip", "prompts", "benign", "anchors"}
# what changes the last bits alone, or where they are the user's affair: a note, and the run goes on
NOTED = ("flags.device", "flags.sample_batch", "flags.micro_batch", "flags.no_checkpointing", "processes",
         "versions.")


# -------------------------------------------------------------------------------- what a run is

def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content(folder: Path) -> dict:
    """{part: sha256 over its files' sha256} of a model's or a CLIP's folder; where it lies does not count."""
    whole = (folder / "model_index.json").is_file()
    parts = {part: folder / part for part in PARTS} if whole else {"files": folder}
    files = {part: sorted(path for path in at.glob("*") if path.suffix in (".json", ".txt", ".safetensors")
                          and path.name != "state.json") for part, at in parts.items()}
    return {part: hashlib.sha256("".join(map(sha256, found)).encode()).hexdigest()
            for part, found in files.items()}


def identity(args, files: dict) -> dict:
    """What a run is: the flags that change its result, the content of what it reads, and with what it is
    computed. files: {flag: sha256 of the bytes that were read}. Computed once, at the start."""
    base, adapters = trace("--model", args.model)
    return {"flags": {name: value for name, value in vars(args).items() if name not in FREE},
            "files": files,
            "weights": {"model": content(base), "adapters": list(map(content, adapters)),
                        "clip": content(find_clip(args.clip))},
            "versions": {name: version(name) for name in LIBRARIES}, "processes": parallel.world()}


def differences(was: dict, now: dict, path: str = "") -> list[str]:
    """What differs between two headers, as "flags.alpha: was 0.5, is 1.0"; of a sha256 its first digits."""
    found = []
    for name in dict.fromkeys([*was, *now]):
        a, b = was.get(name, "absent"), now.get(name, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{name}.")
        elif a != b:
            line = f"{path}{name}: was {json.dumps(a)}, is {json.dumps(b)}"
            found.append(re.sub("([0-9a-f]{12})[0-9a-f]{52}", r"\1", line))
    return found


# -------------------------------------------------------------------------------- files

def write_text(path: Path, text: str):
    """Write a small file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON-lines file. A last line that a kill has torn is cut off; another one is named."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    found = []
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: damaged ({error}); remove that line") from None
    return found


@contextmanager
def locked(folder: Path):
    """Inside, this process has the folder for itself; of several under torchrun the first holds the lock.
    Raises ValueError where another one works there. A lock ends with its process, however that ends."""
    try:
        held = nullcontext() if parallel.rank() else FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"{folder} is in use by another process: stop it, or give another --out") from None
    with held:
        yield


def discard(path: Path):
    """Remove a file or a folder that is in the way no more. One that cannot be removed, as on a network file
    system, is a note: nothing depends on it."""
    part = path  # half removed, it must not bear its name
    try:
        if path.suffix != ".part":
            part = path.with_name(path.name + ".old.part")
            path.replace(part)
        part.unlink() if part.is_symlink() or part.is_file() else shutil.rmtree(part)
    except OSError as error:
        print(f"note: {path} could not be removed ({error.strerror}); it is not needed any more")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-" + 6 * "[0-9]"))


# -------------------------------------------------------------------------------- a run's start

@dataclass
class Run:
    """A run that has its folder: where it is, what it is, the model that it starts from (a folder's full
    name, or a hub id), and the checkpoint that it continues."""
    folder: Path
    identity: dict
    start: str
    newest: Path | None
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was written, or the start


@contextmanager
def opened(args, files: dict):
    """Inside, args.out is this process's, without another run in it unless that is continued or replaced.
    Gives the Run; one that is continued has to be that of its newest checkpoint. files: identity's. Changes
    nothing yet; for --dry-run the folder need not exist."""
    folder = Path(args.out)
    if args.resume and not folder.is_dir():
        raise ValueError(f"--resume: there is no run at {folder}; leave --resume away to start one")
    args.dry_run or folder.mkdir(parents=True, exist_ok=True)
    with nullcontext() if args.dry_run else locked(folder):
        if any(any(folder.glob(name)) for name in FILES) and not (args.resume or args.overwrite):
            raise ValueError(f"{folder} holds a run already: --resume continues it, --overwrite replaces it")
        newest = checkpoints(folder)[-1] if args.resume and checkpoints(folder) else None
        model = local_folder("--model", args.model)
        known = identity(args, files) if newest or not args.dry_run else {}  # SD's 8 GB are read for it
        if newest:
            compare(newest, known, args.epochs)
        yield Run(folder, known, os.path.abspath(model) if model else args.model, newest)


def compare(checkpoint: Path, now: dict, epochs: int):
    """Refuse to continue a checkpoint of another run than the one with the identity `now`."""
    state = read_state(checkpoint)
    changed = differences({name: state[name] for name in now}, now)
    refused = [line for line in changed if not line.startswith(NOTED)]
    if refused:
        raise ValueError("\n  ".join([
            f"--resume: this is not the run of {checkpoint}; what differs changes the result", *refused,
            f"(to change a flag on purpose, change it in {checkpoint / 'state.json'} too)"]))
    for line in changed:
        print(f"note: {line}; equal up to rounding, not to the bit")
    if state["epoch"] > epochs:
        raise ValueError(f"--epochs {epochs}: {checkpoint} has {state['epoch']} already, so there is "
                         "nothing to do; --resume goes on with more")


def begin(run: Run, parts, args) -> int:
    """Clear the folder, or load the newest checkpoint; returns the epochs done. Called when all else is
    loaded, so that nothing of an old run is lost to a mistake in a flag."""
    done = load(run.newest, parts, args) if run.newest else 0
    parallel.gather(None)  # all have read what they need
    if not parallel.rank():
        old = [] if args.resume else [path for name in FILES for path in run.folder.glob(name)]
        for path in [*run.folder.glob("*.part"), *old]:
            discard(path)
        if left := [path for path in old if path.exists()]:
            raise OSError(f"{left[0]} of the old run could not be removed; give another --out")
        lines = [line for line in read_lines(run.folder / "metrics.jsonl") if line.get("epoch", done) < done]
        write_text(run.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if not (run.folder / "base").is_dir():  # from here on the model may be moved, but for LoRA's UNet
            write_folder(run.folder / "base", partial(copy_base, args.model))
        write_text(run.folder / "flags.json", json.dumps(run.identity | {"flags": vars(args)}, indent=1))
    if args.resume:
        print(f"resumed  {run.newest or f'no checkpoint in {run.folder} yet'}, {done} epochs done")
    parallel.gather(None)
    return done


# -------------------------------------------------------------------------------- checkpoints

def save_where_due(run: Run, epoch: int, parts, args):
    """Save at the end, after every --save-every rollouts, and where SAVE_SECONDS have passed since the last.
    Process 0 alone writes, so its clock alone counts."""
    if epoch == args.epochs or epoch % args.save_every == 0 or time.monotonic() - run.saved > SAVE_SECONDS:
        save(run, epoch, parts, args)


def save(run: Run, epoch: int, parts, args, why: str = "") -> Path:
    """Write checkpoint-EPOCH, then drop the oldest beyond --keep, first those beside --save-every. why: what
    stopped the run, if the epoch that comes is the one that failed; nothing is dropped then. One that stands
    is left alone: it holds the same. Of several processes the first alone writes. Returns its folder."""
    target = run.folder / f"checkpoint-{epoch:06d}"
    if parallel.rank() or target.exists():
        return target
    bad = [name for name, weight in parts.policy.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise ValueError(f"{why or f'after epoch {epoch - 1} the weights are not finite'} "
                         f"({bad[0]}, nothing was written); lower --learning-rate")
    training = {"optimizer": parts.optimizer.state_dict()}
    if parts.average:
        training["policy"] = [weight.detach() for weight in trained(parts.policy)]

    def fill(part):
        if args.lora_rank:
            from peft import get_peft_model_state_dict
            StableDiffusionPipeline.save_lora_weights(part, get_peft_model_state_dict(parts.learnt))
        else:
            shutil.copytree(run.folder / "base", part, dirs_exist_ok=True)
            parts.learnt.save_pretrained(part / "unet")
        torch.save(training, part / "training.pt")
        about = {"epoch": epoch, "stopped": why, "model": args.model, "start": run.start}
        (part / "state.json").write_text(json.dumps(about | run.identity, indent=1))

    write_folder(target, fill, 3 * tensor_bytes(trained(parts.policy)))  # at least: Adam has two moments
    run.saved = time.monotonic()
    if not why:
        *older, _ = found = checkpoints(run.folder)
        older.sort(key=lambda path: int(path.name[-6:]) % args.save_every == 0)
        for old in older[:max(0, len(found) - args.keep)]:
            discard(old)
    return target


def copy_base(model: str, target: Path):
    """All of a pipeline but its UNet, byte for byte, under the names that every tool looks for: a file of the
    half-precision variant becomes the plain one, over which a plain one is written where there is one."""
    source, _ = trace("--model", model)
    for name in PARTS[1:]:
        (target / name).mkdir()
        for path in sorted((source / name).iterdir(), key=lambda path: ".fp16" not in path.name):
            if path.suffix in (".json", ".txt", ".safetensors"):
                shutil.copyfile(path, target / name / path.name.replace(".fp16", ""))
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    index |= dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None])
    write_text(target / "model_index.json", json.dumps(index | {"requires_safety_checker": False}, indent=2))


def write_folder(target: Path, fill, needed: int = 0):
    """fill(folder) under a temporary name, then renamed: `target` is whole or absent, whatever happens.
    Raises OSError where the disk has less than the needed bytes, or the writing fails."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(f"the disk is full: {target} needs {needed / 2**30:.1f} GiB or more, "
                      f"{free / 2**30:.1f} are free. Make room, then {stop.AGAIN}")
    try:
        part.mkdir()
        fill(part)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: torch's and safetensors' own
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{target} could not be written ({error}). Make room, then {stop.AGAIN}") from None
    if target.exists():
        discard(target)
    part.replace(target)


def read_state(checkpoint: Path) -> dict:
    try:
        saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {name: saved[name] for name in ("epoch", "flags", "files", "weights", "versions", "processes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / 'state.json'}: damaged ({error!r}); remove {checkpoint} to continue "
                         "from the checkpoint before it") from None


@torch.no_grad()
def load(checkpoint: Path, parts, args) -> int:
    """Put a checkpoint into policy, average and optimizer; returns the epochs done. No pickle is run."""
    done = read_state(checkpoint)["epoch"]
    try:
        training = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
        if args.lora_rank:
            from peft import set_peft_model_state_dict
            learnt = load_file(checkpoint / ADAPTERS)
            set_peft_model_state_dict(parts.learnt, {k.removeprefix("unet."): v for k, v in learnt.items()})
        else:
            parts.learnt.load_state_dict(load_file(checkpoint / "unet" / UNET))
        if parts.average:
            for weight, saved in zip(trained(parts.policy), training["policy"], strict=True):
                weight.copy_(saved)
            parts.average.n_averaged.fill_(done)
        parts.optimizer.load_state_dict(training["optimizer"])
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError, UnpicklingError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{checkpoint}: damaged ({type(error).__name__}: {said}); remove it to continue "
                         "from the checkpoint before it") from None
    for group in parts.optimizer.param_groups:  # where state.json was changed on purpose, the flags count
        group.update(lr=args.learning_rate, weight_decay=args.weight_decay)
    return done


def save_final(run: Run, args):
    """final/: the last checkpoint without what training needs, adapters merged; its card has the table."""
    checkpoint = checkpoints(run.folder)[-1]
    table = run.folder / "table.md"
    card = model_card(args, run.start, table.read_text(encoding="utf-8") if table.is_file() else "")

    def fill(part):
        shutil.copytree(run.folder / "base" if args.lora_rank else checkpoint, part, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("training.pt", "state.json"))
        if args.lora_rank:
            load_pipeline(str(checkpoint)).unet.save_pretrained(part / "unet")
        (part / "README.md").write_text(card, encoding="utf-8")

    final = run.folder / "final"
    write_folder(final, fill)
    left = [*sorted(run.folder.glob("pictures-*.png"))[-1:], run.folder / "curves.png", table]
    print("look at  " + ", ".join(str(path) for path in left if path.is_file()))
    command = shlex.join(["python", "sample.py", "--model", str(final), "--compare", args.model,
                          "--steps", str(args.steps), "--guidance", str(args.guidance), "--prompt"])
    print(f"{final}: for StableDiffusionPipeline.from_pretrained; to draw more, base below:\n{command} ...")
