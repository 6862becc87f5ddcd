"""Output must not decide over a run: a closed pipe, a lost terminal and an ASCII one are no errors. And its
first line, which names the program's version."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit(digits: int = 40) -> str:
    """Of this repository, with "+changes" where tracked files differ from it; "unknown" outside one."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--exclude=*",
               f"--abbrev={digits}", "--dirty=+changes"]
    try:
        if (ROOT / ".git").exists():  # and no repository further up
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return "unknown"


def heading(out=None) -> str:
    """The first line of a program: its version, and where it writes."""
    return f"version  commit {commit(10)}" + (f", writes to {out}" if out else "")


class Steady:
    """A text stream whose writes never fail: once one does, what follows is dropped."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def attempt(self, act, *words):
        try:
            return act(*words)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is left in its buffer too
            os.close(nowhere)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)


def steady():
    """Make both outputs of this process steady."""
    if not isinstance(sys.stdout, Steady):
        sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)
