"""MInference's vertical-slash heads against a plain statement of arXiv 2407.02490, one head and one query at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention.methods import make_method
from hipexp.config.schema import ConfigError
from watched import SCALE, Layer, best, plan, softmax, texts, turned

BLOCK = 64  # queries that read together


def strongest(sums, n, forced):
    """The first ``forced`` and the largest of the others, ``n`` in all."""
    others = best({i: sums[i] for i in range(forced, len(sums))}, n - forced)
    return {*range(min(forced, len(sums))), *others}


def lines(q, k, begin, end, sizes, softcap):
    """Columns and distances that one head keeps, by rotated queries and keys, for a part of a prompt that ends before ``end``: its last queries decide.

    Queries before ``begin`` see everything and have no say.
    """
    column, distance = np.zeros(end), np.zeros(end)
    for p in range(max(begin, end - sizes["last_tok"]), end):
        for j, weight in enumerate(softmax(k[: p + 1] @ q[p] * SCALE, softcap)):
            column[j] += weight
            distance[p - j] += weight
    return strongest(column, sizes["verticals"], sizes["first_tok"]), strongest(distance, sizes["slashes"], sizes["near_tok"])


def read_by_block(first, columns, distances):
    """What the queries of a block read of the tokens before it."""
    rows = range(first, first + BLOCK)
    return {j for j in range(first) if j in columns or any(p - j in distances for p in rows)}


@st.composite
def plans(draw):
    first_tok, near_tok = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    return plan(
        "minference", first_tok=first_tok, near_tok=near_tok, verticals=draw(st.integers(first_tok + 1, 130)),
        slashes=draw(st.integers(near_tok + 1, 130)), last_tok=draw(st.integers(1, 70)), sink_tok=draw(st.sampled_from([0, 0, 5])),
        window_tok=draw(st.sampled_from([1, 1, 20])),
    )  # fmt: skip


@given(plan=plans(), text=texts(100, 300, grain=BLOCK), softcap=st.sampled_from([None, 2.0]))
@settings(max_examples=30)
def test_vertical_slash_and_dense_decode(plan, text, softcap):
    one, budget = Layer(plan, text, softcap).read_all(), min(plan.params["verticals"], plan.params["slashes"])
    q, k = (turned(x, np.arange(x.shape[1]), text.rotary) for x in (text.q, text.k))
    for begin, end in text.parts:
        whole = next((first for first in range(begin, end, BLOCK) if first + BLOCK > budget), end)  # blocks before see everything
        kept = [lines(q[h], k[h // text.group], whole, end, plan.params, softcap) for h in range(len(q) if whole < end else 0)]
        for first in range(begin, end, BLOCK):
            far = {*range(plan.sink_tok, first - plan.window_tok + 1)}
            assert one.seen[first] == (None if first < whole else [read_by_block(first, *own) & far for own in kept])
    assert all(one.seen[t] is None for t in range(text.prompt, q.shape[1]))
    one.check_outputs()


@pytest.mark.parametrize(("name", "value"), [("first_tok", 41), ("near_tok", 51), ("last_tok", 0)])
def test_parameters_that_are_none(name, value):
    params = {"verticals": 40, "slashes": 50, "near_tok": 10, name: value}
    with pytest.raises(ConfigError, match=f"pipeline.params.{name}={value} must be"):
        make_method(plan("minference", **params))
