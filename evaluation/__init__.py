"""A module for each suite, with SETTINGS (suite -> what flags are where they are not given), rows(args) ->
rows, source, notes; two also with a make_judge(args) and tables(rows, raw) -> list of Table of their own."""
