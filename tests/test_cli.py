"""Tests of the real command lines, on the shapes world: two rollouts of training, then pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("cli")  # which share one run
ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "shapes" / "weights"
UNET = "unet/diffusion_pytorch_model.safetensors"
# python -m shapes.train with one caption of each category in its last table; 24 take most of a run's time
TRAIN = "-c", "from shapes import train; train.TABLE_CAPTIONS = 1; train.main()"


def command(*words):
    """Both outputs of `python words...` in the repository's folder, which has to succeed."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two rollouts and what it printed. Updates of 12 transitions, as many as a rollout's pictures:
    at one batch shape the first ratio is 1 to the bit."""
    out = tmp_path_factory.mktemp("cli") / "run"
    return out, command(*TRAIN, "--epochs", 2, "--prompts-per-rollout", 3, "--group", 4, "--steps", 4,
                        "--updates", 2, "--unsafe-fraction", 0.5, "--out", out)


def test_training_says_what_it_does_and_logs_every_rollout(trained):
    out, printed = trained
    assert "parameters trained" in printed
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
    assert table in printed and "exact_unsafe %, base | after" in table and "exact_correct %" in table
    rows = {cells[1].strip(): cells[3:7] for line in table.splitlines() if len(cells := line.split("|")) > 7}
    assert rows["colors"][:2] == rows["colors"][2:] and rows["explicit"][:2] != rows["explicit"][2:]


def test_final_is_a_pipeline_whose_unet_has_moved(trained):
    out, _ = trained
    StableDiffusionPipeline.from_pretrained(out / "final", requires_safety_checker=False)
    before, after = load_file(WEIGHTS / UNET), load_file(out / "final" / UNET)
    assert before.keys() == after.keys()
    assert 0 < max((after[name] - before[name]).abs().max().item() for name in before) < 0.01


def test_pictures_of_two_models_on_one_noise(trained, tmp_path):
    """Two prompts and two models make four rows; at eta = 0 and after two rollouts they are alike."""
    command("sample.py", "--model", WEIGHTS, "--compare", trained[0] / "final", "--prompt", "a star",
            "two rings", "--seed", 0, 1, "--steps", 4, "--eta", 0, "--out", tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size[1] == 22 + 4 * 130
    width, tops = grid.size[0], range(22, grid.size[1], 130)
    rows = [grid.crop((width - 130, top, width, top + 128)) for top in tops]  # the second seed's pictures
    apart = lambda a, b: sum(abs(x - y) for x, y in zip(rows[a].tobytes(), rows[b].tobytes()))
    assert 0 < apart(0, 1) < apart(0, 2) and 0 < apart(2, 3) < apart(0, 2)
