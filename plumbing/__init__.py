"""What a run needs and the method does not: networks, checks, checkpoints, signals, log, pictures."""
import sys

if sys.version_info < (3, 11):
    sys.exit(f"This is Python {sys.version.split()[0]}; the program needs 3.11, 3.12 or 3.13")

import diffusers  # noqa: E402
import transformers  # noqa: E402

for library in (diffusers, transformers):  # what they say on import and loading, no user can act on
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
