"""Time of an epoch against bare network calls, its memory, and what rounding does to the ratio."""

import plumbing  # noqa: F401  (first, as it silences what the libraries print on import)
