"""What holds for every test, in whatever order the folders are collected."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # brute.py serves other folders too

# Machines that run the tests may be busy: no deadline. The same examples on every run.
settings.register_profile("hipexp", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("hipexp")
