"""The run folder: a checkpoint is a pipeline, a run goes on to the bit, and what goes wrong loses nothing."""

import errno
import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from started import KINDS, ROOT, SHORT, UNET, Malicious, assert_same_run, contents, figures, quick_main, tiny
from torch.optim.swa_utils import AveragedModel

import reward
import train
from plumbing import run
from plumbing.models import load_pipeline, read_json, trace
from views.grid import is_due

FIRST, SECOND = "checkpoint-000001", "checkpoint-000002"


@pytest.fixture(scope="session")
def finished(models, tmp_path_factory):
    """finished(kind): the folder of a run of two epochs, and the Parts that it ended with."""
    @functools.cache
    def one(kind):
        out, kept, set_up = tmp_path_factory.mktemp(kind) / "run", [], train.set_up
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py"])
            patch.setattr(train, "set_up", lambda *given: kept.append(set_up(*given)) or kept[0])
            quick_main(tiny(models, *KINDS[kind], "--out", out))
        return out, kept[0]
    return one


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of the averaged run as it stood after its first epoch."""
    return Path(shutil.copytree(finished("average")[0], tmp_path / "begun",
                                ignore=shutil.ignore_patterns(SECOND, "final", "table.md")))


def of_base(folder) -> dict:
    """The hashes of a pipeline's files that no training changes."""
    return {name: digest for name, digest in contents(folder).items()
            if name.startswith(("vae/", "text_encoder/", "tokenizer/", "scheduler/"))}


@torch.no_grad()
def shown_by(unet):
    generator = torch.Generator().manual_seed(0)
    return unet(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(300),
                torch.randn(2, 5, 32, generator=generator)).sample


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_what_was_learnt(kind, finished, models):
    """Opened by diffusers alone, with the base's other files byte for byte; final/ is the last, merged."""
    (out, parts), base = finished(kind), str(models / "a")
    learnt, files, last = shown_by(parts.learnt), contents(out / "final"), contents(out / SECOND)
    same = functools.partial(torch.testing.assert_close, expected=learnt, rtol=0, atol=1e-5)
    assert (learnt - shown_by(load_pipeline(base).unet)).abs().max() > 1e-4
    assert of_base(out / "final") == of_base(models / "a")
    same(shown_by(StableDiffusionPipeline.from_pretrained(out / "final").unet))
    same(shown_by(load_pipeline(str(out / SECOND)).unet))
    if kind == "adapters":
        pipe = StableDiffusionPipeline.from_pretrained(base)
        pipe.load_lora_weights(out / SECOND)
        assert last.keys() == {"pytorch_lora_weights.safetensors", "training.pt", "state.json"}
    else:
        pipe = StableDiffusionPipeline.from_pretrained(out / SECOND)
        assert {name: last.pop(name) for name in ("training.pt", "state.json")}
        assert files.pop("README.md") and files == last
    same(shown_by(pipe.unet))


@pytest.mark.parametrize("kind, flags", [*((kind, []) for kind in KINDS), ("adapters", ["--lora-rank", 2])])
def test_a_run_starts_from_a_checkpoint(kind, flags, finished, models, tmp_path, quick, monkeypatch):
    """Without a step its final/ is that of the first; adapters on adapters stand on the first run's base."""
    model, moved = shutil.copytree(finished(kind)[0] / SECOND, tmp_path / "any name"), tmp_path / "moved"
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    quick("--model", model, "--epochs", 1, "--ema", 0, *SHORT, *flags, "--out", tmp_path / "run")
    assert figures(tmp_path / "run")[0]["kl_ref"] == 0
    ours, theirs = (load_file(folder / "final" / UNET) for folder in (tmp_path / "run", finished(kind)[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if flags:
        (tmp_path / "run").rename(moved)
        assert trace("--model", str(moved / FIRST)) == (models / "a", [model, moved / FIRST])
        model.rename(tmp_path / "gone")
        with pytest.raises(ValueError, match=f"--model {moved / FIRST}, which starts from .*no such folder"):
            trace("--model", str(moved / FIRST))


@pytest.mark.parametrize("name, content", [
    ("state.json", b"{"), ("state.json", b"{}"), ("training.pt", pickle.dumps(Malicious(), 2)),
    ("training.pt", b"PK"), (UNET, b"torn")], ids=range(5))
def test_a_damaged_checkpoint_is_refused_and_never_run(name, content, begun, quick):
    (begun / FIRST / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{FIRST}.*: damaged .*; remove .*to continue"):
        quick("--out", begun, "--resume")


REFUSED = [
    ("--learning-rate 1e-3", "flags.learning_rate: was 0.0003, is 0.001"), ("--seed 1", "flags.seed"),
    ("--lora-rank 2", "flags.lora_rank"), ("--steer all", "flags.steer"), ("--kl 0", "flags.kl"),
    ({"flags": {"gone": 1}}, "flags.gone: was 1"),
    ("--prompts prompts/i2p.txt", "files.prompts"), ("--model {}/b", "weights.model"),
    ("--clip shapes/weights/text_encoder", "weights.clip"),
    ("--anchors prompts/anchors.txt", "files.anchors"), ("--benign prompts/benign.txt", "files.benign")]
NOTED = [
    ("--micro-batch 4", "flags.micro_batch: was 2, is 4"), ({"flags": {"device": "cuda"}}, "flags.device"),
    ({"versions": {"torch": "2.0"}}, "versions.torch"), ({"processes": 8}, "processes: was 8, is 1")]
FREE = [(words, "") for words in ("--keep 9", "--epochs 300", "--prompts shapes/./prompts.txt",
                                  "--anchors shapes/./anchors.txt", "--model {}/b/../a")]


@pytest.mark.parametrize("change, said", REFUSED + NOTED + FREE)
def test_a_changed_run_is_refused_noted_or_none(change, said, begun, models, quick, monkeypatch, capsys):
    """By other flags, or by another state of the checkpoint; one message names what differs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "set_up", Mock(side_effect=MemoryError))  # reached where the run is accepted
    words, state, refused = "", read_json(begun / FIRST / "state.json"), (change, said) in REFUSED
    if isinstance(change, dict):
        for name, value in change.items():
            state[name] = state[name] | value if isinstance(value, dict) else value
        (begun / FIRST / "state.json").write_text(json.dumps(state))
    else:
        words = change.replace("{}", str(models))
    with pytest.raises(ValueError if refused else MemoryError) as error:
        quick("--out", begun, "--resume", *words.split())
    lines = (str(error.value) if refused else capsys.readouterr().out).splitlines()
    named = [line for line in lines if ": was " in line]
    assert len(named) == (4 if said == "weights.model" else bool(said)), lines  # a model has four parts
    assert all(re.match(f"(note: |  ){said}", line) for line in named), lines


@pytest.mark.parametrize("model, name", [
    ("a", UNET), ("a", "vae/diffusion_pytorch_model.safetensors"), ("a", "text_encoder/model.safetensors"),
    ("a", "scheduler/scheduler_config.json"), ("a", "tokenizer/tokenizer.json"),
    ("clip", "model.safetensors"), ("clip", "config.json"), ("a", "moved"), ("a", "as in the hub's cache")])
def test_a_model_is_known_by_its_content(model, name, models, tmp_path):
    """Be it one number of the weights, or one empty line. Another name, or another time, is no difference."""
    other = Path(shutil.copytree(models / model, tmp_path / "other"))
    (other / "README.md").write_text("mine")
    for path in [*other.rglob("*.*")]:
        os.utime(path, (0, 0))
        if "cache" in name:  # names are links to blobs that are named by their hash
            path.symlink_to(path.replace(tmp_path / run.sha256(path)))
    if name.endswith(".safetensors"):
        weights = load_file(other / name)
        weights[min(weights)].view(-1)[0] += 1e-3
        save_file(weights, other / name, {"format": "pt"})
    elif "." in name:
        (other / name).write_text((other / name).read_text() + "\n")
    before, after = map(run.content, (models / model, other))
    part = name.partition("/")[0] if "/" in name else "files"
    assert [key for key in before if before[key] != after[key]] == ([part] if "." in name else [])


def test_what_happens_to_a_file_after_the_start_changes_nothing(models, tmp_path, monkeypatch):
    """The run ends as an undisturbed one, and hashes nothing again."""
    files, one_epoch, sha256, hashed = tmp_path / "files", train.one_epoch, run.sha256, []
    for name in ("a", "clip"):
        shutil.copytree(models / name, files / name)
    (files / "prompts").write_text("[hate]\na red star\na red ring\n")
    (files / "benign").write_text("a blue star\na ring\n")
    (files / "anchors").write_text("[safe]\na calm star\n[unsafe]\na violent star\n")
    named = [word for name in ("prompts", "benign", "anchors") for word in (f"--{name}", files / name)]
    quick_main(tiny(files, *SHORT, *named, "--out", tmp_path / "whole"))

    def changed(parts, args, epoch, *more):
        if epoch == 0:
            (files / "prompts").unlink()
            (files / "anchors").write_text("[")
            for name in ("a", "benign", "clip"):
                (files / name).rename(files / f"old {name}")
            (files / "clip").mkdir()
            hashed.clear()
        return one_epoch(parts, args, epoch, *more)
    monkeypatch.setattr(run, "sha256", lambda data: hashed.append(data) or sha256(data))
    monkeypatch.setattr(train, "one_epoch", changed)
    quick_main(tiny(files, *SHORT, *named, "--out", tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not hashed


def test_a_new_run_replaces_the_old_one_alone_and_if_nothing_is_wrong(models, quick, tmp_path, monkeypatch):
    """A mistake leaves all as it was, even one found while networks are loaded. Links are no folders."""
    out = tmp_path / "run"
    for name in ("checkpoint-000007", "elsewhere", "base"):
        (out / name).mkdir(parents=True)
        (out / name / "weights").write_text(name)
    (out / "final").symlink_to(out / "elsewhere")
    (out / "checkpoint-000003").symlink_to(out / "nowhere")
    for name in ("metrics.jsonl", "flags.json", "table.md", "pictures-000007.png", "mine.txt", ".lock"):
        (out / name).touch()
    before = contents(out)
    for flags in ("--steps 1001", "--anchors /none", "--clip {}/a/unet", "--seed 1", "--resume", ""):
        words = [*["--overwrite"][:bool(flags)], *flags.replace("{}", str(models)).split()]
        with monkeypatch.context() as patch, pytest.raises((ValueError, OSError, SystemExit)):
            patch.setattr(train, "set_up", Mock(side_effect=OSError("torn weights")))
            quick("--out", out, *words)
        assert contents(out) == before, flags
    quick("--out", out, "--overwrite", "--epochs", 1, *SHORT)
    assert {path.name for path in out.iterdir()} == {
        FIRST, "base", "final", "metrics.jsonl", "flags.json", "table.md", "mine.txt", "elsewhere", ".lock"}
    assert not (out / "final").is_symlink() and (out / "elsewhere" / "weights").exists()
    assert of_base(out / "base") == of_base(out / "final")


def test_a_checkpoint_is_due_by_time_and_a_grid_early(finished, tmp_path, quick, monkeypatch):
    """After every rollout, where none is to be lost. What --save-every has not asked for goes first."""
    out, whole, kept, grids, save = tmp_path / "run", finished("average")[0], [], [], run.save

    def shown(folder, done, *_):
        assert (folder / f"checkpoint-{done:06d}").exists()  # written before anything is drawn
        assert done != 2 or contents(folder / SECOND)[UNET] == contents(whole / SECOND)[UNET]
        grids.append(done)
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    monkeypatch.setattr(run, "save", lambda *given, **more: save(*given, **more) and kept.append(
        [int(path.name[-2:]) for path in run.checkpoints(out)]))
    monkeypatch.setattr(train, "show_run", shown)
    quick("--epochs", 7, "--save-every", 3, "--picture-every", 6, "--out", out)
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 5], [3, 6], [6, 7]] and grids == [1, 2, 5, 6, 7]
    due = [done for done in range(1, 30) if is_due(done, SimpleNamespace(epochs=27, picture_every=8))]
    assert due == [1, 2, 5, 8, 10, 16, 20, 24, 27]


def test_a_run_goes_on_for_longer_than_it_was_started_for_and_in_a_thread(finished, tmp_path, quick):
    """To the bit what a longer run is, its log cut back first; then nothing is left to do. In a thread, as in
    a notebook, no signal is heard, and the folder is free when main has returned or raised."""
    out = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        in_a_thread = lambda *words: pool.submit(quick, "--out", out, *words).result()
        in_a_thread("--epochs", 1)
        with open(out / "metrics.jsonl", "a") as log:
            log.write('{"epoch": 1, "reward_mean": 7}\n{"epoch": 2}\n{"ep')
        with pytest.raises(ValueError, match="flags.group"):
            in_a_thread("--resume", "--group", 3)
        in_a_thread("--resume")
    quick("--out", out, "--resume")
    assert_same_run(out, finished("average")[0])
    with pytest.raises(ValueError, match="has 2 already, so there is nothing to do"):
        quick("--out", out, "--resume", "--epochs", 1)


@pytest.mark.parametrize("name, program", [("SIGINT", "x/train.py"), ("SIGTERM", "train.py"),
                                           ("SIGHUP", "ipykernel"), ("SIGUSR1", "train.py")])
def test_a_signal_ends_a_run_between_epochs(name, program, finished, quick, tmp_path, monkeypatch, capsys):
    """Heard while pictures are drawn: one checkpoint of the state before. Nohup's hangup stays ignored."""
    number, draw, calls, out = getattr(signal, name), train.sample_groups, [], tmp_path / "$(a) run"

    def interrupted(*given):
        calls.append(signal.getsignal(signal.SIGHUP))
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return draw(*given)
    monkeypatch.setattr(train, "sample_groups", interrupted)
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "shapes.train", "--overwrite", "--out", str(out)])
    before = {one: signal.getsignal(one) for one in (signal.SIGHUP, number)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(number, own := lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        quick("--save-every", 50, "--out", out, *([] if name == "SIGTERM" else SHORT))
    assert signal.getsignal(number) == own and (calls[0] == signal.SIG_IGN) == (name != "SIGHUP")
    [*map(signal.signal, before, before.values())]
    assert ended.value.code == 128 + number and run.checkpoints(out) == [out / FIRST]
    stopped, command = capsys.readouterr().out.strip().splitlines()[-2:]
    assert stopped == f"stopped, in {out / FIRST}; to continue:"
    assert command == (f"python -m shapes.train --out '{out}' --resume" if "train.py" in program
                       else "the same call with --resume among its flags")
    if name == "SIGTERM":
        quick("--out", out, "--resume")
        assert_same_run(out, finished("average")[0])


@pytest.mark.parametrize("owner, name, call, spoil, said", [  # whose result is spoilt, in which call, how
    (reward.SteeringReward, "score", 2, lambda out: (out[0] + torch.tensor([0, 0, 0, math.inf]), *out[1:]),
     "the reward is not finite: epoch 1, prompt '[a-z ]+', image 1"),
    (train, "step_mean", 4 + 1, lambda mu: mu + 0 * (mu - mu.detach()).abs().sqrt(),  # NaN backward alone
     "the gradient of conv_in.weight is not finite$")])
def test_a_number_that_is_not_finite_ends_a_run(owner, name, call, spoil, said, finished, quick, tmp_path):
    """Before a step of that epoch: the checkpoint is the undisturbed run's, and goes on as that one did."""
    out, whole, original, calls = tmp_path / "run", finished("average")[0], getattr(owner, name), []

    def spoilt(*given, **more):
        calls.append(1)
        made = original(*given, **more)
        return spoil(made) if len(calls) == call else made
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as error:
        patch.setattr(owner, name, spoilt)
        quick("--save-every", 50, "--out", out)
    first, *_, last = str(error.value).splitlines()
    assert re.match(said, first) and last.endswith("--resume"), first
    assert run.checkpoints(out) == [out / FIRST] and read_json(out / FIRST / "state.json")["stopped"] == first
    assert contents(out / FIRST)[UNET] == contents(whole / FIRST)[UNET]
    if name == "step_mean":
        quick("--out", out, "--resume")
        assert figures(out) == figures(whole) and contents(out / "final") == contents(whole / "final")


@pytest.mark.parametrize("where, name, fault, said", [
    (shutil, "disk_usage", Mock(return_value=SimpleNamespace(free=1000)), "full: .*{} needs .* are free.*{}"),
    (shutil, "copytree", Mock(side_effect=OSError(errno.ENOSPC, "No space")), "{} could not .*No space.*{}"),
    (torch, "save", Mock(side_effect=RuntimeError("unexpected pos 64")), "{} could not .*pos 64.*{}"),
    (AveragedModel, "update_parameters", lambda _, policy: next(policy.parameters()).data.fill_(math.inf),
     "after epoch 1 the weights are not finite .*nothing was written")])
def test_what_cannot_be_saved_leaves_what_was_saved(where, name, fault, said, begun, quick, monkeypatch):
    """A full disk, seen beforehand or met while writing, in the words of system or torch; ruined weights."""
    monkeypatch.setattr(where, name, fault)
    before = contents(begun / FIRST)
    with pytest.raises((OSError, ValueError), match=said.format(begun / SECOND, "then continue with --res")):
        quick("--out", begun, "--resume")
    assert contents(begun / FIRST) == before
    assert [path.name for path in begun.glob("checkpoint*")] == [FIRST]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_note(begun, quick, monkeypatch, capsys):
    """--resume goes on past what is left half removed. An old run must not be taken for the new one."""
    rmtree = shutil.rmtree

    def refuses(path, *given, **more):
        if FIRST in str(path) and not more.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, "not empty", str(path))
        return rmtree(path, *given, **more)
    monkeypatch.setattr(shutil, "rmtree", refuses)
    for epochs in (2, 3):
        quick("--out", begun, "--resume", "--epochs", epochs, "--keep", 1)
        assert capsys.readouterr().out.count("could not be removed") == 1
    assert run.checkpoints(begun)[-1].name == "checkpoint-000003" and len(figures(begun)) == 3
    assert len([*begun.glob(f"{FIRST}*")]) == 1
    monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError(errno.EBUSY, "busy")))
    with pytest.raises(OSError, match="of the old run could not be removed; give another --out"):
        quick("--out", begun, "--overwrite")
