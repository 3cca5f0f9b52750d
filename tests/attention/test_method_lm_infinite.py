"""LM-Infinite against a plain statement of arXiv 2308.16137, one query at a time; in decode streaming can state it too, behind its budget."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import AttendRope
from watched import SCALE, Layer, plan, softmax, texts, turned


def rule(text, h, p, sink, window, softcap=None):
    """The query at ``p`` sees the first ``sink`` keys and those nearer than ``window``, none as farther than ``window``."""
    tokens = [j for j in range(p + 1) if j < sink or p - j < window]
    distance = np.array([min(p - j, window) for j in tokens])
    k, v = (x[h // text.group, tokens] for x in (text.k, text.v))
    logits = turned(k, window - distance, text.rotary) @ turned(text.q[h, p], window, text.rotary) * SCALE
    return softmax(logits, softcap) @ v


@given(
    data=st.data(), text=texts(12, 600), sink=st.integers(0, 40), window=st.one_of(st.integers(1, 300), st.just(256)),
    softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
@settings(max_examples=25)
def test_sinks_and_window_with_a_ceiling(data, text, sink, window, softcap):
    one, T = Layer(plan("lm_infinite", sink_tok=sink, window_tok=window), text, softcap).read_all(), text.q.shape[1]
    drawn = data.draw(st.sets(st.integers(0, T - 1), max_size=12))
    for p in drawn | {i for i in (0, sink, window - 1, window, window + sink, *range(text.prompt - 2, T)) if 0 <= i < T}:
        for h in range(len(text.q)):
            np.testing.assert_allclose(one.out[h, p], rule(text, h, p, sink, window, softcap), atol=2e-5)
    assert one.attention.pruned_blocks == max(0, T - window)


@given(text=texts(150, 260), sink=st.integers(0, 20), window=st.integers(1, 100))
@settings(max_examples=10)
def test_in_decode_streaming_with_positions_of_infllm_is_the_same(text, sink, window):
    one, T = (
        Layer(plan("streaming", sink_tok=sink, window_tok=window, attend=AttendRope.infllm), replace(text, parts=[(0, 0)])),
        text.q.shape[1],
    )
    for p in range(T - 3, T):
        one.read(p, p + 1)
        for h in range(len(text.q)):
            np.testing.assert_allclose(one.out[h, p], rule(text, h, p, sink, window), atol=2e-5)
