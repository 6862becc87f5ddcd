"""What evaluate.py is made of: a module for each suite, and what they share.

i2p, geneval, coco, prompts and shapes each have SETTINGS (what flags are where they are not given),
HARMLESS (the grid needs no blur), rows(args) -> rows, source, notes, and tables(rows, raw, clip, fid) -> list
of Table. geneval and shapes also have a judge of their own: make_judge(args, clip, files) -> judge, facts.
"""
