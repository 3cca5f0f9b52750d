"""Summaries of a growing sequence: what they hold, that nothing is read twice, how they grow."""

import pytest
import torch
from hipexp_kernels import coarsen, summarize
from hypothesis import given
from hypothesis import strategies as st

from hipexp.cache.summaries import KeySummaries


def keys(tokens):
    return torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(0))


@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8), first=st.integers(0, 20), piece=st.sampled_from([1, 4, 16]))
def test_they_are_those_of_all_keys_at_once(sizes, first, piece):
    summaries, k, length = KeySummaries(), keys(sum(sizes)), 0
    for size in sizes:
        length += size
        found = summaries.upto(k[:, :length], first, piece)
        assert found.piece_tok == piece
        assert torch.equal(found.rows, summarize(k[:, first:length], piece_tok=piece))


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8), first=st.integers(0, 20), larger=st.sampled_from([8, 16, 32]),
    asked=st.lists(st.sampled_from([None, 4, 8, 16, 32]), min_size=8, max_size=8),
)  # fmt: skip
def test_larger_ones_are_made_from_those_of_all_keys(sizes, first, larger, asked):
    """Whichever sizes were asked for before, and however the sequence grew."""
    summaries, k, length = KeySummaries(), keys(sum(sizes)), 0
    for size, other in zip(sizes, asked, strict=False):
        length += size
        summaries.upto(k[:, :length], first, 4, other)
    found = summaries.upto(k, first, 4, larger)
    assert (found.piece_tok, found.first_tok) == (larger, first)
    assert torch.equal(found.rows, coarsen(summarize(k[:, first:], piece_tok=4), times=larger // 4))
    assert torch.equal(summaries.upto(k, first, 4).rows, summarize(k[:, first:], piece_tok=4))


def test_a_piece_is_read_once():
    summaries, k = KeySummaries(), keys(100)
    before = summaries.upto(k[:, :70], 4, 16).rows.clone()
    k[:, :68] = torch.nan  # four pieces: summarized, never read again
    assert torch.equal(summaries.upto(k, 4, 16).rows[:, :4], before)


def test_they_move_rarely_while_they_grow():
    summaries, k, sizes = KeySummaries(), keys(1000), set()
    for length in range(1, 1001):
        summaries.upto(k[:, :length], 0, 1)
        sizes.add(summaries.bytes)
    assert len(sizes) < 25


def test_another_grid_is_refused():
    summaries = KeySummaries()
    summaries.upto(keys(50), 8, 4)
    for other in ((8, 8), (4, 4)):
        with pytest.raises(ValueError, match="keys were summarized in pieces from 8 by 4 tokens; one cache serves one pipeline"):
            summaries.upto(keys(50), *other)
