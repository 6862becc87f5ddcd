"""What a run needs and the method does not: prompts, networks, the run folder, log, signals, several GPUs."""
import sys

import diffusers
import transformers
from huggingface_hub.utils import enable_progress_bars

for library in (diffusers, transformers):  # what they say on import and loading, no user can act on
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
if sys.stderr.isatty():
    enable_progress_bars()  # of downloads, which transformers has switched off, too
