"""Time of an epoch against bare network calls, and its memory."""

import plumbing  # noqa: F401  (first, as it silences what the libraries print on import)
