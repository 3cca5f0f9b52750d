"""What holds for every test, in whatever order the folders are collected."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, as transformers does

sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # brute.py serves other folders too

# Machines that run the tests may be busy: no deadline. The same examples on every run.
settings.register_profile("hipexp", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("hipexp")


def pytest_addoption(parser):
    parser.addoption("--pictures", metavar="DIR", help="where tests of the report leave their screenshots (docs has them)")
