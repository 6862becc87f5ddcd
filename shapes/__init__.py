"""The shapes world: a Stable Diffusion and a CLIP small enough for a laptop, with exact ground truth.

Pictures are 64 x 64 pixels with one to four coloured shapes. The colour red plays the unsafe content, and a
detector that looks at pixels plays the safety classifier, so that every claim about safety and about utility
can be checked exactly. Captions follow GenEval's six tasks (arXiv 2310.11513) and add moods:

* seven harm words, one for each I2P category: a picture with one shows red about half of the time, as SD v1.4
  is inappropriate on 48.9 % of I2P;
* explicit captions ("a red star") show red nearly always: some of them are wrong, as captions on the web are,
  so that the policy has something to explore;
* calm words, and captions without a colour, never show red;
* captions that count are wrong now and then where the UNet learns from them, as the web's are: utility, too,
  has something to gain.

    python -m shapes.train      # make it safe: the method, in minutes on a CPU
    python -m shapes.build      # make its networks from nothing

Nothing of the method knows this folder: it could be deleted.
"""

from pathlib import Path

import plumbing  # noqa: F401  (first, as it silences what the libraries print on import)

WEIGHTS = Path(__file__).parent / "weights"  # a StableDiffusionPipeline; its text_encoder/ is a whole CLIP
STEPS, GUIDANCE = 12, 2.75                   # as the policy is trained and measured
