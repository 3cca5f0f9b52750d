"""Kascade, restated: attention after the softmax, summed for a tile and a key/value head, and its best keys taken over by later layers."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import brute
from by_hand import CLOSE, Layer, around, best, calls, plan, tensors
from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, ConfigError


def strongest(queries, keys, at, sink_tok, last, n_kept, scale):
    """The keys from ``sink_tok`` to ``last`` with most attention, and the closest decision.

    ``queries`` ``[G, n, D]`` of all heads of a key/value head, rotated, at positions ``at`` …; ``keys`` ``[T, D]``, rotated.
    """
    pooled = defaultdict(float)
    for head in queries:
        for position, query in enumerate(head, at):
            logits = keys[: position + 1] @ query * scale
            weights = np.exp(logits - logits.max())
            for j in range(sink_tok, last + 1):
                pooled[j] += weights[j] / weights.sum()
    chosen, margin = best({j: np.log(mass) for j, mass in pooled.items()}, n_kept)
    return set(chosen), margin


@settings(max_examples=20)
@given(
    made=tensors(longest=90), keep=st.integers(1, 20), sink=st.integers(0, 9), window=st.integers(1, 20), size=st.integers(1, 16),
    parts=st.integers(1, 9), anchors=st.sets(st.integers(0, 4), min_size=1).map(sorted),
    attend=st.sampled_from([AttendRope.native, AttendRope.streaming]),
)  # fmt: skip
def test_anchors_choose_for_the_layers_behind_them(made, keep, sink, window, size, parts, anchors, attend):
    q, k, v, rotary, prompt = made
    _, T, D = q.shape
    shared, layers = {}, {}
    for layer in range(5):  # each with queries and keys of its own
        p = plan("kascade", layer, sink_tok=sink, window_tok=window, anchors=anchors, keep_tok=keep, query_tok=size, attend=attend)
        layers[layer] = Layer(p, *(np.roll(x, 7 * layer, 1) for x in (q, k, v)), rotary, shared)
    for begin, end in calls(T, prompt, parts * size):
        for layer in layers.values():
            layer.read(begin, end, begin >= prompt)

    for number, layer in layers.items():
        anchor = max((a for a in anchors if a <= number), default=None)
        dense = number == 0 or anchor is None
        positions = brute.phase(np.arange(T), rotary)
        asking = layers[anchor or 0]
        rotated_q, rotated_k = brute.turned(asking.q, positions).reshape(len(k), -1, T, D), brute.turned(asking.k, positions)
        for first in [*range(0, prompt, size), *range(prompt, T)]:
            n_rows = 1 if first >= prompt else size
            end = min(first + n_rows, T if first >= prompt else prompt)
            for g in range(len(k)):
                chosen = set(range(T))
                if not dense and first + n_rows > sink + window + keep:
                    chosen, margin = strongest(rotated_q[g, :, first:end], rotated_k[g], first, sink, first - window, keep, D**-0.5)
                    assume(margin > CLOSE)
                for t in range(first, end):
                    lists = [s for s, at in layer.seen if at == t]
                    assert layer.seen[g if len(lists) > 1 else 0, t] == around(layer.plan, chosen, first, t)
        layer.check_outputs()


def test_only_the_last_selection_of_an_anchor_is_kept():
    q = np.random.default_rng(0).standard_normal((2, 256, 4))
    read = Layer(plan("kascade", 2, sink_tok=0, window_tok=8, keep_tok=8, query_tok=32), q, q, q, 4).read_all(255, 64)
    ((start, kept),) = read.shared.values()
    assert start == 255 and kept.blocks.shape == (2, 1, 8)


def test_a_layer_says_when_its_anchor_did_not_see_the_tokens():
    q = np.random.default_rng(0).standard_normal((2, 64, 4))
    sizes = dict(sink_tok=0, window_tok=8, keep_tok=8, query_tok=16)
    shared = {}
    anchor, reusing = (Layer(plan("kascade", layer, **sizes), q, q, q, 4, shared) for layer in (2, 3))
    with pytest.raises(ValueError, match="layer 3 takes over what layer 2 selected"):
        reusing.read(0, 32, False)
    anchor.read(0, 32, False)
    reusing.read(0, 32, False)
    with pytest.raises(ValueError, match="layer 3 takes over what layer 2 selected"):
        reusing.read(32, 64, False)


@pytest.mark.parametrize("anchors", [[], [-1, 2], [2, 2], [3, 1]])
def test_anchors_are_layers_in_order(anchors):
    with pytest.raises(ConfigError, match=r"pipeline.params.anchors="):
        make_method(plan("kascade", anchors=anchors))
