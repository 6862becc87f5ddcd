"""Time of an epoch against bare network calls, its memory, and what rounding does to the ratio."""
