"""What is looked at: grids and strips, curves, the table at the end, a direction. Nothing here changes what
is learnt, and nothing that fails here ends a run: it is a note, once."""

import os
import warnings
from contextlib import contextmanager
from unittest.mock import patch

NOTED = set()  # what has been said in this process


@contextmanager
def only_shown(what: str):
    """Inside, whatever goes wrong, in a library or a file, is a note: no training ends for a picture."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        said = f"note: no {what} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        if said not in NOTED:
            print(said)
        NOTED.add(said)


def save_figure(path, draw, size: tuple, dpi: int = 100):
    """draw(figure) on a matplotlib Figure of `size` inches, then its PNG. Without pyplot, which would choose
    a window and keep the figure. A notebook's MPLBACKEND, which its programs inherit, is not looked at."""
    with only_shown(f"{os.path.basename(path)}: pip install matplotlib, if it is missing"):
        with patch.dict(os.environ):
            os.environ.pop("MPLBACKEND", None)
            from matplotlib.figure import Figure
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(path, dpi=dpi)
