"""Quest, restated: bounds of pages from all their keys at every step, one query and one head at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, ConfigError
from watched import Layer, Text, best, plan, texts, turned


def pages(query, keys, sink_tok, window_tok, page_tok, n_pages):
    """Tokens of the best pages for a rotated query ``[D]`` over rotated keys ``[n, D]``, itself the last.

    A page takes part if it begins before the window.
    """
    bound = {}
    for start in range(sink_tok, len(keys) - window_tok, page_tok):
        page = keys[start : start + page_tok]
        bound[start] = np.maximum(query * page.min(0), query * page.max(0)).sum()
        assert bound[start] >= max(page @ query) - 1e-9  # so it is a bound
    return {start + t for start in best(bound, n_pages) for t in range(page_tok)}


@settings(max_examples=30)
@given(
    text=texts(1, 150), page=st.integers(1, 8), kept=st.integers(0, 4), sink=st.integers(0, 9), more=st.integers(0, 9),
    layer=st.integers(0, 4), dense=st.integers(0, 3), attend=st.sampled_from([AttendRope.native, AttendRope.streaming]),
)  # fmt: skip
def test_decode_reads_the_pages_of_the_largest_bounds(text, page, kept, sink, more, layer, dense, attend):
    keep, window = page * kept, page + more
    p = plan("quest", layer, sink_tok=sink, window_tok=window, page_tok=page, keep_tok=keep, dense_layers=dense, attend=attend)
    read = Layer(p, text).read_all()
    rotated = turned(text.k, np.arange(text.k.shape[1]), text.rotary)
    for t, _, _, decoding in read.blocks():
        if not decoding or layer < dense or t < sink + window + keep:
            assert read.seen[t] is None
            continue
        for h, seen in enumerate(read.seen[t]):
            chosen = pages(turned(text.q[h, t], t, text.rotary), rotated[h // text.group, : t + 1], sink, window, page, kept)
            assert seen == {j for j in chosen if j <= t - window}
        assert len(read.seen[t]) == len(text.q)
    read.check_outputs()


def test_bounds_of_whole_pages_are_kept():
    """What is kept is as much as two keys of each page, in fp32."""
    q = np.random.default_rng(0).standard_normal((2, 60, 4))
    read = Layer(plan("quest", sink_tok=2, window_tok=8, page_tok=8, keep_tok=8), Text(q, q[:1], q[:1], 4, [(0, 50)])).read_all()
    assert read.state.bytes == 2 * (58 // 8) * 4 * 4 and read.state.low.dtype is torch.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"window_tok": 15},
            "window_tok=15 must be at least pipeline.params.page_tok=16, so that a page which is not whole lies in the window",
        ),
        ({"keep_tok": 40}, "params.keep_tok=40 must be a multiple of page_tok=16; try 32"),
        ({"page_tok": 0}, "params.page_tok=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_method(plan("quest", **given))
