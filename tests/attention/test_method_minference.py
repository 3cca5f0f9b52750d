"""MInference's vertical-slash heads against a plain statement of arXiv 2407.02490, one head and one query at a time."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, ConfigError, Pipeline, PruneRope, Rope
from rules import CLOSE, Layer, attend_at_true_positions, cut, logits, qkv, softmax

BLOCK = 64  # queries that read together
NATIVE = Rope(PruneRope.native, AttendRope.native)


def strongest(sums, n, forced):
    """The first ``forced`` and the largest of the others, ``n`` in all."""
    others = sorted(range(forced, len(sums)), key=lambda i: -sums[i])
    chosen, left = others[: n - forced], others[n - forced :]
    assume(not chosen or not left or sums[chosen[-1]] - sums[left[0]] > CLOSE)
    return {*range(min(forced, len(sums))), *chosen}


def lines(q, k, begin, end, rotary, sizes):
    """Columns and distances that one head keeps for a part of a prompt that ends before ``end``: its last queries decide.

    Queries before ``begin`` see everything and have no say.
    """
    column, distance = np.zeros(end), np.zeros(end)
    for p in range(max(begin, end - sizes["last_tok"]), end):
        for j, weight in enumerate(softmax(logits(q[p], k[: p + 1], p, np.arange(p + 1), rotary))):
            column[j] += weight
            distance[p - j] += weight
    return strongest(column, sizes["verticals"], sizes["first_tok"]), strongest(distance, sizes["slashes"], sizes["near_tok"])


def read_by_block(first, columns, distances):
    """What the queries of a block read of the tokens before it."""
    rows = range(first, first + BLOCK)
    return {j for j in range(first) if j in columns or any(p - j in distances for p in rows)}


@st.composite
def prompts(draw):
    q, k, v, rotary = draw(qkv(100, 300))
    first_tok, near_tok = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    sizes = {
        "verticals": draw(st.integers(first_tok + 1, 130)), "slashes": draw(st.integers(near_tok + 1, 130)), "first_tok": first_tok,
        "near_tok": near_tok, "last_tok": draw(st.integers(1, 70)),
    }  # fmt: skip
    pipeline = Pipeline(
        method="minference",
        rope=NATIVE,
        params=sizes,
        sink_tok=draw(st.sampled_from([0, 0, 5])),
        window_tok=draw(st.sampled_from([1, 1, 20])),
    )
    return q, k, v, rotary, sizes, pipeline, cut(draw, q.shape[1] - 3, BLOCK)


@given(prompt=prompts(), softcap=st.sampled_from([None, 2.0]))
@settings(max_examples=25, deadline=None)
def test_vertical_slash(prompt, softcap):
    q, k, v, rotary, sizes, pipeline, parts = prompt
    one, group, budget = Layer(pipeline, rotary, softcap=softcap), len(q) // len(k), min(sizes["verticals"], sizes["slashes"])
    for begin, end in parts:
        out = one.read(q, k, v, begin, end)
        whole = next((first for first in range(begin, end, BLOCK) if first + BLOCK > budget), end)  # blocks before see everything
        kept = [lines(q[h], k[h // group], whole, end, rotary, sizes) for h in range(len(q) if whole < end else 0)]
        for first in range(begin, end, BLOCK):
            seen = one.seen.pop(first)
            assert (seen is None) == (first < whole)
            for h in range(len(q)):
                expected = set(range(first))
                if seen is not None:
                    always = {*range(min(first, pipeline.sink_tok)), *range(max(0, first - pipeline.window_tok + 1), first)}
                    expected = read_by_block(first, *kept[h]) | always
                    assert seen[h] == expected
                p = min(first + 7 * h + 3, end - 1)
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


@pytest.mark.parametrize(("name", "value"), [("first_tok", 41), ("near_tok", 51), ("last_tok", 0)])
def test_parameters_that_are_none(name, value):
    params = {"verticals": 40, "slashes": 50, "near_tok": 10, name: value}
    with pytest.raises(ConfigError, match=f"pipeline.params.{name}={value} must be"):
        make_method(Pipeline(method="minference", params=params).plan_layer(0, []))
