"""LM-Infinite against a plain statement of arXiv 2308.16137, one query at a time; in decode streaming can state it too, behind its budget."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import AttendRope, Pipeline, Rope
from rules import Layer, attend, cut, qkv


def rule(query, keys, values, p, sink, window, rotary, softcap):
    """The query at ``p`` sees the first ``sink`` keys and those nearer than ``window``, none as farther than ``window``."""
    tokens = [j for j in range(p + 1) if j < sink or p - j < window]
    distance = np.array([min(p - j, window) for j in tokens])
    return attend(query, keys[tokens], values[tokens], window, window - distance, rotary, softcap)


@given(
    data=st.data(), drawn=qkv(12, 600), sink=st.integers(0, 40), window=st.one_of(st.integers(1, 300), st.just(256)),
    softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_sinks_and_window_with_a_ceiling(data, drawn, sink, window, softcap):
    q, k, v, rotary = drawn
    T, one = q.shape[1], Layer(Pipeline(method="lm_infinite", sink_tok=sink, window_tok=window), rotary, softcap=softcap)
    out = [one.read(q, k, v, *part) for part in cut(data.draw, T - 4, 1)]
    out = np.concatenate([*out, *(one.step(q, k, v, t)[:, None] for t in range(T - 4, T))], 1)
    drawn = data.draw(st.sets(st.integers(0, T - 1), max_size=12))
    for p in drawn | {i for i in (0, sink, window - 1, window, window + sink, *range(T - 6, T)) if i < T}:
        for h in range(len(q)):
            kv = h // (len(q) // len(k))
            np.testing.assert_allclose(out[h, p], rule(q[h, p], k[kv], v[kv], p, sink, window, rotary, softcap), atol=2e-5)
    assert one.attention.pruned_blocks == max(0, T - window)


@given(drawn=qkv(150, 260), sink=st.integers(0, 20), window=st.integers(1, 100))
@settings(max_examples=10, deadline=None)
def test_in_decode_streaming_with_positions_of_infllm_is_the_same(drawn, sink, window):
    q, k, v, rotary = drawn
    one = Layer(Pipeline(method="streaming", sink_tok=sink, window_tok=window, rope=Rope(attend=AttendRope.infllm)), rotary)
    T = q.shape[1]
    for p in range(T - 3, T):
        out = one.step(q, k, v, p)
        for h in range(len(q)):
            kv = h // (len(q) // len(k))
            np.testing.assert_allclose(out[h], rule(q[h, p], k[kv], v[kv], p, sink, window, rotary, None), atol=2e-5)
