"""XAttention against a plain statement of arXiv 2503.16428, one head and one block of queries at a time."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hipexp.attention.methods import make_method
from hipexp.config.schema import ConfigError
from watched import CLOSE, SCALE, Layer, Text, plan, softmax, texts, turned


def shares(products, first, end, block, stride):
    """What each block of keys gets of the attention of the queries of one block that exist, estimated by antidiagonals.

    ``products`` ``[T, T]`` of rotated queries with rotated keys, scaled.
    """
    out = np.zeros(first // block + 1)
    for row in range(first, min(first + block, end), stride):
        tiles = []
        for column in range(0, row + 1, stride):  # also the tile of the row itself, all of it
            pairs = ((row + i, column + stride - 1 - i) for i in range(stride))
            tiles.append(sum(products[a, b] for a, b in pairs if max(a, b) < end) / stride)
        for tile, weight in enumerate(softmax(np.array(tiles))):
            out[tile * stride // block] += weight
    return out / out.sum()


def fewest(share, anyway, mass):
    """Blocks that are read: those that are ``anyway``, and the largest others until all hold ``mass``."""
    chosen, others = set(anyway), sorted(set(range(len(share))) - set(anyway), key=lambda i: -share[i])
    for i, block in enumerate(others):
        held = sum(share[b] for b in chosen)
        assume(abs(held - mass) > CLOSE)
        if held >= mass:
            assume(not i or share[others[i - 1]] - share[block] > CLOSE)
            break
        chosen.add(block)
    return chosen


@st.composite
def plans(draw):
    block = draw(st.sampled_from([8, 16, 32]))
    return plan(
        "xattention", block_tok=block, stride_tok=draw(st.sampled_from([1, 2, 4, 8])), mass=draw(st.floats(0.05, 0.98)),
        sink_tok=draw(st.sampled_from([0, 0, block, 2 * block])), window_tok=draw(st.sampled_from([1, 1, 5, block, block + 1, 40])),
    )  # fmt: skip


@given(data=st.data(), plan=plans(), softcap=st.sampled_from([None, 2.0]))
@settings(max_examples=45)
def test_antidiagonals_and_dense_decode(data, plan, softcap):
    (block, stride, mass), sink, window = plan.params.values(), plan.sink_tok, plan.window_tok
    text = data.draw(texts(70, 260, grain=block))
    one = Layer(plan, text, softcap).read_all()
    q, k = (turned(x, np.arange(x.shape[1]), text.rotary) for x in (text.q, text.k))
    products = q @ k.repeat(text.group, 0).swapaxes(1, 2) * SCALE
    for begin, end in text.parts:
        for first in range(begin, end, block):
            assert (one.seen[first] is None) == (first == 0)
            for h, seen in enumerate(one.seen[first] or []):
                share = shares(products[h], first, end, block, stride)
                anyway = [b for b in range(len(share)) if b * block < sink or b * block > first - window]
                read = {b * block + t for b in fewest(share, anyway, mass) for t in range(block)}
                assert seen == read & {*range(sink, first - window + 1)}
            assert first == 0 or len(one.seen[first]) == len(q)
    assert all(one.seen[t] is None for t in range(text.prompt, q.shape[1]))
    one.check_outputs()


def test_a_part_begins_where_a_block_does():
    x = np.zeros((1, 64, 8))
    one = Layer(plan("xattention", block_tok=32, sink_tok=0), Text(x, x, x, 8, [(0, 40), (40, 64)]))
    with pytest.raises(ValueError, match="begins at token 40"):
        one.read(40, 64)


@pytest.mark.parametrize(("name", "value"), [("mass", 0.0), ("mass", 1.5), ("stride_tok", 0), ("stride_tok", 24), ("block_tok", 48)])
def test_parameters_that_are_none(name, value):
    with pytest.raises(ConfigError, match=f"pipeline.params.{'mass' if name == 'mass' else 'block_tok'}="):
        make_method(plan("xattention", sink_tok=64, **{"block_tok": 32, name: value}))
