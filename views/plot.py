"""The one drawer of plots, by matplotlib where it is installed."""

import os
from unittest.mock import patch

from views import only_shown


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
