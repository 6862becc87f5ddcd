"""What the programs' command lines share: the kinds of numbers, --help-all, and the device."""

import argparse
import math
import sys

import torch


def whole(low: int, high: float = math.inf):
    """An argparse type: a whole number from low to high."""
    return real(f"[{low}, {high}]", int)


def real(interval: str, kind: type = float):
    """An argparse type: a finite number in an interval such as "(0, 1]": a round bracket excludes its end."""
    low, high = map(float, interval[1:-1].split(", "))

    def read(text: str):
        value = kind(text)
        inside = low <= value <= high and math.isfinite(value)
        if not inside or (interval[0] == "(" and value == low) or (interval[-1] == ")" and value == high):
            raise argparse.ArgumentTypeError(f"{text} does not lie in {interval}")
        return value
    # what argparse calls it, where a text is no number at all
    read.__name__ = "number" if kind is float else "whole number"
    return read


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line: of sixty flags a usage would hide it."""
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def folded(parser, argv):
    """Gives groups of flags, by title, that --help leaves out; --help-all shows everything."""
    everything = "--help-all" in (sys.argv[1:] if argv is None else argv)
    parser.add_argument("--help-all", action="help", help="and those of reward, rollout, update, compute")

    def group(title):
        add = parser.add_argument_group(title).add_argument
        return add if everything else lambda *names, **more: add(*names, **more | {"help": argparse.SUPPRESS})
    return group


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable(name: str) -> torch.device:
    """A device that PyTorch can name may still be absent: ValueError."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
