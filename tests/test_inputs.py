"""What a user types: flags, files and devices that cannot work are one line before anything is loaded; and
what programs say of themselves."""

import io
import sys
from unittest.mock import Mock

import pytest
import torch
from started import ROOT, tiny

import train
import views.grid
from plumbing import card, stop
from plumbing.models import choose_device

MODEL = ROOT / "shapes" / "weights"
FLAGS = """
[1, inf]: --prompts-per-rollout 0; --sample-batch -3; --keep 0
[2, inf]: --group 1
[1, 1000]: --steps 0; --steps 1001
[0, inf]: --kl -1; --kl inf; --alpha nan; --lora-rank -2
(0, inf]: --guidance 0; --learning-rate nan
(0, 1]: --eta 0; --eta 1.5; --timestep-fraction 0
[0, 1): --ema 1
invalid whole number value: --group two; --steps 1.5
invalid choice: --steer some; --precision fp16
are no more: --skip-last 3
4 transitions a rollout: --updates 5
give one: --resume --overwrite
unrecognized arguments: --no-such-flag 3; --mode a"""


@pytest.mark.parametrize("said, words", [
    (said, words) for said, _, all_of in (line.partition(": ") for line in FLAGS.strip().splitlines())
    for words in all_of.split("; ")])
def test_a_bad_flag_is_one_line_with_its_bound(said, words, models, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(tiny(models, *words.split()))
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1
    assert said in printed.err and words.split()[0] in printed.err


@pytest.mark.parametrize("words, said", [
    ("--prompts {}/none.txt", "No such file"), ("--prompts {}/empty.txt", "no prompt in it"),
    ("--prompts {}/latin1.txt", "not UTF-8 (byte 2)"), ("--prompts {}", "Is a directory"),
    ("--prompts {}/good.txt {}/none.txt", "No such file"), ("--anchors {}/good.txt", "anchors need"),
    ("--out {}/good.txt/run", "good.txt"), ("--out {}/old", "--overwrite replaces it"),
    ("--resume", "there is no run at"), ("--model /no/such/folder", "no such folder"),
    ("--clip /no/such/folder", "no such folder"), ("--device banana", "--device banana"),
    ("--device cuda:99", "not usable here"), ("--steps 2 --skip-last 1", "")])
def test_what_cannot_be_read_is_one_line_before_loading(words, said, quick, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    for name, content in (("empty.txt", b"# nothing\n"), ("good.txt", b"[x]\na star\n"),
                          ("latin1.txt", b"af\xe9"), ("old/metrics.jsonl", b"")):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(train, "set_up", Mock(side_effect=MemoryError))
    with pytest.raises((ValueError, OSError) if said else MemoryError) as error:
        quick("--out", tmp_path / "run", *words.replace("{}", str(tmp_path)).split())
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "flags.json").exists()


@pytest.mark.parametrize("words, said", [
    ("--guidance nan", "--guidance"), ("--device cuda:99", "not usable"), ("--out {}/x.txt", "ending"),
    ("--out {}/grid", "such as grid.png"), ("--out {}/file/x.png", "file"),
    ("--compare /none", "--compare /none: no such"), ("--model /none", "--model /none: no such")])
def test_sample_refuses_before_it_loads(words, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("plumbing.models.load_network", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        views.grid.main(["--model", str(MODEL), "--prompt", "a", "--device", "cpu", "--out",
                         str(tmp_path / "a.png"), *words.replace("{}", str(tmp_path)).split()])
    message = capsys.readouterr().err or f"{error.value}\n"
    assert said in message and message.count("\n") == 1


def test_no_gpu_for_a_full_size_model(models, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "unet").mkdir()
    with open(tmp_path / "unet" / "a.safetensors", "wb") as sparse:
        sparse.truncate(4 * 859_520_964)
    with pytest.raises(ValueError, match="no GPU found.*\n.*shapes.train.*\n.*--device cpu"):
        choose_device(train.parse_args(["--model", str(tmp_path)]))
    choose_device(train.parse_args(["--model", str(tmp_path), "--device", "cpu"]))
    choose_device(args := train.parse_args(tiny(models)))
    assert (args.device, args.precision) == ("cpu", "float32")


def test_bf16_on_a_card_that_has_none_and_more_processes_than_cards(models, monkeypatch):
    zeros, args = torch.zeros, train.parse_args(tiny(models, "--precision", "bf16"))
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    for name, value in (("is_available", True), ("device_count", 1), ("is_bf16_supported", False)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    with pytest.raises(ValueError, match="bf16: .* has none; use --precision float32"):
        choose_device(args)
    args.precision = None
    choose_device(args)
    assert (args.device, args.precision) == ("cuda", "float32")
    monkeypatch.setattr("plumbing.parallel.world", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="1 GPU"):
        choose_device(args)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 23 GiB.")


@pytest.mark.parametrize("reason, code, said", [
    (KeyboardInterrupt(), 130, ""), (ValueError("bad"), "x.py: bad", ""), (RuntimeError("ours"), None, ""),
    (FULL, "x.py: ", "CUDA out of memory --sample-batch --micro-batch --lora-rank --batch")])
def test_a_script_ends_in_one_line_and_a_mistake_of_ours_in_a_traceback(reason, code, said):
    with pytest.raises(SystemExit if code else RuntimeError) as ended:
        stop.run_script("x.py", Mock(side_effect=reason))
    found = str(ended.value)
    assert not code or ended.value.code == code or said and found.startswith(code) and "\n" not in found
    assert all(word in found for word in said.split())


@pytest.mark.parametrize("encoding", ["ascii", "koi8-r"])
def test_an_output_of_few_letters_shows_codes(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding))
    stop.run_script("x.py", lambda: print("насилие 暴力", flush=True))
    assert b"\\u66b4" in raw.getvalue()


@pytest.mark.parametrize("words, licence", [([], "creativeml-openrail-m"), (["--model", "a/b:c"], "other")])
def test_the_cards_licence_is_stated_where_it_is_known(words, licence):
    args = train.parse_args(words)
    text = card.model_card(args, args.model, "| a |\n|---|\n| 1 |\n")
    assert text.startswith(f"---\nlicense: {licence}\nbase_model: ")
    assert "\n\n| a |\n|---|\n| 1 |\n\n" in text and "\n--seed 0\n" in text
    assert str(ROOT) not in text and "--out" not in text and "--resume" not in text


def test_prompts_are_shared_evenly_or_not_at_all(monkeypatch, capsys):
    monkeypatch.setattr("plumbing.parallel.world", lambda: 3)
    with pytest.raises(SystemExit):
        train.parse_args(["--prompts-per-rollout", "8"])
    assert "--prompts-per-rollout: no multiple of the 3 processes" in capsys.readouterr().err
