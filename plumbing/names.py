"""What a --model names, found before any weights are read: a pipeline's folder, a hub id, NAME:SUBFOLDER of
either, or a checkpoint of a run, whose UNet or adapters go onto the pipeline that its state.json names.

Checkpoints are written whole and under a name of their own, so they can be read while their run goes on; what
--keep removes in that moment is said to be gone.
"""

import json
import os
import pickle
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open

AVERAGE = "average"  # CHECKPOINT:average, the averaged weights of a run with --ema
LISTED = 5           # checkpoints named in a message


def split_name(name: str) -> tuple[str, str]:
    """NAME and SUBFOLDER of NAME:SUBFOLDER; a folder's own name may hold colons."""
    whole, _, subfolder = name.rpartition(":")
    return (name, "") if not whole or Path(name).is_dir() else (whole, subfolder)


def local_folder(flag: str, name: str) -> Path | None:
    """The folder that a flag's FOLDER or FOLDER:SUBFOLDER means, or None for a hub id. Raises ValueError for
    a file, for a path where nothing is, and for what a run has not finished writing."""
    name, subfolder = split_name(name)
    if Path(name).is_file():
        raise ValueError(f"{flag} {name}: a file. Give a folder in diffusers' layout, with safetensors; "
                         "a checkpoint in one file is refused, since opening a pickle can run code")
    there, has = Path(name).is_dir(), offers(Path(name).parent)
    if not there and (has or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{flag} {name}: no such folder{has}")
    if there and Path(name).suffix == ".part" and Path(name).name.startswith(("checkpoint-", "final")):
        raise ValueError(f"{flag} {name}: not finished, or half removed{has}")
    return Path(name) / subfolder if there else None


def absolute(model: str) -> str:
    """A folder's name, whatever the current one is; a hub id stays what it is."""
    return os.path.abspath(model) if Path(split_name(model)[0]).is_dir() else model


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name[len("checkpoint-"):].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[len("checkpoint-"):]))


def is_checkpoint(folder: Path) -> bool:
    """Whether a run has written it, whatever its name is now; damaged ones are meant, too."""
    return (not (folder / "model_index.json").is_file()
            and any((folder / file).is_file() for file in ("state.json", "optimizer.pt")))


def offers(run: Path) -> str:
    """What a run has that can be given as a model, in words; "" where no run is."""
    found = checkpoints(run)
    has = [path.name for path in [run / "final", *found[-LISTED:]] if path.is_dir()]
    if not found and not (run / "metrics.jsonl").is_file():
        return ""
    return f"; {run} has {', '.join(has) or 'no checkpoint yet'}"


def read_json(path: Path) -> dict:
    """The object in a configuration file. Raises ValueError that names the file, or OSError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object but a {type(found).__name__}")
    return found


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


@contextmanager
def reading(checkpoint: Path, hint: str = ""):
    """Whatever is wrong with a checkpoint's files is one line; so is that --keep has removed it meanwhile."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, SafetensorError,
            pickle.UnpicklingError) as error:
        if not checkpoint.is_dir():
            raise ValueError(f"{checkpoint}: its run has removed it meanwhile (--keep)"
                             + offers(checkpoint.parent)) from None
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{checkpoint}: cannot be read ({type(error).__name__}: {said}){hint}") from None


def trace(flag: str, model: str) -> tuple[str, list[tuple[Path, int, bool]]]:
    """What a model is made of: the pipeline that it starts from, and the checkpoints whose weights go into
    that pipeline's UNet one after another: (folder, rank of its adapters or 0, whether its average is meant).
    """
    chain, name = [], model
    while folder := local_folder(flag, name):
        part = not folder.exists() and is_checkpoint(folder.parent) and folder.name
        folder = folder.parent if part else folder
        if not is_checkpoint(folder):
            break
        if part and part != AVERAGE:
            raise ValueError(f"{flag} {name}: a checkpoint has its :{AVERAGE}, and no {part}")
        if any(folder.resolve() == other.resolve() for other, _, _ in chain):
            raise ValueError(f"{flag} {model}: a circle, {folder} starts from itself by the model in its "
                             "state.json")
        with reading(folder):
            state = read_json(folder / "state.json")
            rank, ema, given = (kind(state["flags"][key]) for key, kind in (
                ("lora_rank", int), ("ema", float), ("model", str)))
            check_weights(folder if rank else folder / "unet")
        if part and not ema:
            raise ValueError(f"{flag} {name}: its run kept no average (--ema); leave :{AVERAGE} away")
        if rank and not find_spec("peft"):
            raise ValueError(f"{flag} {name}: adapters need the package peft: pip install peft")
        chain.insert(0, (folder, rank, bool(part)))
        name = start_of(flag, folder, str(state.get("start", given)), given)
    return name, chain


def start_of(flag: str, checkpoint: Path, start: str, given: str) -> str:
    """The model that a run started from: where it stood then, or by the run's own --model from here."""
    for name in (start, given):
        if Path(split_name(name)[0]).is_dir():
            return name
    if os.path.isabs(start):
        raise ValueError(f"{flag} {checkpoint}: it starts from {given}, and {start} is not there"
                         + offers(Path(start).parent))
    return start
