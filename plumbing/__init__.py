"""What a run needs and the method does not: prompts, networks, the run folder, log, signals, several GPUs."""
import sys

if sys.version_info < (3, 11):
    sys.exit(f"This is Python {sys.version.split()[0]}; the program needs 3.11, 3.12 or 3.13")

import diffusers  # noqa: E402
import transformers  # noqa: E402
from huggingface_hub.utils import enable_progress_bars  # noqa: E402

for library in (diffusers, transformers):  # what they say on import and loading, no user can act on
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
if sys.stderr.isatty():
    enable_progress_bars()  # of downloads, which transformers has switched off, too
