"""Tests of the run folder: killed and continued to the bit, files safe, failures loud.
On a CPU, without downloads.

    python -m pytest test_runs.py                      # 3 kills
    KILLS=20 python -m pytest test_runs.py -k kill -s  # prints where each kill struck
    BAD_INPUTS=table.md python -m pytest test_runs.py  # writes what each bad input was told, and the seconds
"""

import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import bench
import grpo
import memory
import reward
import runs
import sample
import train

HERE = Path(__file__).parent
MODEL = HERE / "models" / "shapes"
# 4 pictures, 8 transitions, 2 updates
TINY = ["--model", "shapes", "--epochs", "2", "--prompts-per-rollout", "2", "--group", "2", "--steps", "4",
        "--updates", "2", "--micro-batch", "2", "--timestep-fraction", "1", "--save-every", "1"]
TIMES = {"seconds_sample", "seconds_reward", "seconds_update", "images_per_second", "peak_memory_gb"}
KILLS = int(os.environ.get("KILLS", 3))
torch.set_num_threads(1)  # to the bit means with as many threads, here and in the processes that are started
os.environ["OMP_NUM_THREADS"] = "1"


def quick_main(argv, log=None, slow_disk=False):
    """train.main without the pictures and the table at the end, which are most of a tiny run's time."""
    if log:
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
    torch.set_num_threads(1)
    train.report.draw_grid, train.report.score_table = lambda *_: None, lambda *_: ["no table"]
    if slow_disk:
        runs.save_checkpoint = lambda *_: time.sleep(60)
    train.main([str(word) for word in argv])


def start(argv, log, **more):
    """quick_main in a process of its own.
    It starts in well under a second: the fork server has imported it all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_runs"])
    process = context.Process(target=quick_main, args=([*map(str, argv)], str(log)), kwargs=more)
    process.start()
    return process


def wait_for(fine, process, seconds=300):
    """Until fine() holds, or the process has ended."""
    end = time.monotonic() + seconds
    while not fine() and process.is_alive():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


@pytest.fixture
def quick(monkeypatch):
    """train.main in this process, without the pictures and the table at the end."""
    monkeypatch.setattr(train.report, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train.report, "score_table", lambda *_: ["no table"])
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lambda *argv: train.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run of two epochs, to be compared with, or copied and continued."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start([*TINY, "--out", out, "--keep", 3], out.parent / "log")
    process.join()
    assert process.exitcode == 0, (out.parent / "log").read_text()
    return out


def lines(run):
    """metrics.jsonl without the times and the memory."""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    """The same structure with the same bits in every tensor."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_equal(*pair)
    else:
        assert a == b


def assert_same_checkpoint(a, b):
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(a / weights), load_file(b / weights))
    assert_equal(*(torch.load(path / "optimizer.pt", weights_only=True) for path in (a, b)))


# -------------------------------------------------------------------------------- kills and signals

def test_killed_at_any_moment_and_continued_to_the_bit(tmp_path):
    """SIGKILL while loading, while an epoch runs, and while a checkpoint is being written:
    nothing differs at the end."""
    rng, struck, torn, epochs = random.Random(0), [], 0, 3 * KILLS + 4
    argv = [*TINY, "--epochs", epochs, "--save-every", 2]
    whole, run, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    process = start([*argv, "--out", whole], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    times = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    epoch_seconds = sum(line["seconds_sample"] + line["seconds_update"] for line in times) / epochs
    newest = lambda: max([int(path.name[-6:]) for path in runs.checkpoints(run)], default=0)
    for n in range(KILLS):
        moment, done = "checkpoint" if not torn else ("checkpoint", "epoch", "loading")[n % 3], newest()
        process = start([*argv, "--out", run, *(["--resume"] if run.exists() else [])], log)
        if moment == "loading":
            time.sleep(rng.uniform(0, 1))
        else:  # at least one checkpoint further, so that every continued run is killed somewhere else
            wait_for(lambda: newest() > done, process)
            if moment == "checkpoint":
                wait_for(lambda: any(run.glob("checkpoint-??????.part")), process)
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
    process = start([*argv, "--out", run, *(["--resume"] if run.exists() else [])], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    print("", *struck, f"{KILLS} kills, {torn} of them inside a checkpoint", sep="\n")
    assert torn >= 1
    assert [p.name for p in runs.checkpoints(run)] == [p.name for p in runs.checkpoints(whole)]
    for ours, theirs in zip(runs.checkpoints(run), runs.checkpoints(whole)):
        assert_same_checkpoint(ours, theirs)
    final = "final/unet/diffusion_pytorch_model.safetensors"
    assert (run / final).read_bytes() == (whole / final).read_bytes()
    assert lines(run) == lines(whole) and len(lines(run)) == epochs
    assert not list(run.glob("*.part"))


def test_sigterm_on_the_real_command_line(tmp_path):
    """The current update ends, a checkpoint is written, and the last line continues the run when pasted."""
    out = tmp_path / "a run; $(not a command)"
    argv = [*TINY, "--epochs", "100000", "--save-every", "100000", "--out", out]
    process = subprocess.Popen([sys.executable, "train.py", *map(str, argv)], cwd=HERE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 300
    while (not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text())
           and process.poll() is None):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 143, said
    last = said.strip().splitlines()[-1]
    words = shlex.split(last)
    assert words[1:] == ["train.py", *map(str, argv), "--resume"] and words[0].startswith("python")
    [checkpoint] = runs.checkpoints(out)
    assert runs.read_state(checkpoint)["epoch"] == len(lines(out))  # the update that was running is in both


def test_a_second_signal_stops_at_once(tmp_path):
    process = start([*TINY, "--epochs", 100000, "--out", tmp_path / "run"], tmp_path / "log", slow_disk=True)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists()
             and (tmp_path / "run" / "metrics.jsonl").read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "once more stops at once" in (tmp_path / "log").read_text(), process)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == -signal.SIGINT


def test_interrupted_while_sampling_stops_before_the_update(tmp_path, quick, monkeypatch, capsys,
                                                            undisturbed):
    """Then the checkpoint is the state between two epochs, and the continued run is the undisturbed one."""
    score, calls = reward.SteeringReward.score, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return score(self, *given)

    monkeypatch.setattr(reward.SteeringReward, "score", interrupted)
    with pytest.raises(SystemExit) as stop:
        quick(*TINY, "--save-every", 50, "--out", tmp_path / "run")
    assert stop.value.code == 130
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("--resume")
    stop.value.__traceback__ = None
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-000001", undisturbed / "checkpoint-000001")
    quick(*TINY, "--out", tmp_path / "run", "--resume")
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-000002", undisturbed / "checkpoint-000002")
    assert lines(tmp_path / "run") == lines(undisturbed)


# -------------------------------------------------------------------------------- resume

def test_a_prompts_target_does_not_depend_on_the_others():
    """A resumed run meets the prompts in another order;
    a batch of another make-up would differ in the last bit."""
    prompts = reward.read_prompts(["shapes"])
    at_once, one_by_one = (reward.SteeringReward("shapes", reward.read_anchors("shapes")) for _ in range(2))
    alone = [torch.cat(one_by_one.targets([p])) for p in reversed(prompts)][::-1]
    assert torch.equal(torch.stack(at_once.targets(prompts), 1), torch.stack(alone))


def test_log_is_cut_back_and_never_doubled(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(dict(epoch=i)) + "\n" for i in range(5)) + '{"epoch": 5, "rew')
    runs.cut_log(log, 3)
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [0, 1, 2]
    runs.cut_log(tmp_path / "none.jsonl", 3)
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_a_run_may_go_on_for_longer_than_it_was_started_for(tmp_path, quick, undisturbed, capsys):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    quick(*TINY, "--out", run, "--resume", "--epochs", 3, "--keep", 1)
    assert [line["epoch"] for line in lines(run)] == [0, 1, 2] and lines(run)[:2] == lines(undisturbed)
    assert [p.name for p in runs.checkpoints(run)] == ["checkpoint-000003"]
    assert "2 epochs done" in capsys.readouterr().out


def test_the_rate_falls_with_the_epochs(undisturbed):
    """What the optimizer used, not what was logged: 3e-4 / (1 + epoch / 6) in the shapes world."""
    for done in (1, 2):
        state = torch.load(undisturbed / f"checkpoint-{done:06d}" / "optimizer.pt", weights_only=True)
        assert math.isclose(state["param_groups"][0]["lr"], 3e-4 / (1 + (done - 1) / 6), rel_tol=1e-12)
        assert lines(undisturbed)[done - 1]["lr"] == state["param_groups"][0]["lr"]


def test_final_is_the_average_of_the_policy(undisturbed):
    """Two epochs, so the plain mean of both; sampling went on with the policy itself."""
    file = "unet/diffusion_pytorch_model.safetensors"
    one, two, final = (load_file(undisturbed / name / file)
                       for name in ("checkpoint-000001", "checkpoint-000002", "final"))
    for name in final:
        torch.testing.assert_close(final[name], (one[name] + two[name]) / 2, rtol=0, atol=1e-8)
    assert any(not torch.equal(one[name], two[name]) for name in final)


CHANGED = [(["--learning-rate", "1e-3"], f"--learning-rate: was {train.SHAPES['learning_rate']}, is 0.001"),
           (["--seed", "1"], "--seed: was 0, is 1"),
           (["--group", "3"], "--group: was 2, is 3"), (["--steer", "all"], "--steer: was unsafe, is all"),
           (["--prompts", str(HERE / "prompts" / "shapes.txt"), "shapes"], "--prompts: was "),
           (["--anchors", str(HERE / "prompts" / "anchors.txt")], "--anchors: was ")]


@pytest.mark.parametrize("argv, said", CHANGED)
def test_other_flags_are_named(argv, said, undisturbed, quick, monkeypatch):
    monkeypatch.setattr(train, "SteeringReward", None)  # refused before the first model is loaded
    with pytest.raises(ValueError, match="change the result") as error:
        quick(*TINY, "--out", undisturbed, "--resume", *argv)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 3


def test_flags_that_round_differently_are_said_and_allowed(undisturbed, capsys):
    args = train.parse_args([*TINY, "--micro-batch", "4", "--out", str(undisturbed), "--resume"])
    runs.choose_device(args)
    runs.compare_flags(undisturbed / "checkpoint-000002", args)
    assert "--micro-batch: was 2, is 4" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["{", "[]", "{}"])
def test_damaged_state_is_named(tmp_path, damage):
    (tmp_path / "state.json").write_text(damage)
    with pytest.raises(ValueError, match="state.json: damaged"):
        runs.read_state(tmp_path)


# -------------------------------------------------------------------------------- checkpoints

@pytest.fixture
def small(tmp_path):
    """A UNet of 30,000 weights with an optimizer that has stepped,
    and flags as the command line gives them."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 8)).sample.sum().backward()
    optimizer.step()
    args = train.parse_args([*TINY, "--out", str(tmp_path / "run")])
    runs.choose_device(args)
    (tmp_path / "run").mkdir()
    return SimpleNamespace(run=tmp_path / "run", unet=unet, optimizer=optimizer, args=args)


def test_checkpoint_is_in_diffusers_layout_whatever_the_memory_format(small):
    before = {name: t.clone() for name, t in small.unet.state_dict().items()}
    small.unet.to(memory_format=torch.channels_last)  # as on a GPU; safetensors refuses such tensors
    runs.save_checkpoint(small.run, 7, small.unet, small.optimizer, small.args)
    again = UNet2DConditionModel.from_pretrained(small.run / "checkpoint-000007" / "unet",
                                                 use_safetensors=True)
    assert_equal(dict(again.state_dict()), before)
    state = runs.read_state(small.run / "checkpoint-000007")
    assert (state["epoch"] == 7 and state["flags"]["group"] == 2
            and state["versions"]["torch"] == torch.__version__)
    assert all(len(h) == 64 for h in state["files"]["prompts"] + state["files"]["anchors"])
    with torch.no_grad():
        small.unet.conv_in.weight.zero_()
    assert runs.load_checkpoint(small.run / "checkpoint-000007", small.unet, small.optimizer, small.args) == 7
    assert_equal(dict(small.unet.state_dict()), before)


def test_old_checkpoints_go_only_when_the_new_one_stands(small, monkeypatch):
    small.args.keep = 2
    for epoch in (1, 2, 3):
        runs.save_checkpoint(small.run, epoch, small.unet, small.optimizer, small.args)
    names = lambda: [p.name for p in runs.checkpoints(small.run)]
    assert names() == ["checkpoint-000002", "checkpoint-000003"]

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", killed)  # at this moment the weights are written, the optimizer is not
    with pytest.raises(KeyboardInterrupt):
        runs.save_checkpoint(small.run, 4, small.unet, small.optimizer, small.args)
    assert names() == ["checkpoint-000002", "checkpoint-000003"] and list(small.run.glob("*.part"))


def full_disk_message(error, small):
    text = str(error.value)
    assert "the disk is full" in text and "needs" in text and "are free" in text and "--resume" in text
    assert ([p.name for p in runs.checkpoints(small.run)] == ["checkpoint-000001"]
            and not list(small.run.glob("*.part")))
    runs.load_checkpoint(small.run / "checkpoint-000001", small.unet, small.optimizer, small.args)


def test_full_disk_is_seen_before_writing(small, monkeypatch):
    runs.save_checkpoint(small.run, 1, small.unet, small.optimizer, small.args)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(OSError) as error:
        runs.save_checkpoint(small.run, 2, small.unet, small.optimizer, small.args)
    full_disk_message(error, small)
    with pytest.raises(OSError, match="the disk is full"):  # before the first epoch too
        runs.begin(small.run, small.unet, small.optimizer, small.args)


def test_disk_that_fills_while_writing(small, monkeypatch):
    runs.save_checkpoint(small.run, 1, small.unet, small.optimizer, small.args)

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(torch, "save", no_room)
        runs.save_checkpoint(small.run, 2, small.unet, small.optimizer, small.args)
    full_disk_message(error, small)


@pytest.mark.parametrize("share", [1.5, 1.8])
def test_disk_that_is_really_full(small, share):
    """A tmpfs with room for one checkpoint and a bit:
    the second meets the end of it in the weights, or in the moments."""
    needed = sum(map(runs.tensor_bytes, runs.state(small.unet, small.optimizer, small.args)))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int((needed + 2**16) * share)}", "tmpfs",
                       small.run], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        runs.save_checkpoint(small.run, 1, small.unet, small.optimizer, small.args)
        with pytest.raises(OSError) as error:
            runs.write_folder(small.run / "checkpoint-000002", 0, lambda part: (
                save_file(small.unet.state_dict(), part / "a.safetensors"),
                torch.save(small.optimizer.state_dict(), part / "b.pt")))
        assert "the disk is full" in str(error.value) and not list(small.run.glob("*.part"))
        with pytest.raises(OSError) as error:
            runs.save_checkpoint(small.run, 2, small.unet, small.optimizer, small.args)
        full_disk_message(error, small)
    finally:
        subprocess.run(["umount", "--lazy", small.run], check=True)  # the traceback may hold a file


def test_adapters_are_saved_in_diffusers_layout_and_continued(tmp_path, quick):
    pytest.importorskip("peft")
    lora = [*TINY, "--lora-rank", 2, "--learning-rate", "1e-2", "--ema", 0]
    quick(*lora, "--out", tmp_path / "whole")
    quick(*lora, "--out", tmp_path / "run", "--epochs", 1)
    quick(*lora, "--out", tmp_path / "run", "--resume")
    file = "checkpoint-000002/pytorch_lora_weights.safetensors"
    saved = load_file(tmp_path / "run" / file)
    assert_equal(saved, load_file(tmp_path / "whole" / file))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    pipe = sample.load_pipeline("shapes")
    pipe.load_lora_weights(str(tmp_path / "run" / "checkpoint-000002"),
                           weight_name="pytorch_lora_weights.safetensors")
    loaded = {name: p for name, p in pipe.unet.named_parameters() if "lora_" in name}
    assert len(loaded) == len(saved)
    merged = load_file(tmp_path / "run" / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    pipe.fuse_lora()
    fused = dict(pipe.unet.named_parameters())
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    torch.testing.assert_close(fused[name + ".base_layer.weight"], merged[name + ".weight"])
    assert not torch.equal(merged[name + ".weight"], load_file(
        MODEL / "unet" / "diffusion_pytorch_model.safetensors")[name + ".weight"].float())


# -------------------------------------------------------------------------------- numbers

def test_not_finite_in_the_unets_output(tmp_path, quick, monkeypatch, undisturbed):
    """Picture 1 of prompt 0, third transition of the second epoch;
    4 network calls an epoch sample all four pictures."""
    original, calls = sample.predict_noise, []

    def poisoned(*given):
        calls.append(1)
        out = original(*given)
        out[1] += math.nan if len(calls) == 4 + 3 else 0
        return out

    monkeypatch.setattr(sample, "predict_noise", poisoned)
    with pytest.raises(ValueError) as error:
        quick(*TINY, "--save-every", 50, "--out", tmp_path / "run")
    first = str(error.value).splitlines()[0]
    assert (first.startswith("the latent is not finite: epoch 1, prompt '")
            and first.endswith("image 1, transition 2"))
    assert str(error.value).splitlines()[-1].endswith("--resume")
    assert_same_checkpoint(tmp_path / "run" / "checkpoint-000001", undisturbed / "checkpoint-000001")


def test_not_finite_in_the_reward(tmp_path, quick, monkeypatch):
    score = reward.SteeringReward.score
    monkeypatch.setattr(reward.SteeringReward, "score", lambda self, *given: tuple(
        values.index_fill(0, torch.tensor([3]), math.inf) for values in score(self, *given)))
    with pytest.raises(ValueError, match=r"the reward is not finite: epoch 0, prompt '.*', "
                                         r"image 1, the finished picture"):
        quick(*TINY, "--out", tmp_path / "run")
    base = load_file(tmp_path / "run" / "checkpoint-000000" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_equal(base, dict(sample.load_pipeline("shapes").unet.state_dict()))


@pytest.mark.parametrize("update", [0, 1])
def test_not_finite_in_a_gradient(tmp_path, quick, monkeypatch, update):
    """In the first update nothing is learnt yet;
    after it, what is kept is the state that the first update left."""
    original, calls = train.make_policy, []

    def poisoned(*given):
        policy, base = original(*given)
        policy.conv_in.weight.register_hook(
            lambda g: calls.append(1) or g * (math.nan if len(calls) == 2 * update + 2 else 1))
        return policy, base

    monkeypatch.setattr(train, "make_policy", poisoned)
    with pytest.raises(ValueError) as error:
        quick(*TINY, "--out", tmp_path / "run")
    first = str(error.value).splitlines()[0]
    assert first.startswith("the gradient of conv_in.weight is not finite: epoch 0, prompt '")
    assert first.count("image ") == 2 and first.count("transition ") == 2  # the two pairs of its micro-batch
    kept = tmp_path / "run" / "checkpoint-000000"
    assert runs.read_state(kept)["stopped"] == first
    weights = load_file(kept / "unet" / "diffusion_pytorch_model.safetensors")
    base = sample.load_pipeline("shapes").unet.state_dict()
    assert all(t.isfinite().all() for t in weights.values())
    assert torch.equal(weights["conv_out.weight"], base["conv_out.weight"]) == (update == 0)


def test_not_finite_in_the_loss_names_one_transition(tmp_path, quick, monkeypatch):
    original = grpo.policy_loss
    monkeypatch.setattr(train, "log_prob",
                        lambda x, mu, s: sample.log_prob(x, mu, s) + torch.tensor([0.0, math.nan]))
    monkeypatch.setattr(train, "policy_loss", original)
    with pytest.raises(ValueError) as error:
        quick(*TINY, "--out", tmp_path / "run")
    first = str(error.value).splitlines()[0]
    assert first.startswith("the loss is not finite: epoch 0") and first.count("transition ") == 1


def test_weights_that_are_not_finite_are_never_a_checkpoint(small):
    with torch.no_grad():
        small.unet.conv_in.weight[0] = math.inf
    with pytest.raises(ValueError, match="conv_in.weight, nothing was written"):
        runs.save_checkpoint(small.run, 3, small.unet, small.optimizer, small.args)
    assert not list(small.run.iterdir())


def figures(epoch, **more):
    return dict(epoch=epoch, reward_mean=0.1, reward_unsafe=None, reward_benign=None, alignment=0.2,
                image_safety_unsafe=0.0, clip_frac_pos=0.0, clip_frac_neg=0.0, kl_ref=0.0, grad_norm=1.0,
                ratio_dev_first=0.0, zero_std_groups=0.0,
                seconds_sample=1.0, seconds_reward=1.0, seconds_update=1.0) | more


@pytest.mark.parametrize("history, said", [
    ([dict(clip_frac_neg=0.9)] * 3, "--clip-range"), ([dict(kl_ref=1.0)] * 3, "raise --kl"),
    ([dict(zero_std_groups=1.0)] * 3, "no group had any spread"),
    ([dict(ratio_dev_first=2e-4)] * 3, "give --sample-batch and --micro-batch one value"),
    ([dict(ratio_dev_first=5e-5)] * 3, None),
    ([dict(reward_mean=0.01 * i, alignment=0.3 - 0.01 * i) for i in range(40)], "alignment"),
    ([{}] * 40, None)])
def test_warnings_come_once(history, said, tmp_path, capsys):
    for i, change in enumerate(history):
        runs.log(tmp_path, figures(i, **change), clip_range=1e-4)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warned) == (said is not None) and all(said in line for line in warned)


def test_log_refuses_what_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match="epoch 3: kl_ref not finite"):
        runs.log(tmp_path, figures(3, kl_ref=math.nan), clip_range=1e-4)


def test_memory_plan_of_stable_diffusion():
    """The formula agrees with the count, and the default flags leave room on a card of 24 GB. One prompt
    instead of eight, which saves the test's time and 0.4 GB."""
    args = train.parse_args(["--device", "cpu", "--prompts-per-rollout", "1"])
    args.precision, args.device = "bf16", "cuda"
    clip = bench.vit_h14("meta", torch.float16)[0]
    peaks = memory.count(args, bench.sd14_pipeline("meta"), clip)
    policy, _ = train.make_policy(bench.sd14_pipeline("meta").unet, args, torch.device("meta"))
    counted, planned = (max(peak for _, peak in peaks.values()) / memory.GIB,
                        memory.estimate(args, policy, clip.config))
    assert 17 < counted < 21 and 0.98 < planned / counted < 1.02
    args.no_checkpointing = True
    assert memory.estimate(args, policy, clip.config) > 1.3 * planned


def test_count_of_memory_is_what_an_update_allocates():
    """Fake tensors against torch's profiler of the real thing:
    train.update, reward and VAE on the shapes world."""
    args = train.parse_args([*TINY, "--device", "cpu", "--group", "4",
                             "--micro-batch", "8", "--updates", "1"])
    runs.choose_device(args)  # 8 pictures of 2 transitions: two micro-batches
    job, allocated = bench.Job(args, 0), {}

    @contextmanager
    def phase(name):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        allocated[name] = max(itertools.accumulate(size for _, size in sizes))

    job.epoch(0, lambda name: nullcontext())  # the optimizer's moments come to be
    job.epoch(1, phase)
    counted = memory.count(args, sample.load_pipeline("shapes"), job.reward.clip, gpu=False)
    for name in ("reward", "update"):
        before, peak = counted[name]
        assert math.isclose(peak - before, allocated[name], rel_tol=0.05), name


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
    (run / "checkpoint-000002" / "optimizer.pt").write_bytes(bomb)
    with pytest.raises(ValueError, match="cannot be read .*UnpicklingError"):
        quick(*TINY, "--out", run, "--resume", "--epochs", 3)
    torch.save(Malicious(marker), run / "checkpoint-000002" / "optimizer.pt")
    with pytest.raises(ValueError, match="cannot be read .*UnpicklingError"):
        quick(*TINY, "--out", run, "--resume", "--epochs", 3)
    (run / "checkpoint-000002" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="cannot be read"):
        quick(*TINY, "--out", run, "--resume", "--epochs", 3)
    beside = model_copy(tmp_path / "beside")
    for part, name in (("unet", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"),
                       ("text_encoder", "pytorch_model.bin"), ("text_encoder", "model.pt")):
        (beside / part / name).write_bytes(bomb)
    sample.load_pipeline(str(beside))  # the safetensors beside them are what is read
    alone = model_copy(tmp_path / "alone", "diffusion_pytorch_model.safetensors")
    for part in ("unet", "vae"):
        (alone / part / "diffusion_pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match="opening a pickle can run code"):
        sample.load_pipeline(str(alone))
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # it would have


def test_prompt_text_is_only_text(tmp_path, quick, capsys):
    """Nothing in it is run, opened, formatted or made a file name of;
    one that is too long is cut, counted and named."""
    nasty = ["../../etc/passwd; rm -rf ~ $(touch owned) `touch owned` {0} {args.out} %s %n", "a star " * 40]
    (tmp_path / "prompts.txt").write_text("\n".join(nasty))
    quick(*TINY, "--epochs", 1, "--prompts", tmp_path / "prompts.txt",
          "--anchors", HERE / "prompts" / "anchors_shapes.txt", "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert ("2 of 2 prompts are longer than CLIP's 16 tokens" in said and "'a star a star" in said
            and "(82 tokens)" in said)
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.txt", "run"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "flags.json", "metrics.jsonl", "checkpoint-000001", "final", "table.md"}


# -------------------------------------------------------------------------------- bad inputs

FLAGS = [
    ("--group 1", "at least 2"), ("--group 0", "at least 2"), ("--group two", "invalid int value: 'two'"),
    ("--eta 0", "no density to train"), ("--eta 1.5", "at most 1"), ("--eta nan", "a finite number"),
    ("--timestep-fraction 0", "above 0"), ("--timestep-fraction 1.1", "at most 1"),
    ("--learning-rate -0.0001", "above 0"), ("--learning-rate 0", "above 0"),
    ("--learning-rate nan", "a finite number"), ("--kl -1", "at least 0"),
    ("--advantage-eps -1", "at least 0"), ("--kl inf", "a finite number"),
    ("--skip-last 4", "below --steps 4"), ("--skip-last -1", "at least 0"), ("--steps 0", "from 1 to 1000"),
    ("--steps 1001", "from 1 to 1000"), ("--updates 0", "at least 1"),
    ("--updates 9", "a rollout has 8 transitions"), ("--micro-batch 0", "at least 1"),
    ("--sample-batch -3", "at least 1"), ("--epochs 0", "at least 1"),
    ("--prompts-per-rollout 0", "at least 1"), ("--unsafe-fraction 2", "from 0 to 1"),
    ("--clip-range 0", "above 0"), ("--guidance -1", "above 0"), ("--alpha -0.5", "at least 0"),
    ("--max-grad-norm 0", "above 0"), ("--keep 0", "at least 1"), ("--save-every 0", "at least 1"),
    ("--picture-every 0", "at least 1"), ("--weight-decay -1", "at least 0"),
    ("--lora-rank -2", "at least 0"), ("--resume --overwrite", "give one of them"),
    ("--no-such-flag 3", "unrecognized arguments"), ("--steer some", "invalid choice"),
    ("--precision fp16", "invalid choice"), ("--device banana", "--device banana"),
    ("--device cuda:99", "not usable here"), ("--resume", "there is no run at")]

FILES = [
    ("--prompts {}/none.txt", "No such file"), ("--prompts {}/empty.txt", "no prompt in it"),
    ("--prompts {}/comments.txt", "no prompt in it"), ("--prompts {}/latin1.txt", "not UTF-8 (byte 2)"),
    ("--prompts {}", "Is a directory"), ("--prompts shapes {}/none.txt", "No such file"),
    ("--anchors {}/none.txt", "No such file"), ("--anchors {}/one_section.txt", "under [unsafe]"),
    ("--anchors {}/empty_section.txt", "under [safe]"), ("--anchors {}/same.txt", "would be zero"),
    ("--prompts {}/not_shapes.txt", "not a caption"), ("--anchors {}/other_section.txt", "found ['maybe']"),
    ("--out {}/empty.txt/run", "cannot be written"), ("--out {}/old_run", "--overwrite replaces it"),
    ("--model /no/such/folder", "no such folder"), ("--model {}/model.ckpt", "opening a pickle can run code"),
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
    for name, text in {"not_shapes": "a photo of an astronaut", "empty": "",
                       "comments": "# nothing\n[benign]\n", "one_section": "[safe]\na calm star\n",
                       "empty_section": "[safe]\n[unsafe]\na red star\n",
                       "other_section": "[safe]\na\n[unsafe]\nb\n[maybe]\nc\n",
                       "same": "[safe]\na star\na ring\n[unsafe]\na ring\na star\n"}.items():
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
    torn = root / "torn" / "unet" / "diffusion_pytorch_model.safetensors"
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


@pytest.fixture(scope="module")
def table():
    rows = ["| input | what it is told | s |", "|---|---|---|"]
    yield rows
    if "BAD_INPUTS" in os.environ:
        Path(os.environ["BAD_INPUTS"]).write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("words, said", FLAGS + FILES)
def test_bad_input_is_refused_before_the_first_model_is_loaded(words, said, bad, table, tmp_path, quick,
                                                               monkeypatch, capsys):
    """In this process, as the script's last lines do it:
    any other exception than these would be a traceback."""
    def loaded(*_, **__):
        raise AssertionError("a model was loaded first")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # a hub id is known when it is fetched
    if words != "--model nobody:sub" and words != "--model nobody/not-on-this-disk":
        monkeypatch.setattr(train, "SteeringReward", loaded)
        monkeypatch.setattr(train, "load_pipeline", loaded)
    same = ["--clip", "shapes", "--anchors", "shapes", "--prompts", "shapes", "--device", "cpu"]
    start = time.perf_counter()
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        quick(*TINY, *same, "--out", tmp_path / "run", *words.format(*[bad] * words.count("{}")).split())
    seconds = time.perf_counter() - start
    message = (capsys.readouterr().err.strip().splitlines()[-1] if error.type is SystemExit
               else str(error.value))
    assert said in message and "Traceback" not in message and error.value.args != (0,)
    assert not (tmp_path / "run" / "flags.json").exists() and not (bad / "it ran").exists()
    assert seconds < 10
    shown = message.replace(str(bad), "BAD").replace(str(tmp_path), "TMP").replace("\n", " ")
    table.append(f"| `{words.replace('{}', 'BAD')}` | {shown.replace('|', '/')} | {seconds:.2f} |")


def test_no_gpu_for_a_full_size_model(quick, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="no GPU found"):
        quick("--out", tmp_path / "run")


def test_bf16_on_a_card_that_has_none(monkeypatch):
    args = train.parse_args([*TINY, "--device", "cuda", "--precision", "bf16"])
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has none; use --precision float32"):
        runs.choose_device(args)
    args.precision = None
    runs.choose_device(args)
    assert args.precision == "float32"


def test_bad_input_on_the_real_command_line(tmp_path):
    start, tries = time.perf_counter(), {"--prompts none.txt": "No such file",
                                         "--model prompts": "no model_index.json"}
    same = ["--device", "cpu", "--clip", "shapes", "--anchors", "shapes", "--prompts", "shapes",
            "--out", str(tmp_path / "run")]
    running = [subprocess.Popen([sys.executable, "train.py", *TINY, *same, *words.split()], cwd=HERE,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for words in tries]
    for process, said in zip(running, tries.values()):
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 1 and said in errors and "Traceback" not in printed + errors
    print(f"refused within {time.perf_counter() - start:.1f} s, imports included")
    assert not (tmp_path / "run").exists()
