"""A module for each suite, with SETTINGS (suite -> what flags are where they are not given), rows(args) ->
rows, source, notes, and tables(rows, raw, clip, fid) -> list of Table; two also with make_judge."""
