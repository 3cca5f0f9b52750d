"""Quest, restated: bounds of pages from all their keys at every step, one query and one head at a time."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import brute
from by_hand import CLOSE, Layer, around, best, plan, tensors
from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, ConfigError


def pages(query, keys, sink_tok, window_tok, page_tok, n_pages):
    """Tokens of the best pages for a rotated query ``[D]`` over rotated keys ``[n, D]``, itself the last; and the closest decision.

    A page takes part if it begins before the window.
    """
    bound = {}
    for start in range(sink_tok, len(keys) - window_tok, page_tok):
        page = keys[start : start + page_tok]
        bound[start] = sum(max(x * min(numbers), x * max(numbers)) for x, numbers in zip(query, page.T, strict=True))
        assert bound[start] >= max(page @ query) - 1e-9  # so it is a bound
    chosen, margin = best(bound, n_pages)
    return {start + t for start in chosen for t in range(page_tok)}, margin


@settings(max_examples=30)
@given(
    made=tensors(), page=st.integers(1, 8), kept=st.integers(0, 4), sink=st.integers(0, 9), more=st.integers(0, 9),
    part=st.integers(1, 60), layer=st.integers(0, 4), dense=st.integers(0, 3),
    attend=st.sampled_from([AttendRope.native, AttendRope.streaming]),
)  # fmt: skip
def test_decode_reads_the_pages_of_the_largest_bounds(made, page, kept, sink, more, part, layer, dense, attend):
    q, k, v, rotary, prompt = made
    keep = page * kept
    p = plan("quest", layer, sink_tok=sink, window_tok=page + more, page_tok=page, keep_tok=keep, dense_layers=dense, attend=attend)
    read = Layer(p, q, k, v, rotary).read_all(prompt, part)
    H, T, _ = q.shape
    rotated = brute.turned(k, brute.phase(np.arange(T), rotary))
    for t in range(T):
        for h in range(H):
            lists = [s for s, at in read.seen if at == t]
            seen = read.seen[h if len(lists) > 1 else 0, t]
            if t < prompt or layer < dense or t < sink + page + more + keep:
                assert seen == list(range(t + 1))
                continue
            query = brute.turned(q[h, t], brute.phase(t, rotary))
            chosen, margin = pages(query, rotated[h * len(k) // H, : t + 1], sink, page + more, page, kept)
            assume(margin > CLOSE)
            assert seen == around(p, chosen, t, t)
    read.check_outputs()


def test_bounds_of_whole_pages_are_kept():
    """What is kept is as much as two keys of each page, in fp32."""
    q = np.random.default_rng(0).standard_normal((2, 60, 4))
    read = Layer(plan("quest", sink_tok=2, window_tok=8, page_tok=8, keep_tok=8), q, q[:1], q[:1], 4).read_all(50, 50)
    assert read.state.bytes == 2 * (58 // 8) * 4 * 4 and read.state.low.dtype is torch.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"window_tok": 15},
            "window_tok=15 must be at least pipeline.params.page_tok=16, so that a page which is not whole lies in the window",
        ),
        ({"keep_tok": 40}, "params.keep_tok=40 must be a multiple of page_tok; try 2048"),
        ({"page_tok": 0}, "params.page_tok=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        make_method(plan("quest", **given))
