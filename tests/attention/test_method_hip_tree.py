"""HiP, restated: lists of chunks that are halved, one block of queries and one head at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, ConfigError
from watched import Layer, best, plan, texts, turned


def tree(queries, keys, sink_tok, last, block_tok, n_kept, key_stride):
    """Tokens kept for rotated queries ``[n, D]`` of rotated keys ``[T, D]`` from ``sink_tok`` to ``last``."""
    n_blocks = max(0, -(-(last + 1 - sink_tok) // block_tok))
    n = min(n_kept, n_blocks)
    chunks = [range(j * n_blocks // n, (j + 1) * n_blocks // n) for j in range(n)]
    while any(len(chunk) > 1 for chunk in chunks):
        middles = [-(-(chunk.start + chunk.stop) // 2) for chunk in chunks]
        halves = [half for c, m in zip(chunks, middles, strict=True) for half in (range(c.start, m), range(m, c.stop)) if half]
        scores = {}
        for half in halves:
            block = half[len(half) // 2]  # the one in the middle stands for it
            probed = [sink_tok + block * block_tok + t for t in range(0, block_tok, key_stride)]
            scores[half] = max(query @ keys[j] for query in queries for j in probed if j <= last)
        chunks = best(scores, n)
    return {sink_tok + chunk.start * block_tok + t for chunk in chunks for t in range(block_tok)}


@settings(max_examples=60)
@given(
    data=st.data(), block=st.integers(1, 6), kept=st.integers(0, 6), sink=st.integers(0, 9), window=st.integers(1, 20),
    size=st.integers(1, 12), query_stride=st.integers(1, 3), key_stride=st.integers(1, 3), layer=st.integers(0, 6),
    attend=st.sampled_from([AttendRope.native, AttendRope.streaming]),
)  # fmt: skip
def test_halves_that_go_on_are_those_of_the_largest_products(
    data, block, kept, sink, window, size, query_stride, key_stride, layer, attend
):
    text = data.draw(texts(1, 100, grain=size))
    p = plan(
        "hip_tree", layer, sink_tok=sink, window_tok=window, keep_tok=block * kept, block_tok=block, query_tok=size,
        query_stride_tok=query_stride, key_stride_tok=key_stride, dense_layers=2, attend=attend,
    )  # fmt: skip
    read = Layer(p, text).read_all()
    q, k = (turned(x, np.arange(x.shape[1]), text.rotary) for x in (text.q, text.k))
    for first, grid_end, end, _ in read.blocks():
        lists = None
        if layer >= 2 and grid_end > sink + window + block * kept:
            edge = first - window
            lists = [tree(q[h, first:end:query_stride], k[h // text.group], sink, edge, block, kept, key_stride) for h in range(len(q))]
            lists = [{j for j in chosen if j <= edge} for chosen in lists]
        assert read.seen[first] == lists
    read.check_outputs()


@pytest.mark.parametrize("name", ["block_tok", "query_tok", "query_stride_tok", "key_stride_tok"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ConfigError, match=f"params.{name}=0 must be at least 1"):
        make_method(plan("hip_tree", **{name: 0}))


def test_whole_blocks_are_kept():
    with pytest.raises(ConfigError, match=r"params.keep_tok=12 must be a multiple of block_tok=8; try 8"):
        make_method(plan("hip_tree", keep_tok=12, block_tok=8))
