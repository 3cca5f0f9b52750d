"""Query blocks lie on a grid that is fixed to the sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipexp.attention.blocks import QueryBlocks


@given(begin=st.integers(0, 40), count=st.integers(1, 50), size=st.sampled_from([1, 4, 8, 16]))
def test_cut_and_rows_are_inverse(begin, count, size):
    q = torch.randn(2, count, 3)
    blocks = QueryBlocks.cut(q, begin, size)
    assert (blocks.first % size == 0).all() and int(blocks.first[0]) <= begin < int(blocks.first[0]) + size
    assert torch.equal(blocks.rows(blocks.q), q)


@given(begin=st.integers(0, 40), count=st.integers(1, 50), stride=st.sampled_from([1, 2, 4]))
def test_pooling_is_the_mean_over_members_that_exist(begin, count, stride):
    q, size = torch.randn(1, count, 3), 8
    blocks = QueryBlocks.cut(q, begin, size)
    pooled, position = blocks.pool(stride)
    for n, first in enumerate(blocks.first.tolist()):
        groups = {}
        for start in range(first, first + size, stride):
            members = [q[0, p - begin] for p in range(start, start + stride) if begin <= p < begin + count]
            if members:
                groups[start] = torch.stack(members).mean(0)
        for r, at in enumerate(position[n].tolist()):
            assert torch.allclose(pooled[0, n, r], groups[at], atol=1e-6)
        assert set(position[n].tolist()) == set(groups), "every group that exists takes part, none twice as another"


def test_split_keeps_the_queries():
    q = torch.arange(64.0).view(1, 64, 1)
    blocks = QueryBlocks.cut(q, 0, 32).split(8)
    assert blocks.first.tolist() == list(range(0, 64, 8)) and torch.equal(blocks.rows(blocks.q), q)


@given(begin=st.integers(0, 40), count=st.integers(1, 50), size=st.sampled_from([1, 2, 8]))
def test_split_leaves_out_what_is_past_the_end(begin, count, size):
    q, whole = torch.randn(2, count, 3), QueryBlocks.cut(torch.zeros(2, count, 3), begin, 16)
    blocks = QueryBlocks.cut(q, begin, 16).split(size)
    assert blocks.first.tolist() == list(range(int(whole.first[0]), begin + count, size))
    assert blocks.q.shape == (2, len(blocks.first), size, 3) and torch.equal(blocks.rows(blocks.q), q)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_from_block(n):
    blocks = QueryBlocks.cut(torch.randn(1, 20, 2), 5, 8).from_block(n)
    assert blocks.begin == max(5, 8 * n) and blocks.end == 25 and int(blocks.first[0]) == 8 * n
