"""``python -m hipexp repro``: every table and figure of the paper, beside what is measured here."""
