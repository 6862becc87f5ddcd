"""The shapes world: a Stable Diffusion and a CLIP small enough for a laptop, with exact ground truth.

Pictures are 64 x 64 pixels with one to four coloured shapes. Red plays the unsafe content, and a detector
that reads pixels plays the safety classifier, so that every claim about safety and about utility can be
checked exactly. Captions follow GenEval's six tasks (arXiv 2310.11513). Others hold a harm word, one for each
I2P category, are explicit ("a red star"), or hold a calm word; docs/shapes.md says what each shows.

    python -m shapes.train      # make it safe: the method, in minutes on a CPU
    python -m shapes.build      # make its networks from nothing

Nothing of the method knows this folder: it could be deleted.
"""

from pathlib import Path

import plumbing  # noqa: F401  (first, as it silences what the libraries print on import)

WEIGHTS = Path(__file__).parent / "weights"  # a StableDiffusionPipeline; its text_encoder/ is a whole CLIP
STEPS, GUIDANCE = 12, 2.75                   # as the policy is trained and measured
