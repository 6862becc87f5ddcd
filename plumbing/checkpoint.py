"""The run folder: checkpoints whole or absent, a run continued exactly.

    runs/NAME/flags.json                    all flags of the run, as last started
             /metrics.jsonl                 one object per rollout
             /curves.png                    its figures, with matplotlib
             /pictures-000010.png           base above policy
             /checkpoint-000020/unet/       the UNet in diffusers' layout; under --lora-rank in its place
                               /pytorch_lora_weights.safetensors, which pipe.load_lora_weights(folder) reads
                               /optimizer.pt    read with weights_only=True, so that no pickle runs
                               /state.json      epoch, flags, versions, sha256 of prompt and anchor files
             /final/                        a pipeline that StableDiffusionPipeline.from_pretrained opens, and
                                            its model card
             /table.md                      before and after
             /replaced/                     what --overwrite replaces, until there is a checkpoint
             /.lock                         who works here

Every random number of a run comes from (seed, epoch, ...), so weights, optimizer state and epoch are the
whole state: after a kill at any instant, --resume ends with the bits of the undisturbed run (on a CPU:
tests/test_runs.py). A folder that ends in .part is unfinished, or half removed, and is never read.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plumbing import lock, parallel, stop
from plumbing.card import model_card
from plumbing.models import WEIGHTS, add_adapters, load_pipeline, put_weights, weights
from plumbing.names import absolute, checkpoints, reading

RUN_FILES = ("flags.json", "metrics.jsonl", "curves.png", "table.md", "pictures-*.png", "checkpoint-*",
             "final", "*.part")
ASIDE, MOVING = "replaced", "replaced.moving"  # the run that --overwrite replaces: whole, and on its way
LIBRARIES = ("torch", "diffusers", "transformers")
FREE_FLAGS = {"out", "resume", "overwrite", "keep", "save_every", "picture_every", "show_unsafe", "epochs"}
FILE_FLAGS = ("prompts", "benign", "anchors")                               # compared by content, not by name
ROUNDING_FLAGS = {"device", "sample_batch", "micro_batch", "no_checkpointing"}  # may change the last bits


# -------------------------------------------------------------------------------- the run folder

def open_run(args) -> Path:
    """The run folder, writable, locked, without another run in it unless that is continued or replaced.
    Changes nothing yet, but that a run is put back which a start with --overwrite had set aside when it was
    killed."""
    run = Path(args.out)
    if args.resume and not run.is_dir():
        raise ValueError(f"--resume: there is no run at {run}; leave --resume away to start one")
    try:
        run.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run).close()
    except OSError as error:
        raise ValueError(f"--out {run}: cannot be written ({error.strerror})") from None
    if not parallel.rank():
        lock.hold(run)
        if any((run / name).exists() for name in (ASIDE, MOVING)):
            put_back(run)
    parallel.gather(None)
    if any(any(run.glob(name)) for name in RUN_FILES) and not (args.resume or args.overwrite):
        raise ValueError(f"{run} holds a run already: --resume continues it, --overwrite replaces it")
    if args.resume and checkpoints(run):
        newest = checkpoints(run)[-1]
        compare_flags(newest, args)
        read_log(run / "metrics.jsonl")
        if (done := read_state(newest)["epoch"]) > args.epochs:
            raise ValueError(f"--epochs {args.epochs}: {newest} has {done} already, so there is nothing to "
                             "do; --resume goes on with more")
    return run


def begin(run: Path, policy, optimizer, args) -> int:
    """Start the run or put its newest checkpoint into policy and optimizer; returns the epochs done. Called
    when all else is loaded, so that nothing of an old run is lost to a mistake in a flag. Of several
    processes the first alone changes the folder, after all have looked at it and before any goes on."""
    found = checkpoints(run) if args.resume else []
    parallel.gather(None)
    if not parallel.rank():
        clean(run, policy, optimizer, args)
    epoch = load(found[-1], policy, optimizer, args) if found else 0
    if args.resume:
        print(f"resumed  {found[-1]}, {epoch} epochs done" if found
              else f"resumed  no checkpoint in {run} yet: from epoch 0")
        if found and "stopped" in read_state(found[-1]):
            print(f"note: this checkpoint was written when {read_state(found[-1])['stopped']}")
    if not parallel.rank():
        cut_log(run / "metrics.jsonl", epoch)
        write_text(run / "flags.json", json.dumps(vars(args), indent=1))
    parallel.gather(None)
    return epoch


def clean(run: Path, policy, optimizer, args):
    """Remove what is unfinished in the run folder, look at the space that is left, and set aside the run that
    is replaced, until the new one has a checkpoint."""
    for path in list(run.glob("*.part")):
        discard(path)
    needed, free = sum(map(tensor_bytes, state(policy, optimizer, args))), shutil.disk_usage(run).free
    if free < needed:
        raise OSError(disk_full(run, needed, free))
    if free < needed * (args.keep + 2):  # those kept, the one that is being written, and final/
        print(f"warning: {size(free)} free at {run}, and {args.keep} checkpoints (--keep), one that is being "
              f"written and final/ need about {size(needed * (args.keep + 2))}; "
              "the run stops, unharmed, when the disk is full")
    if not args.resume:
        set_aside(run)


def run_files(run: Path) -> list[Path]:
    return [path for name in RUN_FILES for path in run.glob(name)]


def set_aside(run: Path):
    """Move a run that is replaced into ASIDE. Until all of it is there the folder bears another name, so that
    a kill in between leaves no doubt about whose the files beside it are."""
    if run_files(run):
        (run / MOVING).mkdir()
        for path in run_files(run):
            os.replace(path, run / MOVING / path.name)
        os.replace(run / MOVING, run / ASIDE)


def put_back(run: Path):
    """Undo set_aside, unless the new run has a checkpoint: then the old one goes."""
    if (run / ASIDE).exists():
        if any(int(path.name[len("checkpoint-"):]) for path in checkpoints(run)):
            return discard(run / ASIDE)
        for path in run_files(run):
            discard(path)
        os.replace(run / ASIDE, run / MOVING)
    for path in list((run / MOVING).iterdir()):
        os.replace(path, run / path.name)
    (run / MOVING).rmdir()
    print(f"note: the run that stood in {run} is put back; the one that was to replace it had no checkpoint")


@contextmanager
def replacing(run: Path):
    """Inside, whatever ends a new run before its first checkpoint puts back the one that it replaces."""
    try:
        yield
    except BaseException as reason:
        if parallel.rank() or not (run / ASIDE).exists():
            raise
        put_back(run)
        if isinstance(reason, stop.Asked):
            parallel.gather(None)  # as stop.ending does
            raise SystemExit(128 + stop.RECEIVED[0]) from None
        if isinstance(reason, stop.ENDINGS):
            raise ValueError(f"{reason}; lower --learning-rate, or try --precision float32") from None
        raise


def discard(path: Path):
    """Remove a file, a folder, or a link to either."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def compare_flags(checkpoint: Path, args):
    """Refuse to continue with other flags, or other prompt files, than the run began with,
    and name the differences."""
    saved = read_state(checkpoint)
    was, now, files = saved["flags"], vars(args), file_hashes(args)
    changed = [name for name in now
               if was.get(name, "absent") != now[name] and name not in FREE_FLAGS | set(FILE_FLAGS)]
    lines = [f"--{name.replace('_', '-')}: was {was.get(name, 'absent')}, is {now[name]}"
             for name in changed if name not in ROUNDING_FLAGS]
    short = lambda hashes: " ".join(one[:12] for one in hashes) or "none"
    lines += [f"--{name}: was {short(saved['files'][name])}, is {short(files[name])} (sha256 of the files)"
              for name in FILE_FLAGS if saved["files"].get(name) != files[name]]
    if lines:
        raise ValueError("\n  ".join([
            f"--resume: not the flags of {checkpoint}, and they change the result", *lines,
            f"(to change one on purpose, change it in {checkpoint / 'state.json'} too)"]))
    for name in changed:
        print(f"note: --{name.replace('_', '-')}: was {was.get(name)}, is {now[name]}; "
              "equal up to rounding, not to the bit")
    if saved.get("processes", 1) != parallel.world():
        print(f"note: {saved.get('processes', 1)} processes wrote it, and there are {parallel.world()} now; "
              "equal up to rounding, not to the bit")
    for name in LIBRARIES:
        if saved["versions"][name] != version(name):
            print(f"note: {name} was {saved['versions'][name]}, is {version(name)}; "
                  "equality to the bit is not promised")
    if (was := saved.get("threads", torch.get_num_threads())) != torch.get_num_threads():
        print(f"note: the threads were {was}, are {torch.get_num_threads()} (OMP_NUM_THREADS); "
              "equality to the bit is not promised")


def file_hashes(args) -> dict:
    """sha256 of prompt and anchor files, by flag."""
    benign = [args.benign] if args.benign else []
    paths = {"prompts": args.prompts, "benign": benign, "anchors": [args.anchors]}
    return {flag: [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths[flag]]
            for flag in FILE_FLAGS}


def cut_log(path: Path, epoch: int):
    """Cut metrics.jsonl back to the epochs that the checkpoint has; a kill may have torn the last line."""
    write_text(path, "".join(line + "\n" for line, figures in read_log(path) if figures["epoch"] < epoch))


def read_log(path: Path) -> list[tuple[str, dict]]:
    """The lines of metrics.jsonl and what they hold. A last line that a kill has torn is left out; any other
    that cannot be read is named."""
    lines, found = path.read_bytes().split(b"\n") if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode()
            figures = json.loads(text) if line else None
            if line and (type(figures["epoch"]) is not int or not all(
                    value is None or type(value) in (int, float) for value in figures.values())):
                raise ValueError("figures are numbers or null")
            found += [(text, figures)] if line else []
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: damaged ({error!r}); remove that line") from None
    return found


def write_text(path: Path, text: str):
    """Write a small file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path):
    """Have the disk hold a file, or the names in a folder, before going on."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder; its file system writes names down by itself
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems have no fsync of a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------- checkpoints

def state(policy, optimizer, args) -> list:
    """Every tensor of a checkpoint. Before its first step AdamW has none: two moments per weight, and its
    average, are on their way."""
    learnt = list(weights(policy, args.lora_rank).values())
    moments = [t for values in optimizer.state.values() for t in values.values()]
    if not moments:
        moments = 3 * learnt if args.ema else 2 * learnt
    return learnt + moments


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
    if folder.exists() or folder.is_symlink():
        old = folder.with_name(folder.name + ".old.part")
        discard(old)
        os.replace(folder, old)
        discard(old)


def save(run: Path, epoch: int, policy, optimizer, args, why: str = "") -> Path:
    """Write checkpoint-EPOCH, then drop the oldest beyond --keep. `why`: what stopped the run, if the
    epoch that comes is the one that failed; nothing is dropped then. One that stands is left alone:
    it holds the same. Of several processes the first alone writes. Returns its folder."""
    target = run / f"checkpoint-{epoch:06d}"
    if parallel.rank() or target.exists():
        return target
    learnt = {name: tensor.cpu().contiguous()  # not channels_last
              for name, tensor in weights(policy, args.lora_rank).items()}
    bad = [name for name, tensor in learnt.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(f"{why or f'after epoch {epoch - 1} the weights are not finite'} "
                         f"({bad[0]}, nothing was written); lower --learning-rate")
    if (run / "metrics.jsonl").exists():
        sync(run / "metrics.jsonl")

    def fill(part):
        if not args.lora_rank:
            policy.save_config(part / "unet")
        save_file(learnt, part / WEIGHTS[bool(args.lora_rank)], {"format": "pt"})
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        about = dict(epoch=epoch, flags=vars(args), start=absolute(args.model), files=file_hashes(args),
                     versions={n: version(n) for n in LIBRARIES}, processes=parallel.world(),
                     threads=torch.get_num_threads())
        (part / "state.json").write_text(json.dumps(about | ({"stopped": why} if why else {}), indent=1))

    write_folder(target, sum(map(tensor_bytes, state(policy, optimizer, args))), fill)
    if epoch:
        discard(run / ASIDE)  # the run that this one replaces
    if not why:
        for old in checkpoints(run)[:-args.keep]:
            remove(old)
    return target


def read_state(checkpoint: Path) -> dict:
    try:
        saved = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        hashes = [one for name in FILE_FLAGS for one in saved["files"][name]]
        texts = [*hashes, *(saved["versions"][name] for name in LIBRARIES), saved.get("stopped", "")]
        if type(saved["epoch"]) is not int or saved["epoch"] < 0 or not isinstance(saved["flags"], dict):
            raise ValueError("epoch and flags are not a number and an object")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("versions and files are not text")
        return saved
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{checkpoint / 'state.json'}: damaged ({error!r}); remove {checkpoint} "
                         "to continue from the checkpoint before it") from None


def load(checkpoint: Path, policy, optimizer, args) -> int:
    """Put a checkpoint into policy and optimizer; returns the epochs done. No pickle is run."""
    with reading(checkpoint, "; remove it to continue from the one before it"):
        put_weights(policy, load_file(checkpoint / WEIGHTS[bool(args.lora_rank)]), args.lora_rank)
        optimizer.load_state_dict(
            torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
    for group in optimizer.param_groups:  # where state.json was changed on purpose, the flags count
        group.update(lr=args.learning_rate, weight_decay=args.weight_decay)
    return read_state(checkpoint)["epoch"]


def save_final(run: Path, policy, args):
    """The pipeline that --model names, loaded anew, since frozen parts may have been rounded to the compute
    type, with the policy's UNet in float32, adapters merged; and its model card, with the run's table."""
    pipe = load_pipeline(args.model)
    if args.lora_rank:
        pipe.unet = add_adapters(pipe.unet, args.lora_rank)
    put_weights(pipe.unet, weights(policy, args.lora_rank), args.lora_rank)
    if args.lora_rank:
        pipe.unet = pipe.unet.merge_and_unload()
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    needed = sum(tensor_bytes(t) for part in parts for t in part.state_dict().values())
    card = model_card(args, (run / "table.md").read_text(encoding="utf-8"))

    def fill(part):
        pipe.save_pretrained(part)
        (part / "README.md").write_text(card, encoding="utf-8")

    write_folder(run / "final", needed, fill)
