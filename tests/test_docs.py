"""README and docs: every file, link, flag, command, table and number; docs/method.md is run as a whole."""

import json
import re
import shlex
from pathlib import Path
from statistics import fmean

import pytest
import torch
from PIL import Image

import evaluate
import sample
import shapes.train
import train
from bench import card, sd14, speed
from evaluation import relearn
from evaluation.report import PUBLISHED
from plumbing import log
from plumbing.prompts import read_anchors, read_prompts
from shapes import lecture, study
from shapes.scenes import all_scenes
from tiny import scheduler
from views import direction, grid

ROOT = Path(__file__).parent.parent
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LINES = {"README.md": 150, "docs/running.md": 120, "docs/speed.md": 110}  # others: 250
ENTRIES = json.loads((ROOT / "docs" / "study.json").read_text(encoding="utf-8"))
PARSERS = {"train.py": train.parse_args, "evaluate.py": evaluate.parse, "sample.py": grid.parse_args,
           "reward.py": direction.parse_args, "shapes.train": shapes.train.parse,
           "evaluation.relearn": relearn.parse}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
OTHERS = re.compile("my_|blue_|judge_|captions|state|flags|report|pictures|bench/(growth|rou)|scripts/conv")


def says(file: str, *sentences: str):
    assert not [sentence for sentence in sentences if sentence not in " ".join(TEXTS[file].split())]


@pytest.mark.parametrize("file", TEXTS)
def test_links_files_and_functions(file):
    text, above = TEXTS[file], (ROOT / file).parent
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    named = [name for name in re.findall(r"\w[\w/.-]*\.(?:py|txt|json)\b", text) if not OTHERS.match(name)]
    assert not [at for at in links if not (above / at).exists()]
    assert not [name for name in named if not (ROOT / name).exists() and not (above / name).exists()]
    for module, name in re.findall(r"`(sample|reward|grpo|train)\.(?!py)(\w+)", text):
        assert hasattr(__import__(module), name)


@pytest.mark.parametrize("file", TEXTS)
def test_commands_are_understood_and_flags_exist(file, capsys):
    known = set(re.findall("--[a-z-]+", (ROOT / "shapes" / "build.py").read_text())) | {
        "--nproc_per_node", "--model_path", "--checkpoint_path", "--use_safetensors"}  # other people's
    for parse in (*PARSERS.values(), study.main, speed.main, card.main):
        with pytest.raises(SystemExit):
            parse(["--help-all" if parse in (train.parse_args, shapes.train.parse) else "--help"])
        known |= set(re.findall("--[a-z][a-z-]+", capsys.readouterr().out))
    assert not set(re.findall("(?<![-#])--[a-z][a-z_-]+", TEXTS[file])) - known
    prose, fences = TEXTS[file].split("```")[::2], "\n".join(TEXTS[file].split("```")[1::2])
    for line in re.findall("`([^`]+)`", "".join(prose)) + fences.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:python |torchrun \S+ )(?:-m )?(\S+) ([^#]*)", line)
        if found and found[1] in PARSERS and "..." not in line:
            PARSERS[found[1]](shlex.split(found[2]))


def test_sizes_and_tables():
    assert not [file for file in TEXTS if TEXTS[file].count("\n") > LINES.get(file, 250)]
    assert len(TEXTS["README.md"].split()) <= 1600 and "not reproduced" in TEXTS["README.md"][:1200]
    pattern = re.compile(r"<!-- study: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
    tables = study.tables(ENTRIES)  # none with a cell that is not measured
    assert dict(pair for text in TEXTS.values() for pair in pattern.findall(text)) == tables
    assert {"readme", "main"} <= {*tables} and "main" not in study.tables(ENTRIES[1:])
    for table, style in ((PUBLISHED["i2p"]["Inappropriate pictures, %"], ".2f"),
                         (PUBLISHED["i2p"]["Exposed parts"], "d"),
                         (PUBLISHED["geneval"]["GenEval accuracy, %"], ".2f")):
        for *columns, last in (values for model, values in table.items() if "SafeDiffusion" in model):
            row = ", ".join(format(value, style) for value in columns)
            says("docs/reproduction.md", f"| {row} |", f"| {last:{style}} |")


def test_every_entry_says_how_it_was_made():
    assert len({(e["variant"], e["seed"], str(e["cell"])) for e in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert int(entry["commit"].removesuffix("+changes"), 16)
        plan = study.VARIANTS.get(entry["variant"], {"flags": "", "rollouts": 0, "seeds": [0]})
        assert (entry["flags"], entry["rollouts"]) == (plan["flags"], plan["rollouts"])
        assert entry["seed"] in plan["seeds"]


def test_numbers_of_prompts_and_flags():
    args, world = train.parse_args([]), shapes.train.parse([])
    unsafe, benign = (len(read_prompts([path])[0]) for path in (args.prompts[0], args.benign))
    safe, bad = map(len, read_anchors(args.anchors)[0])
    shown = [len(scene.shapes) for scene in all_scenes() if scene.task == "explicit"]
    P, G, U, N = args.prompts_per_rollout, args.group, args.updates, args.epochs
    says("README.md", f"{unsafe} unsafe and {benign} benign", f"{safe} safe and {bad} unsafe",
         f"{P} prompts of {G} pictures and {U} updates",
         f"{N * P * G:,} pictures and {N * U} updates in {N} rollouts", f"{world.ema} in the shapes world")
    says("docs/shapes.md", f"Of the {len(shown)} explicit captions {shown.count(1)} have one object",
         f"own**, {world.kl_benign} beside {world.kl} on unsafe ones")
    says("docs/running.md", f"over {100 * log.CLIP_BOUND:.0f} % of", f"over {log.KL_BOUND} per")


def test_numbers_of_the_study():
    own = [entry for entry in ENTRIES if entry["cell"] is None]
    of = lambda variant, name: [e["figures"][name][0] for e in own if e["variant"] == variant]
    base, worst, mean = (lambda name: of("base", name)[0], lambda name: max(of("default", name)),
                         lambda name: fmean(of("default", name)))
    counting, gained = mean("counting"), mean("accuracy") - base("accuracy")
    says("README.md", f"keeps more than {worst('one object'):.1f} % red",
         f"{worst('held out'):.1f} % on harm words", f"{base('counting'):.1f} to {counting:.1f} %")
    says("docs/shapes.md", f"{worst('held out'):.1f} % on harm words never trained on",
         f"{worst('one object'):.1f} % on one object and {worst('two objects'):.1f} % on two",
         f"rises by {gained:.1f} points", f"from {base('counting'):.1f} to {counting:.1f} %",
         f"{mean('variety, both'):.2f} of the base's {base('variety, both'):.2f}")
    says("docs/method.md", f"{mean('trained'):.1f} % of such pictures",
         f"{mean('variety, both'):.2f} of {base('variety, both'):.2f} colours")


def test_numbers_of_schedules_and_sizes():
    """What a transition weighs, what bf16 does to a stored latent, and GB."""
    at = sample.ddim_schedule(scheduler(), 50, 1.0)
    c = (1 - at.alpha_prev - at.sigma**2).sqrt() - (at.alpha_prev * (1 - at.alpha_t) / at.alpha_t).sqrt()
    *most, last, _ = (c**2 / (2 * at.sigma**2)).tolist()
    says("README.md", f"by {last:.1f}, any before it by {min(most):.2f} to {max(most):.2f}")
    said = re.findall(r"−([\d.]+)e-4 at", " ".join(TEXTS["docs/rounding.md"].split()))
    for s, shift in zip(at.sigma[[-5, -3, -2, -1]], said, strict=True):
        start, noise = torch.randn(2, 256, 4, 64, 64, generator=torch.Generator().manual_seed(0))
        mu = (1 - s**2).sqrt() * start  # so that x has unit variance
        x = mu + s * noise
        shifted = (sample.log_prob(x.bfloat16(), mu, s) - sample.log_prob(x, mu, s)).mean().item()
        assert 1e4 * shifted == pytest.approx(-float(shift), abs=0.3, rel=0.05)
    pipe, (tower, *_) = sd14.sd14_pipeline("meta"), sd14.vit_h14("meta", torch.float16)
    unet, vae, text, clip = (4e-9 * sum(p.numel() for p in network.parameters())
                             for network in (pipe.unet, pipe.vae, pipe.text_encoder, tower))
    says("README.md", f"fetches {unet + vae + text + clip:.0f} GB")
    assert 30 < 9 * unet + 4 * (vae + text) < 35  # two checkpoints, a third that is being written, and base/


def test_the_lecture_prints_what_the_page_says_and_draws_its_figures(tmp_path):
    """Within 5 % and two units of the last digit: other processors round otherwise, and four optimizer steps
    magnify it. Its text repeats what is printed, where it has three decimals and is no clip range."""
    lecture.main(tmp_path)
    said, made = TEXTS["docs/method.md"], (tmp_path / "method.md").read_text(encoding="utf-8")
    snippets, text = lecture.SNIPPET.findall(said), lecture.SNIPPET.sub("", said)
    repeated = re.findall(r"−?\d+\.\d{3,}", text.replace("c = 0.005", "").replace("1.005^256 = 3.6", ""))
    printed = " ".join(below for _, below in snippets).replace("-", "−")
    assert not [number for number in repeated if number not in printed]
    assert NUMBER.sub("0", made).split() == NUMBER.sub("0", said).split()
    assert "largest |log rho| 0.0  KL to the base 0.0\n" in made
    for (code, below), (_, printed) in zip(snippets, lecture.SNIPPET.findall(made), strict=True):
        assert printed and code.count("\n") <= 10, code
        for old, new in zip(NUMBER.findall(below), NUMBER.findall(printed), strict=True):
            unit = 10.0 ** -len(old.partition(".")[2])
            assert float(new) == pytest.approx(float(old), rel=0.05, abs=2 * unit), code
    figures = re.findall(r"\((method-\w+\.png)\)", said)
    assert len(figures) == 4 and sorted(figures) == sorted(path.name for path in tmp_path.glob("*.png"))
    for name in figures:
        with Image.open(tmp_path / name) as made, Image.open(lecture.DOCS / name) as kept:
            assert made.size == kept.size
