"""Output must not decide over a run: a closed pipe, a lost terminal and an ASCII one are no errors."""

import os
import sys


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
