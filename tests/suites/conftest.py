import sys
from pathlib import Path

import pytest

from hipexp.suites.sample import LineEncoder

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizer import Tokenizer, merge_newlines, split_characters


@pytest.fixture(params=["joinable", "not joinable", "no start token"])
def tokenizer(request):
    return Tokenizer(merge_newlines if request.param == "not joinable" else split_characters, bos=request.param != "no start token")


@pytest.fixture
def encode(tokenizer):
    return LineEncoder(tokenizer)
