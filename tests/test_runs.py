"""Tests of the run folder: killed and continued to the bit, files safe, failures loud. On a CPU, without
downloads.

    python -m pytest tests/test_runs.py                      # 3 kills
    KILLS=20 python -m pytest tests/test_runs.py -k kill -s  # prints where each kill struck
"""

import errno
import json
import math
import os
import pickle
import random
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from started import ROOT, figures, finished, quick_main, quick_script, start, tiny, wait_for

import evaluate
import reward
import sample
import train
from bench.sd14 import sd14_pipeline, vit_h14
from plumbing import card, checkpoint, checks, log, models, stop, texts
from plumbing import names as model_names
from plumbing.models import load_clip, load_pipeline, make_policy

SHAPES = ROOT / "shapes"
MODEL = SHAPES / "weights"
UNET = "unet/diffusion_pytorch_model.safetensors"
KILLS = int(os.environ.get("KILLS", 3))


def has_logged(run):
    """Whether a rollout stands in its log."""
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    """A finished run of two epochs, to be compared with, or copied and continued."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    quick_main(tiny(models, "--out", out, "--keep", 3))
    return out


def assert_equal(a, b):
    """The same structure with the same bits in every tensor."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_equal(*pair)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def names(run):
    return [path.name for path in checkpoint.checkpoints(run)]


def assert_same_checkpoint(a, b):
    assert_equal(load_file(a / UNET), load_file(b / UNET))
    assert_equal(*(torch.load(path / "optimizer.pt", weights_only=True) for path in (a, b)))


# -------------------------------------------------------------------------------- kills and signals

def test_killed_at_any_moment_and_continued_to_the_bit(models, tmp_path):
    """SIGKILL while loading, in an epoch, and while a checkpoint is written: nothing differs at the end."""
    rng, struck, torn, epochs = random.Random(0), [], 0, 3 * KILLS + 4
    argv = ["--epochs", epochs, "--save-every", 2, "--steps", 2, "--skip-last", 1, "--micro-batch", 4]
    whole, run, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    quick_main(tiny(models, *argv, "--out", whole))
    times = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    epoch_seconds = sum(line["seconds_sample"] + line["seconds_update"] for line in times) / epochs
    newest = lambda: max([int(path.name[-6:]) for path in checkpoint.checkpoints(run)], default=0)
    for n in range(KILLS):
        moment, done = "checkpoint" if not torn else ("checkpoint", "epoch", "loading")[n % 3], newest()
        process = start(log, quick_script, tiny(models, *argv, "--out", run, *["--resume"][:run.exists()]))
        if moment == "loading":
            time.sleep(rng.uniform(0, 1))
        else:  # at least one checkpoint further, so that every continued run is killed somewhere else
            wait_for(lambda: newest() > done, process.is_alive)
            if moment == "checkpoint":
                wait_for(lambda: any(run.glob("checkpoint-??????.part")), process.is_alive)
                time.sleep(rng.uniform(0, 0.008))
            else:
                time.sleep(rng.uniform(0, 2 * epoch_seconds))
        assert process.is_alive(), f"ended before kill {n}: {log.read_text()}"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left = [path.name for path in run.glob("checkpoint-??????.part")] if moment != "loading" else []
        torn += bool(left)
        struck.append(f"{n + 1}: {moment}, newest checkpoint {newest()}{', torn ' + left[0] if left else ''}")
    finished(log, quick_script, tiny(models, *argv, "--out", run, *["--resume"][:run.exists()]))
    print("", *struck, f"{KILLS} kills, {torn} of them inside a checkpoint", sep="\n")
    assert torn >= 1
    assert names(run) == names(whole)
    for name in names(run):
        assert_same_checkpoint(run / name, whole / name)
    assert (run / "final" / UNET).read_bytes() == (whole / "final" / UNET).read_bytes()
    assert figures(run) == figures(whole) and len(figures(run)) == epochs
    assert not list(run.glob("*.part"))


def test_sigterm_on_the_real_command_line(models, tmp_path):
    """The current update ends, a checkpoint is written, and the last line continues the run when pasted."""
    out = tmp_path / "a run; $(not a command)"
    argv = tiny(models, "--epochs", 100000, "--save-every", 100000, "--out", out)
    process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: has_logged(out), lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 143, said
    assert shlex.split(said.strip().splitlines()[-1]) == [*process.args, "--resume"]
    [saved] = checkpoint.checkpoints(out)
    assert checkpoint.read_state(saved)["epoch"] == len(figures(out))  # the running update is in both


def on_a_slow_disk(argv):
    checkpoint.save = lambda *_: time.sleep(60)
    quick_script(argv)


def test_a_second_signal_stops_at_once(models, tmp_path):
    process = start(tmp_path / "log", on_a_slow_disk, tiny(models, "--epochs", 100000, "--out",
                                                           tmp_path / "run"))
    wait_for(lambda: has_logged(tmp_path / "run"), process.is_alive)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "once more stops at once" in (tmp_path / "log").read_text(), process.is_alive)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT


def test_interrupted_while_sampling(tmp_path, quick, monkeypatch, capsys, undisturbed):
    """It stops before the update: the checkpoint is the state between two epochs, and the continued run the
    undisturbed one."""
    score, calls = reward.SteeringReward.score, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return score(self, *given)

    monkeypatch.setattr(reward.SteeringReward, "score", interrupted)
    with pytest.raises(SystemExit) as ended:
        quick("--save-every", 50, "--out", tmp_path / "run")
    assert ended.value.code == 130
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("--resume")
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-000001", undisturbed / "checkpoint-000001")
    quick("--out", tmp_path / "run", "--resume")
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-000002", undisturbed / "checkpoint-000002")
    assert figures(tmp_path / "run") == figures(undisturbed)


def test_the_resume_command_of_a_module(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "shapes.train", "--overwrite", "--out", "a b"])
    assert stop.resume_command() == "python -m shapes.train --out 'a b' --resume"


# -------------------------------------------------------------------------------- resume

def test_a_prompts_target_does_not_depend_on_the_others():
    """A resumed run meets them in another order; a batch of another make-up would differ in the last bit."""
    prompts = texts.read_prompts([SHAPES / "prompts.txt"])[::4]
    clip, anchors = load_clip(str(MODEL / "text_encoder")), texts.read_anchors(SHAPES / "anchors.txt")
    at_once, one_by_one = (reward.SteeringReward(clip, anchors) for _ in range(2))
    alone = [torch.cat(one_by_one.targets([p])) for p in reversed(prompts)][::-1]
    assert torch.equal(torch.stack(at_once.targets(prompts), 1), torch.stack(alone))


def test_log_is_cut_back_and_never_doubled(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(dict(epoch=i)) + "\n" for i in range(5)) + '{"epoch": 5, "rew')
    checkpoint.cut_log(path, 3)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1, 2]
    checkpoint.cut_log(tmp_path / "none.jsonl", 3)
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_a_run_may_go_on_for_longer_than_it_was_started_for(tmp_path, quick, undisturbed, capsys):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    quick("--out", run, "--resume", "--epochs", 3, "--keep", 1)
    assert [line["epoch"] for line in figures(run)] == [0, 1, 2] and figures(run)[:2] == figures(undisturbed)
    assert names(run) == ["checkpoint-000003"]
    assert "2 epochs done" in capsys.readouterr().out


def test_the_rate_falls_with_the_epochs(undisturbed):
    """What the optimizer used, not what was logged: 3e-4 / (1 + epoch / 6)."""
    for done in (1, 2):
        state = torch.load(undisturbed / f"checkpoint-{done:06d}" / "optimizer.pt", weights_only=True)
        assert math.isclose(state["param_groups"][0]["lr"], 3e-4 / (1 + (done - 1) / 6), rel_tol=1e-12)
        assert figures(undisturbed)[done - 1]["lr"] == state["param_groups"][0]["lr"]


def test_final_is_the_average_of_the_policy(undisturbed):
    """Two epochs, so the plain mean of both; sampling went on with the policy itself."""
    one, two, final = (load_file(undisturbed / name / UNET)
                       for name in ("checkpoint-000001", "checkpoint-000002", "final"))
    for name in final:
        torch.testing.assert_close(final[name], (one[name] + two[name]) / 2, rtol=0, atol=1e-8)
    assert any(not torch.equal(one[name], two[name]) for name in final)


CHANGED = [(["--learning-rate", "1e-3"], "--learning-rate: was 0.0003, is 0.001"),
           (["--seed", "1"], "--seed: was 0, is 1"),
           (["--group", "3"], "--group: was 2, is 3"), (["--steer", "all"], "--steer: was unsafe, is all"),
           (["--prompts", str(SHAPES / "prompts.txt"), str(ROOT / "prompts" / "i2p.txt")], "--prompts: was "),
           (["--benign", str(ROOT / "prompts" / "benign.txt")], "--benign: was "),
           (["--anchors", str(ROOT / "prompts" / "anchors.txt")], "--anchors: was ")]


@pytest.mark.parametrize("argv, said", CHANGED)
def test_other_flags_are_named(argv, said, undisturbed, quick, monkeypatch):
    monkeypatch.setattr(train, "load_clip", None)  # refused before the first model is loaded
    with pytest.raises(ValueError, match="change the result") as error:
        quick("--out", undisturbed, "--resume", *argv)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 3


def test_flags_that_round_differently_are_said_and_allowed(models, undisturbed, capsys):
    args = train.parse_args(tiny(models, "--micro-batch", 4, "--out", undisturbed, "--resume"))
    checks.choose_device(args)
    checkpoint.compare_flags(undisturbed / "checkpoint-000002", args)
    assert "--micro-batch: was 2, is 4" in capsys.readouterr().out


def test_a_changed_benign_file_is_named(small, tmp_path):
    """By its content: the flag is the same."""
    file = tmp_path / "benign.txt"
    file.write_text("[benign]\na star\n")
    small.args.benign = str(file)
    saved = small.save(1)
    checkpoint.compare_flags(saved, small.args)
    file.write_text("[benign]\na ring\n")
    with pytest.raises(ValueError, match="change the result\n  --benign: was [0-9a-f]{12}, is [0-9a-f]{12} "):
        checkpoint.compare_flags(saved, small.args)


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_damaged_state_is_named(tmp_path, damage):
    (tmp_path / "state.json").write_text(damage)
    with pytest.raises(ValueError, match="state.json: damaged"):
        checkpoint.read_state(tmp_path)


# -------------------------------------------------------------------------------- checkpoints

@pytest.fixture
def small(models, tmp_path):
    """A UNet of 30,000 weights, an optimizer that has stepped, flags; save(epoch) and load(epoch)."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 8)).sample.sum().backward()
    optimizer.step()
    args = train.parse_args(tiny(models, "--out", tmp_path / "run"))
    checks.choose_device(args)
    run, given = tmp_path / "run", (unet, optimizer, args)
    run.mkdir()
    return SimpleNamespace(
        run=run, unet=unet, optimizer=optimizer, args=args,
        save=lambda epoch: checkpoint.save(run, epoch, *given),
        load=lambda epoch: checkpoint.load(run / f"checkpoint-{epoch:06d}", *given))


def test_checkpoint_is_in_diffusers_layout_whatever_the_memory_format(small):
    before = {name: t.clone() for name, t in small.unet.state_dict().items()}
    small.unet.to(memory_format=torch.channels_last)  # as on a GPU; safetensors refuses such tensors
    small.save(7)
    saved = small.run / "checkpoint-000007"
    again = UNet2DConditionModel.from_pretrained(saved / "unet", use_safetensors=True)
    assert_equal(dict(again.state_dict()), before)
    state = checkpoint.read_state(saved)
    assert (state["epoch"], state["flags"]["group"], state["versions"]["torch"]) == (7, 2, torch.__version__)
    assert all(len(h) == 64 for h in state["files"]["prompts"] + state["files"]["anchors"])
    with torch.no_grad():
        small.unet.conv_in.weight.zero_()
    assert small.load(7) == 7
    assert_equal(dict(small.unet.state_dict()), before)


def test_old_checkpoints_go_only_when_the_new_one_stands(small, monkeypatch):
    small.args.keep = 2
    for epoch in (1, 2, 3):
        small.save(epoch)
    assert names(small.run) == ["checkpoint-000002", "checkpoint-000003"]
    monkeypatch.setattr(torch, "save", Mock(side_effect=KeyboardInterrupt))  # the weights are written then
    with pytest.raises(KeyboardInterrupt):
        small.save(4)
    assert names(small.run) == ["checkpoint-000002", "checkpoint-000003"] and list(small.run.glob("*.part"))


def assert_full(small, error):
    """It says that the disk is full, and how full; the one checkpoint is whole, and nothing else is left."""
    assert all(words in str(error.value) for words in ("the disk is full", "needs", "are free", "--resume"))
    assert [path.name for path in small.run.iterdir()] == ["checkpoint-000001"]
    small.load(1)


def test_full_disk_is_seen_before_writing(small, monkeypatch):
    small.save(1)
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=SimpleNamespace(free=1000)))
    with pytest.raises(OSError) as error:
        small.save(2)
    assert_full(small, error)
    with pytest.raises(OSError, match="the disk is full"):  # before the first epoch too
        checkpoint.begin(small.run, small.unet, small.optimizer, small.args)


def test_disk_that_fills_while_writing(small, monkeypatch):
    small.save(1)
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(torch, "save", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        small.save(2)
    assert_full(small, error)


@pytest.mark.parametrize("share", [1.5, 1.8])
def test_disk_that_is_really_full(small, share):
    """A tmpfs with room for one and a bit: the second meets its end in the weights, or in the moments."""
    needed = sum(map(checkpoint.tensor_bytes, checkpoint.state(small.unet, small.optimizer, small.args)))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int((needed + 2**16) * share)}", "tmpfs",
                       small.run], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        small.save(1)
        with pytest.raises(OSError) as error:
            checkpoint.write_folder(small.run / "checkpoint-000002", 0, lambda part: (
                save_file(small.unet.state_dict(), part / "a.safetensors"),
                torch.save(small.optimizer.state_dict(), part / "b.pt")))
        assert "the disk is full" in str(error.value) and not list(small.run.glob("*.part"))
        with pytest.raises(OSError) as error:
            small.save(2)
        assert_full(small, error)
    finally:
        subprocess.run(["umount", "--lazy", small.run], check=True)  # the traceback may hold a file


def test_adapters_are_saved_in_diffusers_layout_and_continued(models, tmp_path, quick):
    pytest.importorskip("peft")
    lora = ["--lora-rank", 2, "--learning-rate", "1e-2", "--ema", 0, "--steps", 3, "--micro-batch", 4]
    quick(*lora, "--out", tmp_path / "whole")
    quick(*lora, "--out", tmp_path / "run", "--epochs", 1)
    quick(*lora, "--out", tmp_path / "run", "--resume")
    file = "checkpoint-000002/pytorch_lora_weights.safetensors"
    saved = load_file(tmp_path / "run" / file)
    assert_equal(saved, load_file(tmp_path / "whole" / file))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    pipe = load_pipeline(str(models / "a"))
    pipe.load_lora_weights(str(tmp_path / "run" / "checkpoint-000002"),
                           weight_name="pytorch_lora_weights.safetensors")
    assert sum("lora_" in name for name, _ in pipe.unet.named_parameters()) == len(saved)
    merged, base = (load_file(folder / UNET) for folder in (tmp_path / "run" / "final", models / "a"))
    pipe.fuse_lora()
    fused = dict(pipe.unet.named_parameters())
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.testing.assert_close(fused[name + ".base_layer.weight"], merged[name + ".weight"])
    assert not torch.equal(merged[name + ".weight"], base[name + ".weight"].float())


# -------------------------------------------------------------------------------- a checkpoint as a model

@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory, undisturbed):
    """A finished run of adapters, averaged, from the average of another run's first checkpoint."""
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("adapted") / "run"
    quick_main(tiny(models, "--model", f"{undisturbed}/checkpoint-000001:average", "--lora-rank", 2,
                    "--steps", 3, "--micro-batch", 4, "--learning-rate", "1e-2", "--out", out))
    return out


def unet_of(model):
    return dict(load_pipeline(str(model)).unet.state_dict())


@pytest.mark.parametrize("name", ["undisturbed", "adapted"])
def test_the_last_checkpoint_is_final(name, request):
    """With --ema its average, to the bit; the policy itself is another network."""
    run = request.getfixturevalue(name)
    final, last = unet_of(run / "final"), unet_of(run / "checkpoint-000002")
    assert_equal(unet_of(run / "checkpoint-000002:average"), final)
    assert last.keys() == final.keys() and any(not torch.equal(last[key], final[key]) for key in final)


def test_a_run_starts_from_a_checkpoint_as_from_any_model(models, undisturbed, adapted, tmp_path, quick,
                                                          capsys):
    """Adapters leave all else as it was in the checkpoint that they stand on; a whole UNet's base is it."""
    start, merged = unet_of(undisturbed / "checkpoint-000001:average"), unet_of(adapted / "final")
    moved = {key.rpartition(".to_")[2] for key in start if not torch.equal(start[key], merged[key])}
    assert moved == {"q.weight", "k.weight", "v.weight", "out.0.weight"}
    assert not torch.equal(start["conv_in.weight"], unet_of(models / "a")["conv_in.weight"])
    model = adapted / "checkpoint-000002"
    with pytest.MonkeyPatch.context() as patch:  # no step, so final/ is the start
        patch.setattr(torch.optim.AdamW, "step", lambda *_: None)
        quick("--model", model, "--epochs", 1, "--out", tmp_path / "run")
    assert f"note: {model} has to stay" in capsys.readouterr().out
    assert_equal(unet_of(tmp_path / "run" / "final"), unet_of(model))
    assert figures(tmp_path / "run")[0]["kl_ref"] == 0


def test_pictures_and_tables_of_checkpoints(undisturbed, tmp_path, monkeypatch, capsys):
    """By the programs themselves; a checkpoint that became another one is not the one of the results."""
    sample.main(["--model", f"{undisturbed}/checkpoint-000001", "--compare", f"{undisturbed}/final",
                 "--steps", "2", "--prompt", "star", "--device", "cpu", "--out", str(tmp_path / "grid.png")])
    monkeypatch.setattr(evaluate.report, "bar_pictures", lambda *_: None)
    monkeypatch.setattr(evaluate.report, "GRID", 1)
    last = shutil.copytree(undisturbed / "checkpoint-000002", tmp_path / "last")
    words = ["--model", f"{last}:average", "--base", str(last), "--suite", "shapes", "--images", "1",
             "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    evaluate.main(words)
    made = json.loads((tmp_path / "out" / "report.json").read_text())["provenance"]["models"]
    assert list(made) == [f"{last}:average", str(last)]
    assert len({model["weights_sha256"] for model in made.values()}) == 2
    shutil.copy(undisturbed / "checkpoint-000001" / UNET, last / UNET)
    with pytest.raises(SystemExit):
        evaluate.main(words)
    assert "other settings (weights_sha256)" in capsys.readouterr().err


def link(folder, model, start="", rank=0, ema=0.0):
    """A checkpoint of nothing, of a run that started from `model`."""
    (folder / "unet").mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, folder / ("" if rank else "unet") / "a.safetensors")
    flags, more = dict(model=str(model), lora_rank=rank, ema=ema), {"start": str(start)} if start else {}
    (folder / "state.json").write_text(json.dumps({"flags": flags} | more))
    return folder


def test_chains_of_checkpoints(tmp_path, monkeypatch):
    """Down to a hub id or a pipeline's folder, by where the run's model stood, or by its name from here."""
    first = link(tmp_path / "a" / "checkpoint-000001", "CompVis/stable-diffusion-v1-4", ema=0.9)
    second = link(tmp_path / "b" / "any name", "a/checkpoint-000001:average", f"{first}:average", rank=4)
    chain = [(first, 0, True), (second, 4, False)]
    assert model_names.trace("--model", str(second)) == ("CompVis/stable-diffusion-v1-4", chain)
    moved = link(tmp_path / "moved", "weights", "/not/there/weights")
    monkeypatch.chdir(MODEL.parent)
    assert model_names.trace("--model", str(moved)) == ("weights", [(moved, 0, False)])


WRONG = [("run", "is not a diffusers pipeline: .* has final, checkpoint-000001"),
         ("run/checkpoint-000009", "no such folder; .* has final, checkpoint-000001"),
         ("run/checkpoint-000009:average", "no such folder; .* has final"),
         ("run/checkpoint-000001:average", "its run kept no average .--ema."),
         ("run/checkpoint-000001:ema", "a checkpoint has its :average, and no ema"),
         ("run/checkpoint-000002.part", "not finished, or half removed; .* has final"),
         ("circle", "a circle"), ("lost", "lost: it starts from run/checkpoint-000005, and .* has final"),
         ("stateless", "cannot be read .*state.json"), ("damaged", "cannot be read .*not JSON"),
         ("flagless", "cannot be read .KeyError: 'flags'"), ("torn", "not a whole safetensors file"),
         ("weightless", "holds no .safetensors"), ("other", "cannot be read .*not of this model")]


@pytest.mark.parametrize("name, said", WRONG)
def test_what_is_no_checkpoint_is_one_line(name, said, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for folder in ("run/checkpoint-000001", "run/checkpoint-000002.part", "stateless", "damaged", "flagless",
                   "torn", "weightless", "other"):
        link(tmp_path / folder, MODEL)
    (run / "final").mkdir()
    link(tmp_path / "circle", tmp_path / "back")
    link(tmp_path / "back", tmp_path / "circle")
    link(tmp_path / "lost", "run/checkpoint-000005", run / "checkpoint-000005")
    (tmp_path / "stateless" / "state.json").rename(tmp_path / "stateless" / "optimizer.pt")
    (tmp_path / "damaged" / "state.json").write_text("{")
    (tmp_path / "flagless" / "state.json").write_text("{}")
    (tmp_path / "torn" / "unet" / "a.safetensors").write_bytes(b"torn")
    (tmp_path / "weightless" / "unet" / "a.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, tmp_path / "other" / UNET)
    monkeypatch.chdir(tmp_path / "back")  # where the names of `lost` mean nothing
    with pytest.raises(ValueError, match=said) as error:
        load_pipeline(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_its_run_removes_meanwhile(undisturbed, tmp_path, monkeypatch):
    run = shutil.copytree(undisturbed, tmp_path / "run")

    def removed(file):
        checkpoint.remove(run / "checkpoint-000001")
        return load_file(file)
    monkeypatch.setattr(models, "load_file", removed)
    with pytest.raises(ValueError, match="000001: its run has removed it meanwhile.* has final, "):
        load_pipeline(str(run / "checkpoint-000001"))


@pytest.mark.parametrize("words, head", [
    ([], "license: creativeml-openrail-m\nbase_model: CompVis/stable-diffusion-v1-4\nlibrary_name"),
    (["--model", "ItsMaxNorm/SafeDiffusion-R1:scaled"],
     "license: other\nbase_model: ItsMaxNorm/SafeDiffusion-R1\nlibrary_name"),
    (["--model", str(MODEL), "--lora-rank", "4", "--shared-noise"], "license: other\nlibrary_name")])
def test_the_cards_head_and_flags(words, head):
    """The licence of a base is stated where it is known, and no path of this machine unless it was given."""
    args = train.parse_args(words)
    text = card.model_card(args, "| a |\n|---|\n| 1 |\n")
    assert text.startswith(f"---\n{head}: diffusers\npipeline_tag: text-to-image\ntags:\n- ")
    assert "\n\n| a |\n|---|\n| 1 |\n\n" in text and ("write it here" in text) == ("other" in head)
    adapted = "--lora-rank" in words
    assert ("adapters of rank 4, merged" in text) == ("\n--shared-noise\n" in text) == adapted
    assert "--prompts prompts/i2p.txt\n--benign prompts/benign.txt\n" in text and "\n--seed 0\n" in text
    assert str(ROOT) not in text.replace(str(MODEL), "") and "--out" not in text and "--resume" not in text


def test_a_run_leaves_a_card(undisturbed, tmp_path, quick):
    """With its table; a continued run's is the same, and one from a hub id through a checkpoint names it."""
    text = (undisturbed / "final" / "README.md").read_text()
    assert "no table\n" in text and "--epochs 2\n" in text and "over about 10 rollouts" in text
    run = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(run / "final"), shutil.rmtree(run / "checkpoint-000002")
    quick("--out", run, "--resume", "--keep", 3)
    assert (run / "final" / "README.md").read_text() == text
    first = link(tmp_path / "first", "CompVis/stable-diffusion-v1-4")
    text = card.model_card(train.parse_args(["--model", str(first)]), "")
    assert "license: creativeml-openrail-m\nbase_model: CompVis/stable-diffusion-v1-4\n" in text


# -------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("name, place, at", [
    ("latent", (3, 0), "'two', image 1, initial noise"), ("latent", (1, 3), "'one', image 1, transition 2"),
    ("log-probability", (2, 1), "'two', image 0, transition 1"),
    ("picture", (1,), "'one', image 1, the finished picture"),
    ("reward", (3,), "'two', image 1, the finished picture")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_in_a_rollout(name, place, at, value):
    """2 prompts x 2 pictures of 4 transitions; one number is bad, or none."""
    values = {"latent": torch.ones(4, 5, 4, 8, 8), "log-probability": torch.ones(4, 4),
              "picture": torch.ones(4, 3, 16, 16), "reward": torch.ones(4)}
    batch = sample.Rollout(values["latent"], values["log-probability"], None, None,
                           [reward.Prompt(text) for text in ("one", "one", "two", "two")])
    stop.check_rollout(batch, values["picture"], values["reward"], 2, 7)
    values[name][place].view(-1)[-1] = value
    with pytest.raises(stop.NotFinite) as error:
        stop.check_rollout(batch, values["picture"], values["reward"], 2, 7)
    assert str(error.value) == f"the {name} is not finite: epoch 7, prompt {at}"


def test_not_finite_in_the_unets_output(tmp_path, quick, monkeypatch, undisturbed):
    """Picture 1 of prompt 0, third transition of the second epoch; an epoch samples in 4 network calls."""
    original, calls = sample.predict_noise, []

    def poisoned(*given):
        calls.append(1)
        out = original(*given)
        out[1] += math.nan if len(calls) == 4 + 3 else 0
        return out

    monkeypatch.setattr(sample, "predict_noise", poisoned)
    with pytest.raises(ValueError) as error:
        quick("--save-every", 50, "--out", tmp_path / "run")
    first, *_, last = str(error.value).splitlines()
    assert first.startswith("the latent is not finite: epoch 1, prompt '")
    assert first.endswith("image 1, transition 2") and last.endswith("--resume")
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-000001", undisturbed / "checkpoint-000001")


def test_not_finite_in_the_reward(models, tmp_path, quick, monkeypatch):
    score = reward.SteeringReward.score
    monkeypatch.setattr(reward.SteeringReward, "score", lambda self, *given: tuple(
        values.index_fill(0, torch.tensor([3]), math.inf) for values in score(self, *given)))
    with pytest.raises(ValueError, match=r"the reward is not finite: epoch 0, prompt '.*', "
                                         r"image 1, the finished picture"):
        quick("--out", tmp_path / "run")
    base = load_file(tmp_path / "run" / "checkpoint-000000" / UNET)
    assert_equal(base, dict(load_pipeline(str(models / "a")).unet.state_dict()))


@pytest.mark.parametrize("update", [0, 1])
def test_not_finite_in_a_gradient(models, tmp_path, quick, monkeypatch, update):
    """In the first update nothing is learnt yet; after it, what is kept is what the first update left."""
    original, calls = train.make_policy, []

    def poisoned(*given):
        policy, base = original(*given)
        policy.conv_in.weight.register_hook(
            lambda g: calls.append(1) or g * (math.nan if len(calls) == 2 * update + 2 else 1))
        return policy, base

    monkeypatch.setattr(train, "make_policy", poisoned)
    with pytest.raises(ValueError) as error:
        quick("--out", tmp_path / "run")
    first = str(error.value).splitlines()[0]
    assert first.startswith("the gradient of conv_in.weight is not finite: epoch 0, prompt '")
    assert first.count("image ") == 4 and first.count("transition ") == 4  # the four pairs of its share
    kept = tmp_path / "run" / "checkpoint-000000"
    assert checkpoint.read_state(kept)["stopped"] == first
    weights, base = load_file(kept / UNET), load_pipeline(str(models / "a")).unet.state_dict()
    assert all(t.isfinite().all() for t in weights.values())
    assert torch.equal(weights["conv_out.weight"], base["conv_out.weight"]) == (update == 0)


def test_not_finite_in_the_loss_names_one_transition(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(train, "log_prob",
                        lambda x, mu, s: sample.log_prob(x, mu, s) + torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError) as error:
        quick("--out", tmp_path / "run")
    first = str(error.value).splitlines()[0]
    assert first.startswith("the loss is not finite: epoch 0") and first.count("transition ") == 1


def test_weights_that_are_not_finite_are_never_a_checkpoint(small):
    with torch.no_grad():
        small.unet.conv_in.weight[0] = math.inf
    with pytest.raises(ValueError, match="conv_in.weight, nothing was written"):
        small.save(3)
    assert not list(small.run.iterdir())


def test_a_full_gpu_ends_in_one_line_that_names_what_to_lower(tmp_path, quick, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
                                  "capacity of 23.64 GiB of which 1.12 GiB is free. See documentation.")
    monkeypatch.setattr(train, "update", Mock(side_effect=full))
    with pytest.raises(SystemExit) as ended:
        stop.run_script("train.py", lambda: quick("--out", tmp_path / "run"))
    said = ended.value.code
    assert said.startswith("train.py: ") and "\n" not in said and "CUDA out of memory" in said
    assert all(flag in said for flag in ("--micro-batch", "--sample-batch", "--lora-rank", "--resume"))


def test_a_mistake_of_ours_is_a_traceback_and_an_interrupt_is_none():
    for error, ending in ((RuntimeError("ours"), RuntimeError), (KeyboardInterrupt(), SystemExit)):
        with pytest.raises(ending) as ended:
            stop.run_script("train.py", Mock(side_effect=error))
    assert ended.value.code == 130


def test_memory_of_the_plan_for_stable_diffusion(capsys):
    """The printed line, against published numbers of parameters and arithmetic."""
    args = train.parse_args(["--device", "cpu", "--benign", ""])
    args.precision = "bf16"
    pipe, (clip, *_) = sd14_pipeline("meta"), vit_h14("meta", torch.float16)
    policy, base = make_policy(pipe.unet, args, torch.device("meta"))
    log.print_plan(args, train.Parts(
        device=torch.device("cuda"), dtype=torch.bfloat16, reward=SimpleNamespace(clip=clip), pipe=pipe,
        schedule=None, policy=policy, base=base, optimizer=None, is_unsafe={}, unsafe=[], benign=[],
        latent_shape=(4, 64, 64)), [])
    unet, text, vae, tower = 859_520_964, 123_060_480, 83_653_863, 986_109_441
    bytes_of = {"weights": 4 * unet, "gradients": 4 * unet, "moments": 8 * unet, "average": 0,
                "base": 2 * unet, "encoders and VAE": 4 * (text + vae) + 2 * tower,
                "stored latents": 8 * 16 * 51 * 4 * 64 * 64 * 4}
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    each = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in bytes_of.items())
    assert line.startswith(f"memory   {each}: {sum(bytes_of.values()) / 2**30:.2f} GiB, ")
    assert "docs/speed.md" in line


# -------------------------------------------------------------------------------- files from others

class Malicious:
    """Opened by an unpickler that runs what it reads, this makes a file."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def model_copy(folder, *without):
    """The shapes world's folder, without some of its files; weights are linked."""
    return Path(shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns(*without),
                                copy_function=os.link))


def rewrite(path, **changes):
    """Change a JSON file; the copy has a link to the original, which must not change."""
    old = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(old | changes))


def test_a_malicious_pickle_never_runs(tmp_path, quick, undisturbed):
    marker = tmp_path / "it ran"
    bomb = pickle.dumps(Malicious(marker))
    run = shutil.copytree(undisturbed, tmp_path / "run")
    newest = run / "checkpoint-000002"
    for plant, kind in ((lambda: (newest / "optimizer.pt").write_bytes(bomb), "UnpicklingError"),
                        (lambda: torch.save(Malicious(marker), newest / "optimizer.pt"), "UnpicklingError"),
                        (lambda: (newest / UNET).write_bytes(bomb), "SafetensorError")):
        plant()
        with pytest.raises(ValueError, match=f"cannot be read .*{kind}"):
            quick("--out", run, "--resume", "--epochs", 3)
    beside = model_copy(tmp_path / "beside")
    for part, name in (("unet", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"),
                       ("text_encoder", "pytorch_model.bin"), ("text_encoder", "model.pt")):
        (beside / part / name).write_bytes(bomb)
    load_pipeline(str(beside))  # the safetensors beside them are what is read
    alone = model_copy(tmp_path / "alone", "diffusion_pytorch_model.safetensors")
    for part in ("unet", "vae"):
        (alone / part / "diffusion_pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match="opening a pickle can run code"):
        load_pipeline(str(alone))
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # it would have


def test_prompt_text_is_only_text(tmp_path, quick, capsys):
    """Nothing in it is run, opened, formatted or made a file name of; too long a one is cut and named."""
    nasty = ["../../etc/passwd; rm -rf ~ $(touch owned) `touch owned` {0} {args.out} %s %n", "a star " * 40]
    (tmp_path / "prompts.txt").write_text("\n".join(["[violence]", *nasty]))
    quick("--epochs", 1, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert "no benign prompts: what holds utility is the KL to the base (--kl 0.04)" in said
    assert all(words in said for words in ("2 of 2 prompts are longer than CLIP's 16 tokens",
                                           "'a star a star", "(82 tokens)"))
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.txt", "run"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock", "flags.json", "metrics.jsonl", "checkpoint-000001", "final", "table.md"}


# -------------------------------------------------------------------------------- bad inputs

FLAGS = [
    ("--group 1", "at least 2"), ("--group 0", "at least 2"), ("--group two", "invalid int value: 'two'"),
    ("--eta 0", "no density to train"), ("--eta 1.5", "at most 1"), ("--eta nan", "a finite number"),
    ("--timestep-fraction 0", "above 0"), ("--timestep-fraction 1.1", "at most 1"),
    ("--learning-rate -0.0001", "above 0"), ("--learning-rate 0", "above 0"),
    ("--learning-rate nan", "a finite number"), ("--kl -1", "at least 0"),
    ("--kl-benign -1", "at least 0"), ("--kl inf", "a finite number"),
    ("--skip-last 4", "below --steps 4"), ("--skip-last -1", "at least 0"), ("--steps 0", "from 1 to 1000"),
    ("--steps 1001", "from 1 to 1000"), ("--updates 0", "at least 1"),
    ("--updates 9", "a rollout has 8 transitions"), ("--micro-batch 0", "at least 1"),
    ("--sample-batch -3", "at least 1"), ("--epochs 0", "at least 1"),
    ("--prompts-per-rollout 0", "at least 1"), ("--unsafe-fraction 2", "from 0 to 1"),
    ("--clip-range 0", "above 0"), ("--guidance -1", "above 0"), ("--alpha -0.5", "at least 0"),
    ("--ema 1", "below 1"), ("--decay-epochs -1", "at least 0"), ("--max-grad-norm 0", "above 0"),
    ("--keep 0", "at least 1"), ("--save-every 0", "at least 1"), ("--picture-every 0", "at least 1"),
    ("--weight-decay -1", "at least 0"), ("--lora-rank -2", "at least 0"),
    ("--resume --overwrite", "give one of them"), ("--no-such-flag 3", "unrecognized arguments"),
    ("--steer some", "invalid choice"), ("--precision fp16", "invalid choice"),
    ("--device banana", "--device banana"), ("--device cuda:99", "not usable here"),
    ("--resume", "there is no run at")]

FILES = [
    ("--prompts {}/none.txt", "No such file"), ("--prompts {}/empty.txt", "no prompt in it"),
    ("--prompts {}/comments.txt", "no prompt in it"), ("--prompts {}/latin1.txt", "not UTF-8 (byte 2)"),
    ("--prompts {}", "Is a directory"), ("--prompts {}/same.txt {}/none.txt", "No such file"),
    ("--benign {}/none.txt", "No such file"), ("--benign {}/empty.txt", "no prompt in it"),
    ("--anchors {}/none.txt", "No such file"), ("--anchors {}/one_section.txt", "under [unsafe]"),
    ("--anchors {}/empty_section.txt", "under [unsafe]"), ("--anchors {}/same.txt", "would be zero"),
    ("--anchors {}/other_section.txt", "found ['maybe']"), ("--out {}/empty.txt/run", "cannot be written"),
    ("--out {}/old_run", "--overwrite replaces it"), ("--model /no/such/folder", "no such folder"),
    ("--model {}/model.ckpt", "opening a pickle can run code"),
    ("--model {}/text_only", "no model_index.json"), ("--model {}/no_vae", "lacks the component vae/"),
    ("--model {}/no_scheduler", "lacks the component scheduler/"),
    ("--model {}/pickled", "opening a pickle can run code"),
    ("--model {}/torn", "not a whole safetensors file"), ("--model {}/code", "code of its own (mine.py)"),
    ("--model {}/inpainting", "takes 9 channels"), ("--model {}/wide", "reads text of width 2048"),
    ("--model nobody/not-on-this-disk", "nobody/not-on-this-disk"), ("--model nobody:sub", "snapshot"),
    ("--clip /no/such/folder", "no such folder"), ("--clip {}/text_only", "clip_text_model"),
    ("--clip {}/projection", "its text_projection.weight is [64, 96]"),
    ("--clip {}/torn_clip", "not a whole safetensors"),
    ("--clip {}/pickled_clip", "opening a pickle can run code"), ("--clip {}/no_vae/unet", "model_type"),
    ("--clip {}/model.ckpt", "opening a pickle can run code")]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of bad prompt files, anchors, runs and models."""
    root = tmp_path_factory.mktemp("bad")
    for name, text in dict(empty="", comments="# nothing\n[benign]\n", one_section="[safe]\na calm star\n",
                           empty_section="[safe]\na star\n[unsafe]\n",
                           other_section="[safe]\na\n[unsafe]\nb\n[maybe]\nc\n",
                           same="[safe]\na star\na ring\n[unsafe]\na ring\na star\n").items():
        (root / f"{name}.txt").write_text(text)
    (root / "latin1.txt").write_bytes("caf\xe9".encode("latin-1")[1:])
    (root / "model.ckpt").write_bytes(pickle.dumps(Malicious(root / "it ran")))
    (root / "old_run").mkdir()
    (root / "old_run" / "metrics.jsonl").write_text("")
    for name, without in (("no_vae", "vae"), ("no_scheduler", "scheduler"), ("pickled", "*.safetensors"),
                          ("torn", ""), ("code", ""), ("inpainting", ""), ("wide", "")):
        model_copy(root / name, without)
    for part in ("unet", "vae"):
        (root / "pickled" / part / "diffusion_pytorch_model.bin").write_bytes(
            pickle.dumps(Malicious(root / "it ran")))
    torn = root / "torn" / UNET
    half = torn.read_bytes()[:100_000]
    torn.unlink()
    torn.write_bytes(half)
    (root / "code" / "unet" / "mine.py").write_text("class Mine: pass")
    rewrite(root / "inpainting" / "unet" / "config.json", in_channels=9)
    rewrite(root / "wide" / "unet" / "config.json", cross_attention_dim=2048)
    for name in ("text_only", "projection", "torn_clip", "pickled_clip"):
        shutil.copytree(MODEL / "text_encoder", root / name)
    rewrite(root / "text_only" / "config.json", model_type="clip_text_model")
    rewrite(root / "projection" / "config.json", projection_dim=512)
    (root / "torn_clip" / "model.safetensors").write_bytes(half)
    (root / "pickled_clip" / "model.safetensors").rename(root / "pickled_clip" / "pytorch_model.bin")
    return root


@pytest.mark.parametrize("words, said", FLAGS + FILES)
def test_bad_input_is_refused_before_loading(words, said, bad, tmp_path, quick, monkeypatch, capsys):
    """In this process, as the script's last lines do it: any other exception would be a traceback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if "nobody" not in words:  # a hub id is known when it is fetched
        monkeypatch.setattr(train, "load_clip", None)
        monkeypatch.setattr(train, "load_pipeline", None)
    start = time.perf_counter()
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        quick("--device", "cpu", "--out", tmp_path / "run", *words.replace("{}", str(bad)).split())
    assert time.perf_counter() - start < 10
    message = (capsys.readouterr().err.strip().splitlines()[-1] if error.type is SystemExit
               else str(error.value))
    assert said in message and "Traceback" not in message and error.value.args != (0,)
    assert not (tmp_path / "run" / "flags.json").exists() and not (bad / "it ran").exists()


def test_benign_prompts_are_a_default(models):
    """Besides those of --prompts; a file that stands there already is read once, however it is written."""
    benign, shapes = ROOT / "prompts" / "benign.txt", SHAPES / "prompts.txt"
    read = lambda *words: checks.read_inputs(train.parse_args(tiny(models, *words)))[0]
    without, with_it = read(), read("--benign", benign)
    assert with_it == without + texts.read_prompts([benign]) and len(without) == 240
    again = benign.parent / ".." / "prompts" / "benign.txt"
    assert read("--prompts", shapes, again, "--benign", benign) == with_it
    default = train.parse_args([])
    assert checks.prompt_files(default) == [str(ROOT / "prompts" / "i2p.txt"), str(benign)]


def test_no_gpu_for_a_full_size_model(models, monkeypatch, tmp_path):
    """A hub id, or a folder with 3.4 GB of weights; a small folder is welcome, and so is who asks for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "unet").mkdir()
    with open(tmp_path / "unet" / "a.safetensors", "wb") as sparse:
        sparse.truncate(4 * 859_520_964)
    for model in ([], ["--model", str(tmp_path)]):
        with pytest.raises(ValueError, match="no GPU found.*\n.*shapes.train.*\n.*--device cpu"):
            checks.choose_device(train.parse_args(model))
        assert checks.choose_device(train.parse_args([*model, "--device", "cpu"])).type == "cpu"
    args = train.parse_args(tiny(models))
    assert checks.choose_device(args).type == "cpu" and (args.device, args.precision) == ("cpu", "float32")


def test_bf16_on_a_card_that_has_none(models, monkeypatch):
    args = train.parse_args(tiny(models, "--device", "cuda", "--precision", "bf16"))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has none; use --precision float32"):
        checks.choose_device(args)
    args.precision = None
    checks.choose_device(args)
    assert args.precision == "float32"


def test_the_scripts_last_lines_refuse_in_one_line(models, tmp_path, monkeypatch):
    for words, said in (("--prompts none.txt", "[Errno 2] No such"), ("--group 1", "--group 1: must be")):
        argv = tiny(models, "--out", tmp_path / "run", *words.split())
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert ended.value.code.startswith("train.py: " + said)
    assert not (tmp_path / "run").exists()
