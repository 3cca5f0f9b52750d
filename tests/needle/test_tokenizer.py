"""Digits and hex characters come in pairs at most, so that copying a key is copying a few tokens."""

import random
import re

import pytest

from hipexp.needle.tokenizer import train_tokenizer
from hipexp.suites.infbench import random_uuid


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_no_token_holds_more_than_two_hex_characters(tokenizer):
    vocab = tokenizer.get_vocab()
    assert 1000 <= len(vocab) <= 4096
    assert all(len(re.findall("[0-9a-fA-F]", token)) <= 2 for token in vocab)


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer().to_str() == tokenizer.to_str()


def test_a_uuid_is_sixteen_pairs_and_four_hyphens_in_any_surroundings(tokenizer):
    key = random_uuid(random.Random(1))
    for text in (f'"{key}": "', f'{{"{key}"', f'{key}"', f'key "{key}"?'):
        tokens = tokenizer.encode(text, add_special_tokens=False).tokens
        pairs = [token for token in tokens if re.fullmatch("[0-9a-f]{2}", token)]
        assert "".join(pairs) == key.replace("-", "") and tokens.count("-") == 4


def test_text_survives(tokenizer):
    text = 'The pass key is 71432. Keep it in mind.\n{"é": "日本"}'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
