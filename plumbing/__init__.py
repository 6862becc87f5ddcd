"""What a run needs and the method does not: networks, checks, checkpoints, signals, log, pictures."""
