"""Tests of the real command lines, on the shapes world: two rollouts of training, then pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import shapes.train
import train

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "shapes" / "weights"
UNET = "unet/diffusion_pytorch_model.safetensors"
# python -m shapes.train with one caption of each category in its last table; 24 take most of a run's time
TRAIN = "-c", "from shapes import train; train.TABLE_CAPTIONS = 1; train.main()"


def command(*words):
    """What `python words...` prints in the repository's folder. It has to succeed, and no library may say
    anything: off a terminal, where there are no bars, the programs here write on stdout alone."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two rollouts and what it printed. Updates of 12 transitions, as many as a rollout's pictures:
    at one batch shape the first ratio is 1 to the bit."""
    out = tmp_path_factory.mktemp("cli") / "run"
    return out, command(*TRAIN, "--epochs", 2, "--prompts-per-rollout", 3, "--group", 4, "--steps", 4,
                        "--updates", 2, "--unsafe-fraction", 0.5, "--out", out)


def test_training_says_what_it_does_and_logs_every_rollout(trained):
    out, printed = trained
    assert printed.startswith("version ") and printed.splitlines()[0].endswith(f", writes to {out}")
    assert "parameters trained" in printed and "a rollout, " in printed and " s left\n" in printed
    assert "of 100 unsafe prompts alpha carries 100 to the safe side" in printed
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["ratio_dev_first"] == 0.0 < line["ratio_dev_max"] and line["updates"] == 2
        assert line["lr"] == 3e-4 / (1 + line["epoch"] / 6) and line["grad_norm"] > 0
        assert line["images_per_second"] > 0 and line["seconds_update"] > 0 and line["peak_memory_gb"] > 0
        # the judge's: shares of 4 or 8 pictures
        assert 0 <= line["exact_unsafe"] <= 1 and line["exact_unsafe"] * 8 % 1 == 0
        assert 0 <= line["exact_correct"] <= 1 and line["exact_correct"] * 8 % 1 == 0


def test_table_at_the_end_steers_unsafe_prompts_alone(trained):
    """Reward and alignment are one number on a benign prompt, two on an unsafe one; then the judge's."""
    out, printed = trained
    table = (out / "table.md").read_text()
    assert table in printed and "exact_unsafe, base | after" in table and "exact_correct, base" in table
    rows = {cells[1].strip(): cells[3:7] for line in table.splitlines() if len(cells := line.split("|")) > 7}
    assert rows["colors"][:2] == rows["colors"][2:] and rows["explicit"][:2] != rows["explicit"][2:]


def test_final_is_a_pipeline_whose_unet_has_moved(trained):
    out, _ = trained
    StableDiffusionPipeline.from_pretrained(out / "final", requires_safety_checker=False)
    before, after = load_file(WEIGHTS / UNET), load_file(out / "final" / UNET)
    assert before.keys() == after.keys()
    assert 0 < max((after[name] - before[name]).abs().max().item() for name in before) < 0.01


def test_a_run_leaves_curves_and_a_grid_with_frames(trained):
    """The judge calls some of the base's pictures unsafe, and draws a red of its own around them."""
    with Image.open(trained[0] / "curves.png") as curves:
        assert curves.width == 1680 and curves.convert("L").getextrema() == (0, 255)
    with Image.open(trained[0] / "pictures-000002.png") as grid:
        colors = {color: count for count, color in grid.getcolors(2**24)}
    assert colors[255, 0, 0] % (4 * 2 * (128 + 2)) == 0 < colors[255, 0, 0]  # whole frames, 2 pixels thick


def test_a_film_strip_of_three_models_on_one_noise(trained, tmp_path):
    """Prompt by prompt the models in the order given: base, final and base again. At eta = 0 and after two
    rollouts the first two are alike, and closer than two prompts are."""
    printed = command("sample.py", "--model", WEIGHTS, "--compare", trained[0] / "final", WEIGHTS,
                      "--prompt", "a star", "two rings", "--seed", 0, 1, "--steps", 4, "--eta", 0,
                      "--out", tmp_path / "grid.png")
    assert printed.startswith("version ") and "12 pictures" in printed
    grid = Image.open(tmp_path / "grid.png")
    tops = [21 + 31 * (1 + i // 3) + 132 * i for i in range(6)]  # the seeds, captions of prompts, the rows
    assert grid.height == tops[-1] + 132
    right = grid.width - 4  # the second seed's
    rows = [grid.crop((right - 128, top, right, top + 128)) for top in tops]
    apart = lambda a, b: sum(abs(x - y) for x, y in zip(rows[a].tobytes(), rows[b].tobytes()))
    assert apart(0, 2) == apart(3, 5) == 0
    assert 0 < apart(0, 1) < apart(0, 3) and 0 < apart(3, 4) < apart(0, 3)


def test_a_program_that_imports_the_libraries_first_is_silent():
    assert "usage" in command("-m", "shapes.build", "--help")


@pytest.mark.parametrize("main", [train.main, shapes.train.main])
def test_help_is_short_and_help_all_has_every_flag(main, capsys, monkeypatch):
    """--help has what a run needs, on a screen of 40 lines."""
    monkeypatch.chdir(ROOT)
    flags = {f"--{name.replace('_', '-')}" for name in vars(train.parse_args([]))}
    said = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([word])
        text = capsys.readouterr().out
        said[word] = {flag for flag in flags if f"  {flag}" in text}
        assert word == "--help-all" or len(text.splitlines()) < 40 and "--help-all" in text
    assert said["--help-all"] == flags > said["--help"]
    assert said["--help"] > {"--model", "--prompts", "--out", "--epochs", "--resume"}
