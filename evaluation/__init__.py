"""What evaluate.py is made of: suites (what is drawn), samplers (how), judges (what is seen), and tables."""
