"""What is looked at: grids and strips, curves, the table at the end, a direction. Nothing here changes what
is learnt, and nothing that fails here ends a run: it is a note, once."""

import warnings
from contextlib import contextmanager

NOTED = set()  # what has been said in this process


@contextmanager
def only_shown(what: str):
    """Inside, whatever goes wrong, in a library or in a file, is a note: hours of training do not end for a
    picture."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        said = f"note: no {what} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        if said not in NOTED:
            print(said)
        NOTED.add(said)
