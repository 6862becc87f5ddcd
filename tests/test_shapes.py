"""Tests of the shapes world: its captions, its detector, its judge, its networks, its command."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

import shapes
import train
from plumbing.models import load_clip, load_pipeline
from plumbing.texts import read_anchors, read_prompts
from reward import Prompt, SteeringReward
from shapes import pixels, scenes
from shapes.scenes import Found
from shapes.train import FLAGS, HERE, judge, main


@pytest.fixture(scope="module")
def clip():
    return load_clip(str(shapes.WEIGHTS / "text_encoder"))


def picture(*objects):
    return pixels.draw([list(objects)])


# -------------------------------------------------------------------------------- captions

def test_captions_are_read_back_and_have_one_token_a_word(clip):
    everything, tokenizer = scenes.all_scenes(), clip[1]
    texts = [scenes.caption(s) for s in everything]
    assert len(set(texts)) == len(texts)
    assert [scenes.read_caption(text) for text in texts] == everything
    assert [len(ids) for ids in tokenizer(texts).input_ids] == [len(text.split()) + 2 for text in texts]


@pytest.mark.parametrize("text", ["a photo of an astronaut", "", "two stairs", "a star, a ring, a circle"])
def test_other_texts_are_no_captions(text):
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        scenes.read_caption(text)


def test_what_is_drawn_of_a_caption_follows_the_shares():
    """HARM_RED, LIE_RATE and MISCOUNT_RATE, each within four standard errors of 2,000 draws."""
    rng, count = random.Random("shares"), 2000
    red = {task: sum(pixels.count_red(scenes.place(scenes.random_scene(rng, task), rng)) > 0
                     for _ in range(count)) / count for task in scenes.MIX}
    told = [scenes.random_scene(rng, "counting") for _ in range(count)]
    wrong = sum(scenes.miscounted(s, rng) != s for s in told) / count
    for share, expected in ((red.pop("harm"), scenes.HARM_RED), (red.pop("explicit"), 1 - scenes.LIE_RATE),
                            (wrong, scenes.MISCOUNT_RATE)):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5
    assert set(red.values()) == {0}  # calm words, and captions without a colour, never show red


def test_the_prompt_files():
    assert (HERE / "prompts.txt").read_text(encoding="utf-8") == scenes.training_prompts()
    counts = {}
    for prompt in read_prompts([HERE / "prompts.txt"]):
        scenes.read_caption(prompt.text)
        counts[prompt.category] = counts.get(prompt.category, 0) + 1
    assert counts == {"violence": 25, "sexual": 25, "explicit": 50, "benign": 140}
    safe, unsafe = read_anchors(HERE / "anchors.txt")
    assert len(safe) == 25 and unsafe == [f"a red {shape}" for shape in scenes.SHAPES]


# -------------------------------------------------------------------------------- the detector and the judge

@pytest.mark.parametrize("task", list(scenes.MIX))
def test_detector_reads_drawn_pictures(task):
    """Every object's colour and shape, and the caption's truth, in at least 99.5 % of the drawn pictures."""
    rng = random.Random(task)
    told = [scenes.random_scene(rng, task) for _ in range(200)]
    placed = [scenes.place(s, rng) for s in told]
    images = pixels.draw(placed)
    found = pixels.detect(images)

    def names(objects):
        return sorted((o.color, o.shape) for o in objects)
    assert sum(names(a) == names(b) for a, b in zip(placed, found)) >= 199
    assert [pixels.count_red(p) > 0 for p in placed] == pixels.is_unsafe(images).tolist()
    if task != "explicit":  # whose captions lie now and then
        assert sum(pixels.is_correct(scenes.caption(s), f) for s, f in zip(told, found)) >= 199


def test_objects_are_found_where_they_stand():
    placed = [Found("red", "circle", 16, 18, 10), Found("blue", "square", 47, 45, 11)]
    for there in pixels.detect(pixels.draw([placed]))[0]:
        [drawn] = [o for o in placed if o.shape == there.shape]
        assert max(abs(there.x - drawn.x), abs(there.y - drawn.y)) < 1 and abs(there.size - drawn.size) < 2


def test_wrong_pictures_are_wrong():
    star, ring = Found("blue", "star", 16, 16, 10), Found("green", "ring", 48, 16, 10)
    over, under = Found("blue", "star", 16, 16, 10), Found("green", "ring", 16, 48, 10)

    def fine(text, *objects):
        return pixels.is_correct(text, pixels.detect(picture(*objects))[0])
    assert fine("a star left of a ring", star, ring) and not fine("a ring left of a star", star, ring)
    assert fine("a ring right of a star", star, ring) and not fine("a star right of a ring", star, ring)
    assert fine("a star above a ring", over, under) and not fine("a star below a ring", over, under)
    assert fine("a ring below a star", over, under) and not fine("a star left of a ring", over, under)
    assert not fine("a star above a ring", star, ring) and not fine("two stars", star, ring)
    assert (fine("a blue star and a green ring", star, ring)
            and not fine("a green star and a blue ring", star, ring))
    assert fine("a star", star, ring) and not fine("a circle", star, ring)
    two = star, replace(star, x=48)
    assert fine("two stars", *two) and not fine("two stars", *two, replace(ring, y=48))
    assert not fine("three stars", *two)


# unsafe mask over five pictures: a red star and a blue one for "a red star", then for "a blue ring" a blue
# ring, a red ring, a green circle; for "a ring" a green one and two black ones. None: no such prompt
@pytest.mark.parametrize("unsafe, figures", [
    ("11000000", (1 / 2, 4 / 6, math.exp(math.log(3) - 2 / 3 * math.log(2)))),
    ("00000000", (None, 5 / 8, math.exp(math.log(3) - 2 / 3 * math.log(2)))),
    ("11111111", (2 / 8, None, None)), ("01101011", (0.0, 2 / 3, 1.0))])
def test_judge(unsafe, figures):
    shown = [("red", "star"), ("blue", "star"), ("blue", "ring"), ("red", "ring"), ("green", "circle"),
             ("green", "ring"), ("black", "ring"), ("black", "ring")]
    images = pixels.draw([[Found(color, shape, 32, 32, 11)] for color, shape in shown])
    prompts = [Prompt(text) for text in ["a red star"] * 2 + ["a blue ring"] * 3 + ["a ring"] * 3]
    found = judge(images, prompts, torch.tensor([side == "1" for side in unsafe]))
    expected = dict(zip(("exact_unsafe", "exact_correct", "exact_variety"), figures))
    assert found == {name: value if value is None else pytest.approx(value, rel=1e-5)
                     for name, value in expected.items()}


# -------------------------------------------------------------------------------- the networks

def test_reward_tells_red_from_blue(clip):
    """On the same prompt a picture without red is worth more, and the plain cosine prefers the red one."""
    steering = SteeringReward(clip, read_anchors(HERE / "anchors.txt"))
    red, blue = (picture(Found(color, "star", 32, 32, 11)) for color in ("red", "blue"))
    prompt = [Prompt("a red star", "explicit")]
    (r_red, plain_red, *_), (r_blue, plain_blue, *_) = (steering.score(one, prompt) for one in (red, blue))
    assert plain_red > plain_blue and r_blue - r_red > plain_blue - plain_red


@torch.no_grad()
def test_the_world_decodes_blends_of_colours_to_blends():
    """Halfway between two paintings' latents is the mean of the paintings,
    and red only where that mean itself is."""
    vae, rng = load_pipeline(str(shapes.WEIGHTS)).vae, random.Random("blend")
    placed = [scenes.place(scenes.random_scene(rng, "color_attr"), rng) for _ in range(8)]
    painted = {c: pixels.draw([[replace(o, color=c) for o in objects] for objects in placed])
               for c in scenes.BENIGN_COLORS}
    latents = {c: vae.encode(x * 2 - 1).latent_dist.mode() for c, x in painted.items()}
    for one, other in itertools.combinations(scenes.BENIGN_COLORS, 2):
        decoded = (vae.decode((latents[one] + latents[other]) / 2).sample / 2 + 0.5).clamp(0, 1)
        mean = (painted[one] + painted[other]) / 2
        assert (decoded - mean).abs().mean() < 0.01
        assert not (pixels.is_unsafe(decoded) & ~pixels.is_unsafe(mean)).any()


# -------------------------------------------------------------------------------- the command

def test_flags_are_refused_or_handed_on(tmp_path, monkeypatch):
    """Every prompt has to be a caption, before anything is loaded; later flags override the world's own; calm
    and the six tasks are harmless in the table at the end."""
    calls = []
    monkeypatch.setattr(train, "main", lambda *given: calls.append(given))
    other = tmp_path / "other.txt"
    other.write_text("[benign]\na photo of an astronaut\n")
    for flag in ("--prompts", "--benign"):
        with pytest.raises(ValueError, match="not a caption of the shapes world: 'a photo of an astronaut'"):
            main([flag, str(other)])
    assert calls == []
    other.write_text("a red star\n")
    main(["--prompts", str(other), "--epochs", "3"])
    [(words, given_judge, table)] = calls
    args = train.parse_args(words)
    assert args.prompts == [str(other)] and args.epochs == 3 and words[:len(FLAGS)] == FLAGS
    assert (args.steps, args.guidance) == (shapes.STEPS, shapes.GUIDANCE) and given_judge is judge
    categories = {}
    for prompt, unsafe in table:
        categories.setdefault(unsafe, []).append(prompt.category)
    assert set(categories[True]) == {*scenes.HARM_WORDS, "explicit"}
    assert set(categories[False]) == {*scenes.TASKS, "calm"}
    counts = {name: categories[False].count(name) for name in scenes.TASKS}
    assert counts == dict(single_object=5, two_object=20, counting=15, colors=24, position=24, color_attr=24)
