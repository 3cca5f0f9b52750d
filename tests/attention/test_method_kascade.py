"""Kascade, restated: attention after the softmax, summed for a tile and a key/value head, and its best keys taken over by later layers."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, ConfigError
from watched import SCALE, Layer, Text, best, plan, softmax, texts, turned


def strongest(queries, keys, at, sink_tok, last, n_kept, softcap):
    """The keys from ``sink_tok`` to ``last`` with most attention.

    ``queries`` ``[G, n, D]`` of all heads of a key/value head, rotated, at positions ``at`` …; ``keys`` ``[T, D]``, rotated.
    """
    pooled = defaultdict(float)
    for head in queries:
        for position, query in enumerate(head, at):
            weights = softmax(keys[: position + 1] @ query * SCALE, softcap)
            for j in range(sink_tok, last + 1):
                pooled[j] += weights[j]
    return set(best({j: np.log(mass) for j, mass in pooled.items()}, n_kept))


@settings(max_examples=25)
@given(
    data=st.data(), keep=st.integers(1, 20), sink=st.integers(0, 9), window=st.integers(1, 20), size=st.integers(1, 16),
    anchors=st.sets(st.integers(0, 4), min_size=1).map(sorted), attend=st.sampled_from([AttendRope.native, AttendRope.streaming]),
    softcap=st.sampled_from([None, 1.0]),
)  # fmt: skip
def test_anchors_choose_for_the_layers_behind_them(data, keep, sink, window, size, anchors, attend, softcap):
    text = data.draw(texts(1, 90, grain=size))
    shared, layers = {}, {}
    for layer in range(5):  # each with queries and keys of its own
        p = plan("kascade", layer, sink_tok=sink, window_tok=window, anchors=anchors, keep_tok=keep, query_tok=size, attend=attend)
        q, k, v = (np.roll(x, 7 * layer, 1) for x in (text.q, text.k, text.v))
        layers[layer] = Layer(p, replace(text, q=q, k=k, v=v), softcap, shared)
    for begin, end in text.calls():
        for layer in layers.values():
            layer.read(begin, end)

    for number, layer in layers.items():
        anchor = max((a for a in anchors if a <= number), default=None)
        dense = number == 0 or anchor is None
        asking = layers[anchor or 0].text
        q, k = (turned(x, np.arange(x.shape[1]), text.rotary) for x in (asking.q, asking.k))
        for first, grid_end, end, _ in layer.blocks():
            lists = None
            if not dense and grid_end > sink + window + keep:
                heads = zip(q.reshape(len(k), -1, *q.shape[1:]), k, strict=True)
                lists = [strongest(own[:, first:end], keys, first, sink, first - window, keep, softcap) for own, keys in heads]
            assert layer.seen[first] == lists
        layer.check_outputs()


def test_only_the_last_selection_of_an_anchor_is_kept():
    q = np.random.default_rng(0).standard_normal((2, 256, 4))
    text = Text(q, q, q, 4, [(0, 64), (64, 128), (128, 192), (192, 255)])
    read = Layer(plan("kascade", 2, sink_tok=0, window_tok=8, keep_tok=8, query_tok=32), text).read_all()
    ((start, kept),) = read.shared.values()
    assert start == 255 and kept.blocks.shape == (2, 1, 8)


def test_a_layer_says_when_its_anchor_did_not_see_the_tokens():
    q = np.random.default_rng(0).standard_normal((2, 64, 4))
    sizes = dict(sink_tok=0, window_tok=8, keep_tok=8, query_tok=16)
    shared, text = {}, Text(q, q, q, 4, [(0, 32), (32, 64)])
    anchor, reusing = (Layer(plan("kascade", layer, **sizes), text, shared=shared) for layer in (2, 3))
    with pytest.raises(ValueError, match="layer 3 takes over what layer 2 selected"):
        reusing.read(0, 32)
    anchor.read(0, 32)
    reusing.read(0, 32)
    with pytest.raises(ValueError, match="layer 3 takes over what layer 2 selected"):
        reusing.read(32, 64)


@pytest.mark.parametrize("anchors", [[], [-1, 2], [2, 2], [3, 1]])
def test_anchors_are_layers_in_order(anchors):
    with pytest.raises(ConfigError, match=r"pipeline.params.anchors="):
        make_method(plan("kascade", anchors=anchors))
