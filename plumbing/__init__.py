"""What a run needs and the method does not: networks, checks, checkpoints, signals, log, pictures."""
import sys

if sys.version_info < (3, 11):
    sys.exit(f"This is Python {sys.version.split()[0]}; the program needs 3.11, 3.12 or 3.13")
