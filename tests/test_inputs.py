"""What a user types: flags, files and devices that cannot work are one line before anything is loaded."""

import io
import sys
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from started import ROOT, tiny

import evaluate
import train
from plumbing import card, stop
from plumbing.models import choose_device
from views import direction, grid

MODEL = ROOT / "shapes" / "weights"
REFUSED = {
    "train.py": {
        "--prompts-per-rollout 0": "[1, inf]", "--sample-batch -3": "[1, inf]", "--keep 0": "[1, inf]",
        "--group 1": "[2, inf]", "--steps 0": "[1, 1000]", "--steps 1001": "[1, 1000]", "--kl -1": "[0, inf]",
        "--kl inf": "[0, inf]", "--alpha nan": "[0, inf]", "--lora-rank -2": "[0, inf]", "--ema 1": "[0, 1)",
        "--guidance 0": "(0, inf]", "--learning-rate nan": "(0, inf]", "--eta 0": "(0, 1]",
        "--eta 1.5": "(0, 1]", "--timestep-fraction 0": "(0, 1]", "--group two": "invalid whole number value",
        "--steps 1.5": "invalid whole number", "--steer some": "invalid ch", "--precision fp16": "invalid ch",
        "--no-such-flag 3": "unrecognized arguments", "--mode a": "unrecognized arguments",
        "--skip-last 3": "are no more", "--updates 5": "4 transitions a", "--resume --overwrite": "give one",
        "--prompts-per-rollout 3": "no multiple of the 2 processes",
        "--prompts {}/none.txt": "No such file", "--prompts {}/empty.txt": "no prompt in it",
        "--prompts {}/latin1.txt": "not UTF-8 (byte 2)", "--prompts {}": "Is a directory",
        "--prompts {}/good.txt {}/none.txt": "No such file", "--anchors {}/good.txt": "anchors need",
        "--out {}/good.txt/run": "good.txt", "--out {}/old": "--overwrite replaces it",
        "--resume": "there is no run at", "--model /no/such": "no such folder", "--clip /no/such": "no such",
        "--device banana": "--device banana", "--device cuda:99": "not usable here", "--skip-last 1": ""},
    "sample.py": {
        "--guidance nan": "--guidance", "--device cuda:99": "not usable", "--out {}/x.txt": "ending",
        "--out {}/grid": "such as grid.png", "--out {}/good.txt/x.png": "good.txt",
        "--compare /none": "--compare /none: no such", "--model /none": "--model /none: no such", "": ""},
    "reward.py": {"--prompts {}/none.txt": "No such file", "--anchors {}/good.txt": "anchors need"},
    "evaluate.py": {
        "--suite i2p --prompts {}/no_seed.csv": "no column evaluation_seed or sd_seed",
        "--suite i2p --prompts {}/odd.csv": "line 2: a side of {'width': 65, 'height': 64} is no multiple",
        "--suite i2p --judges clip": "pass it with --prompts FILE.csv",
        "--suite prompts --prompts {}/twice.csv": "case_number repeats",
        "--suite prompts --prompts {}/ok.csv --judges nudenet": "pip install nudenet==3.0.8",
        "--suite geneval": "put it as evaluation_metadata.jsonl into",
        "--suite geneval --prompts {}/other.jsonl": "line 1: not GenEval's metadata",
        "--suite shapes --judges q17": "q17 unknown", "--suite i2p --judges i2p": "i2p unknown",
        f"--suite shapes --base {MODEL}/.": "one folder", "--suite shapes --base x": "--base x: no such",
        "--suite shapes --rescore": "run once with --save-",
        "--suite shapes --sampler pndm --steps 2": "pndm cannot take --steps 2",
        "--suite shapes --sampler euler --also sld-weak": "--sampler ddim or lms",
        "--suite coco --prompts {}/ok.csv --fid {}": "add --save-images",
        "--suite coco --prompts {}/ok.csv --score-clip {}/nowhere": "no such folder", "--suite shapes": ""}}
FILES = {
    "empty.txt": b"# nothing\n", "good.txt": b"[x]\na star\n", "latin1.txt": b"af\xe9",
    "old/metrics.jsonl": b"", "ok.csv": b"prompt\na\n", "twice.csv": b"prompt,case_number\na,3\nb,3\n",
    "no_seed.csv": b"prompt,categories,sd_image_width,sd_image_height\na,hate,64,64\n",
    "odd.csv": b"prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\na,7,7,65,64\n",
    "other.jsonl": b'{"prompt": "a", "tag": "colors", "include": [{"class": "unicorn", "count": 1}]}\n'}


@pytest.mark.parametrize("name, words", [(name, words) for name in REFUSED for words in REFUSED[name]])
def test_what_cannot_work_is_one_line(name, words, models, tmp_path, monkeypatch, no_network, capsys):
    """And found before anything is loaded."""
    (tmp_path / "old").mkdir()
    for file, content in FILES.items():
        (tmp_path / file).write_bytes(content)
    said, argv = REFUSED[name][words], words.replace("{}", str(tmp_path)).split()
    monkeypatch.setattr(sys, "argv", [name])
    if "processes" in said:
        monkeypatch.setattr("plumbing.parallel.world", lambda: 2)
    monkeypatch.setattr("plumbing.models.load_network", Mock(side_effect=MemoryError))
    monkeypatch.setattr("evaluation.judges.util.find_spec", lambda name: None)
    here = ["--model", str(MODEL), "--device", "cpu", "--out"]
    main, given = {
        "train.py": (train.main, tiny(models, "--out", tmp_path / "run")),
        "sample.py": (grid.main, [*here, f"{tmp_path}/a.png", "--prompt", "a"]),
        "reward.py": (direction.main, ["--device", "cpu"]),
        "evaluate.py": (evaluate.main, [*here, f"{tmp_path}/run", "--cache", str(tmp_path)])}[name]
    with pytest.raises(SystemExit if said else MemoryError) as ended:
        stop.run_script(name, lambda: main([*given, *argv]))
    by_argparse = str(ended.value) == "2"
    message = capsys.readouterr().err if by_argparse else f"{ended.value}\n"
    assert said in message and (not said or message.startswith(f"{name}: ") and message.count("\n") == 1)
    assert not by_argparse or words.split()[0] in message
    assert not (tmp_path / "run" / "flags.json").exists()


@pytest.mark.parametrize("cards, processes, words, said", [
    (0, 1, "--model {}", "no GPU found.*\n.*shapes.train.*\n.*--device cpu"),
    (0, 1, "--model {} --device cpu", "cpu float32"), (0, 1, "", "cpu float32"), (1, 1, "", "cuda float32"),
    (1, 1, "--precision bf16", "bf16: .* has none; use --precision float32"), (1, 2, "", "1 GPU")])
def test_device_and_precision_are_chosen(cards, processes, words, said, models, monkeypatch, tmp_path):
    """A full-size model asks for a GPU, or for the CPU by name; the card here has no bf16."""
    (tmp_path / "unet").mkdir()
    with open(tmp_path / "unet" / "a.safetensors", "wb") as sparse:
        sparse.truncate(4 * 859_520_964)
    zeros, args = torch.zeros, train.parse_args(tiny(models, *words.replace("{}", str(tmp_path)).split()))
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for name, value in (("is_available", cards > 0), ("device_count", cards), ("is_bf16_supported", False)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    fine = said in ("cpu float32", "cuda float32")
    with nullcontext() if fine else pytest.raises(ValueError, match=said):
        choose_device(args)
    assert not fine or f"{args.device} {args.precision}" == said


@pytest.mark.parametrize("reason, code, said", [
    (KeyboardInterrupt(), 130, ""), (ValueError("bad"), "x.py: bad", ""), (RuntimeError("ours"), None, ""),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "x.py: ",
     "CUDA out of memory --sample-batch --micro-batch --lora-rank --batch")])
def test_a_script_ends_in_one_line_and_a_mistake_of_ours_in_a_traceback(reason, code, said):
    with pytest.raises(SystemExit if code else RuntimeError) as ended:
        stop.run_script("x.py", Mock(side_effect=reason))
    found = str(ended.value)
    assert not code or ended.value.code == code or said and found.startswith(code) and "\n" not in found
    assert all(word in found for word in said.split())


def test_an_output_of_few_letters_shows_codes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw := io.BytesIO(), encoding="koi8-r"))
    stop.run_script("x.py", lambda: print("насилие 暴力", flush=True))
    assert b"\\u66b4" in raw.getvalue()


@pytest.mark.parametrize("words, licence", [([], "creativeml-openrail-m"), (["--model", "a/b:c"], "other")])
def test_the_cards_licence_is_stated_where_it_is_known(words, licence):
    args = train.parse_args(words)
    text = card.model_card(args, args.model, "| a |\n|---|\n| 1 |\n")
    assert text.startswith(f"---\nlicense: {licence}\nbase_model: ")
    assert "\n\n| a |\n|---|\n| 1 |\n\n" in text and "\n--seed 0\n" in text
    assert str(ROOT) not in text and "--out" not in text and "--resume" not in text
