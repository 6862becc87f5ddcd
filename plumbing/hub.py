"""Files of the Hugging Face hub: fetched with a word about what and how much, errors by their cause."""

import fnmatch
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINE_FILES = ("model_index.json", *(f"{part}/*.{kind}" for part in PARTS
                                        for kind in ("json", "txt", "safetensors")))
CLIP_FILES = ("config.json", "preprocessor_config.json", "tokenizer*", "vocab.json", "merges.txt",
              "special_tokens_map.json", "model*.safetensors")


@cache
def fetch(flag: str, name: str, patterns: tuple = PIPELINE_FILES) -> Path:
    """The folder of a hub id's files, or of REPOSITORY:SUBFOLDER's, from the hub, or from its cache where the
    hub does not answer. What is larger than it need be is left: half-precision copies beside whole ones,
    weights without average."""
    repo, _, subfolder = name.partition(":")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        names = {file.rfilename: file.size or 0 for file in info.siblings}
        wanted = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
                  and ".non_ema" not in name
                  and (".fp16" not in name or name.replace(".fp16", "") not in names)]
        size = sum(names[name] for name in wanted) / 2**30
        print(f"hub      {repo}: {len(wanted)} files, {size:.1f} GB where they are not here already",
              flush=True)
        folder = snapshot_download(repo, allow_patterns=wanted)
    except Exception as error:  # of the hub's client, of its transport, of the system: told apart below
        try:
            folder = snapshot_download(repo, allow_patterns=patterns[:1], local_files_only=True)
        except LocalEntryNotFoundError:
            raise ValueError(f"{flag} {repo}: {cause(error)}") from None
    return Path(folder) / subfolder


def cause(error: Exception) -> str:
    """Why the hub gave nothing, and what to do."""
    answer = error
    while answer and getattr(answer, "response", None) is None:
        answer = answer.__cause__ or answer.__context__
    if isinstance(answer, GatedRepoError):
        return "a gated model: accept its terms on its page of the hub, then `hf auth login`"
    if isinstance(answer, RepositoryNotFoundError):
        return "neither a folder here nor a repository on the hub; check the spelling (or it is private)"
    if answer and answer.response.status_code in (401, 403):
        return "the hub refuses your token (expired?): `hf auth login`, or unset HF_TOKEN"
    if answer:
        return f"the hub answers {answer.response.status_code}; try again later"
    said = (str(error).splitlines() or [""])[0][:100]
    return f"the hub cannot be reached ({type(error).__name__}: {said}), its cache lacks them; give a folder"
