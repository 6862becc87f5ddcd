"""docs/method.md, run from top to bottom: its snippets print what stands below them, up to rounding, and its
figures are drawn."""

import re

import pytest
from PIL import Image

from shapes import lecture

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page as it stands, what `python -m shapes.lecture` makes of it, and the folder of that."""
    folder = tmp_path_factory.mktemp("lecture")
    lecture.main(folder)
    said, made = ((at / "method.md").read_text(encoding="utf-8") for at in (lecture.DOCS, folder))
    return said, made, folder


def test_snippets_print_what_the_page_says(pages):
    """Within 5 % and two units of the last digit: other processors round otherwise, and four optimizer steps
    magnify it. That the first ratio is 1 holds to the last bit."""
    said, made, _ = pages
    assert NUMBER.sub("0", made).split() == NUMBER.sub("0", said).split()
    assert "largest |log rho| 0.0  KL to the base 0.0\n" in made
    for (code, below), (_, printed) in zip(*map(lecture.SNIPPET.findall, (said, made)), strict=True):
        assert printed and code.count("\n") <= 10, code
        for old, new in zip(NUMBER.findall(below), NUMBER.findall(printed), strict=True):
            unit = 10.0 ** -len(old.partition(".")[2])
            assert float(new) == pytest.approx(float(old), rel=0.05, abs=2 * unit), code


def test_numbers_of_the_text_are_printed(pages):
    """All with three or more decimals, but the clip range and what it becomes."""
    said, *_ = pages
    printed = " ".join(below for _, below in lecture.SNIPPET.findall(said)).replace("-", "−")
    text = lecture.SNIPPET.sub("", said).replace("c = 0.005", "").replace("1.005^256 = 3.6", "")
    assert not [number for number in re.findall(r"−?\d+\.\d{3,}", text) if number not in printed]
    assert 1.005**256 == pytest.approx(3.6, abs=0.05)


def test_figures_are_drawn(pages):
    said, _, folder = pages
    figures = re.findall(r"\((method-\w+\.png)\)", said)
    assert len(figures) == 4 and sorted(figures) == sorted(path.name for path in folder.glob("*.png"))
    for name in figures:
        with Image.open(folder / name) as made, Image.open(lecture.DOCS / name) as kept:
            assert made.size == kept.size
