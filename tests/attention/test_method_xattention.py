"""XAttention against a plain statement of arXiv 2503.16428, one head and one block of queries at a time."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import brute
from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, ConfigError, Pipeline, PruneRope, Rope
from rules import CLOSE, SCALE, Layer, attend_at_true_positions, cut, qkv, softmax

NATIVE = Rope(PruneRope.native, AttendRope.native)


def shares(q, k, first, end, block, stride, rotary):
    """What each block of keys gets of the attention of the queries of one block that exist, estimated by antidiagonals."""
    q, k = (brute.turned(x[:end], brute.phase(np.arange(end), rotary)) for x in (q, k))
    out = np.zeros(first // block + 1)
    for row in range(first, min(first + block, end), stride):
        tiles = []
        for column in range(0, row + 1, stride):  # also the tile of the row itself, all of it
            pairs = ((row + i, column + stride - 1 - i) for i in range(stride))
            tiles.append(sum(q[a] @ k[b] for a, b in pairs if max(a, b) < end) * SCALE / stride)
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
def prompts(draw):
    q, k, v, rotary = draw(qkv(70, 260))
    block = draw(st.sampled_from([8, 16, 32]))
    params = {"block_tok": block, "stride_tok": draw(st.sampled_from([1, 2, 4, 8])), "mass": draw(st.floats(0.05, 0.98))}
    sink, window = draw(st.sampled_from([0, 0, block, 2 * block])), draw(st.sampled_from([1, 1, 5, block, block + 1, 40]))
    pipeline = Pipeline(method="xattention", rope=NATIVE, params=params, sink_tok=sink, window_tok=window)
    return 2 * q, k, v, rotary, params, pipeline, cut(draw, q.shape[1] - 3, block)


@given(prompt=prompts(), softcap=st.sampled_from([None, 2.0]))
@settings(max_examples=25, deadline=None)
def test_antidiagonals(prompt, softcap):
    q, k, v, rotary, params, pipeline, parts = prompt
    block, stride, mass = params.values()
    sink, window = pipeline.sink_tok, pipeline.window_tok
    one, group = Layer(pipeline, rotary, softcap=softcap), len(q) // len(k)
    for begin, end in parts:
        out = one.read(q, k, v, begin, end)
        for first in range(begin, end, block):
            seen = one.seen.pop(first)
            assert (seen is None) == (first == 0)
            for h in range(len(q)):
                share = shares(q[h], k[h // group], first, end, block, stride, rotary)
                anyway = [b for b in range(len(share)) if b * block < sink or b * block > first - window]
                read = {b * block + t for b in fewest(share, anyway, mass) for t in range(block)}
                expected = {j for j in range(first) if j in read or j < sink or j > first - window}
                assert seen is None or seen[h] == expected
                p = min(first + 3 * h + 3, end - 1, first + block - 1)
                row = attend_at_true_positions(q[h, p], k[h // group], v[h // group], p, expected | {*range(first, p + 1)}, rotary, softcap)
                np.testing.assert_allclose(out[h, p - begin], row, atol=2e-5)


@given(prompt=prompts())
@settings(max_examples=10, deadline=None)
def test_decode_is_dense(prompt):
    q, k, v, rotary, _, pipeline, parts = prompt
    one, T = Layer(pipeline, rotary), q.shape[1]
    for part in parts:
        one.read(q, k, v, *part)
    for p in range(T - 3, T):
        out = one.step(q, k, v, p)
        assert one.seen.pop(p) is None
        for h in range(len(q)):
            kv = h // (len(q) // len(k))
            np.testing.assert_allclose(out[h], attend_at_true_positions(q[h, p], k[kv], v[kv], p, range(p + 1), rotary), atol=2e-5)


def test_a_part_begins_where_a_block_does():
    x = np.zeros((1, 64, 8))
    one = Layer(Pipeline(method="xattention", rope=NATIVE, params={"block_tok": 32}, sink_tok=0), 8)
    with pytest.raises(ValueError, match="begins at token 40"):
        one.read(x, x, x, 40, 64)


@pytest.mark.parametrize(("name", "value"), [("mass", 0.0), ("mass", 1.5), ("stride_tok", 0), ("stride_tok", 24), ("block_tok", 48)])
def test_parameters_that_are_none(name, value):
    with pytest.raises(ConfigError, match=f"pipeline.params.{'mass' if name == 'mass' else 'block_tok'}="):
        make_method(Pipeline(method="xattention", sink_tok=64, params={"block_tok": 32, name: value}).plan_layer(0, []))
