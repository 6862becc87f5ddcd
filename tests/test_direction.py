"""Tests of reward.py as a script: what it prints of a direction, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import reward
import train
from plumbing.models import load_clip
from plumbing.texts import read_anchors, read_prompts

ROOT = Path(__file__).parent.parent
CLIP = ROOT / "shapes" / "weights" / "text_encoder"


def printed(capsys, *words):
    reward.main(["--clip", str(CLIP), "--device", "cpu", *map(str, words)])
    return capsys.readouterr().out


def numbers(text: str) -> tuple[list[str], list[float]]:
    """The words of a text, and its numbers."""
    parts = re.split(r"(-?\d+(?:\.\d+)?)", text)
    return [" ".join(part.split()) for part in parts[::2]], [float(part) for part in parts[1::2]]


def test_the_worked_example_is_what_the_script_prints(tmp_path, capsys, monkeypatch):
    """docs/own_concept.md's files, command and output; numbers up to their last digit."""
    blocks = (ROOT / "docs" / "own_concept.md").read_text().split("```\n")[1::2]
    for block in blocks:
        if name := re.match(r"cat > (blue_\w+.txt) <<'END'\n", block):
            (tmp_path / name[1]).write_text(block[name.end():].partition("END\n")[0])
    [(command, shown)] = [pair for pair in zip(blocks, blocks[1:])
                          if pair[0].startswith("python reward.py --clip")]
    words = command.split()[2:]
    monkeypatch.chdir(tmp_path)
    _, out = printed(capsys, *words[2:]).split("\n", 1)  # below the version
    out = numbers(out.replace(str(CLIP), words[1]))
    assert out[0] == numbers(shown)[0] and out[1] == pytest.approx(numbers(shown)[1], abs=2e-3)


def test_places_and_scores_are_the_rewards_own(tmp_path, capsys):
    """On unsafe, benign and unnamed prompts; of many prompts ten are listed, the worst first."""
    anchors, file = tmp_path / "anchors.txt", tmp_path / "prompts.txt"
    anchors.write_text("[safe]\na green star\na red star\n[unsafe]\na blue star\na red ring\na green ring\n")
    file.write_text("[stars]\n" + "a red star\na ring\n" * 8
                    + "[]\na ring\na yellow star\n[benign]\na ring\n")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.png")
    out = printed(capsys, "--anchors", anchors, "--prompts", file, "--alpha", 0.25,
                  "--image", tmp_path / "a.png")
    ours = reward.SteeringReward(load_clip(str(CLIP)), read_anchors(anchors), 0.25)
    ring, star = (ours.embed_text([text]) for text in ("a ring", "a red star"))
    z, carried = ((t @ ours.direction).item() for t in (ring, reward.steer(ring, ours.direction, 0.25)))
    place = (star @ ours.direction).item()
    rows = {line[:32].strip(): line[32:].split() for line in out.splitlines()}
    assert rows["stars"][:5] == ["16", f"{(z + place) / 2:.3f}", f"{z:.3f}", f"{place:.3f}", "50%"]
    assert rows["benign"] == ["1", *[f"{z:.3f}"] * 3, "0%"] and z < carried < 0 < place
    assert rows["no category, unsafe"][-2:] == [f"{carried:.3f}", "0%"]
    assert rows["no category, safe"][0] == "1"
    assert "1 of 5 anchors stand on the wrong side:" in out and "a blue star (unsafe)" in out
    assert out.count(f"{carried:8.3f}  a ring (stars)") == 8 and "9 of 17 unsafe prompts stay" in out
    image = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(-1, -1, 30, 20)
    r, alignment, safety, _ = ours.score(image, [reward.Prompt("a ring", "stars")])
    assert f"a.png: image safety {safety.item():.3f}, under 19 of 19 prompts" in out
    assert f"{r.item():8.3f}{alignment.item():11.3f}  a ring (stars)" in out


def test_many_prompts_are_counted(capsys):
    """The repository's own prompts and anchors, and train.py's defaults."""
    out = printed(capsys, "--alpha", 0, "--direction", "raw", "--image", ROOT / "docs" / "grid.png")
    prompts = read_prompts([ROOT / "prompts" / name for name in ("i2p.txt", "benign.txt")])
    assert f"under 20 of {len(prompts)} prompts" in out and re.search(r"\n {10}and \d+ more\n", out)
    assert "raw direction, alpha 0" in out


def test_defaults_are_the_trainings(monkeypatch):
    seen = []
    monkeypatch.setattr("plumbing.direction.show", seen.append)
    reward.main([])
    args = train.parse_args([])
    for name in ("clip", "anchors", "alpha", "direction"):
        assert getattr(seen[0], name) == getattr(args, name)
    assert seen[0].prompts == [*args.prompts, args.benign]


@pytest.mark.parametrize("words, said", [
    ("--image {}/none.png", "none.png: cannot be read as a picture"),
    ("--image {}", "cannot be read as a pic"),
    ("--image {}/text.png", "text.png: cannot be read as a picture"), ("--alpha nan", "--alpha nan"),
    ("--alpha -1", "--alpha -1"), ("--prompts {}/none.txt", "none.txt"),
    ("--anchors {}/text.png", "under [safe]"),
    ("--device banana", "--device banana"), ("--clip /no/folder", "no such folder")])
def test_bad_input_is_one_line(words, said, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture\n")
    monkeypatch.setattr("plumbing.models.load_network", lambda *_, **__: pytest.fail("CLIP was loaded"))
    with pytest.raises((ValueError, OSError)) as error:
        reward.main(["--clip", str(CLIP), *words.format(*[tmp_path] * 2).split()])
    assert said in str(error.value) and "\n" not in str(error.value)
