"""SelfExtend, restated: every query and key at a position, one pair at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention.methods import make_method
from hipexp.config.schema import ConfigError
from watched import SCALE, Layer, Text, plan, softmax, texts, turned


def logit(query, key, p, j, group, neighbours, rotary):
    """Near pairs at their true positions; far ones at floored ones, the query's moved up by what flooring took from the neighbours."""
    at = (p, j) if p - j < neighbours else (p // group + neighbours - neighbours // group, j // group)
    return np.dot(*(turned(x, i, rotary) for x, i in zip((query, key), at, strict=True)))


def check(read, h, t):
    text, g = read.text, h // read.text.group
    group, neighbours = read.plan.params["group_tok"], read.plan.params["neighbour_tok"]
    logits = [logit(text.q[h, t], text.k[g, j], t, j, group, neighbours, text.rotary) * SCALE for j in range(t + 1)]
    np.testing.assert_allclose(read.out[h, t], softmax(np.array(logits), read.softcap) @ text.v[g, : t + 1], atol=2e-5)


@settings(max_examples=15)
@given(text=texts(1, 60), group=st.integers(1, 9), neighbours=st.integers(1, 70), softcap=st.sampled_from([None, 3.0]))
def test_far_keys_share_positions_in_groups(text, group, neighbours, softcap):
    read = Layer(plan("self_extend", group_tok=group, neighbour_tok=neighbours), text, softcap).read_all()
    for h, t in np.ndindex(*text.q.shape[:2]):
        check(read, h, t)


@pytest.mark.parametrize(("group", "neighbours"), [(4, 64), (5, 33), (16, 300), (300, 20)])
def test_blocks_of_queries_meet_far_keys_of_other_blocks(group, neighbours):
    """The same over several of the blocks that queries are read in, at some of them."""
    drawn = np.random.default_rng(0)
    text = Text(*(drawn.standard_normal((n, 700, 8)) for n in (4, 2, 2)), 8, [(0, 300), (300, 600), (600, 690)])
    read = Layer(plan("self_extend", group_tok=group, neighbour_tok=neighbours), text).read_all()
    for t in (0, 31, 32, 63, 64, 255, 256, 299, 300, 319, 320, 511, 600, 689, 690, 699):
        for h in (0, 3):
            check(read, h, t)


@pytest.mark.parametrize("name", ["group_tok", "neighbour_tok"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ConfigError, match=f"pipeline.params.{name}=0 must be at least 1"):
        make_method(plan("self_extend", **{name: 0}))
