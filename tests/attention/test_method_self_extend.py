"""SelfExtend, restated: every query and key at a position, one pair at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brute
from by_hand import Layer, plan, tensors
from hipexp.attention.methods import make_method
from hipexp.config.schema import ConfigError


def logit(query, key, p, j, group, neighbours, rotary):
    """Near pairs at their true positions; far ones at floored ones, the query's moved up by what flooring took from the neighbours."""
    at = (p, j) if p - j < neighbours else (p // group + neighbours - neighbours // group, j // group)
    return np.dot(*(brute.turned(x, brute.phase(i, rotary)) for x, i in zip((query, key), at, strict=True)))


@settings(max_examples=15)
@given(
    made=tensors(longest=60), group=st.integers(1, 9), neighbours=st.integers(1, 70), part=st.integers(1, 60),
    softcap=st.sampled_from([None, 3.0]),
)  # fmt: skip
def test_far_keys_share_positions_in_groups(made, group, neighbours, part, softcap):
    q, k, v, rotary, prompt = made
    read = Layer(plan("self_extend", group_tok=group, neighbour_tok=neighbours), q, k, v, rotary)
    read.attention.softcap = softcap
    read.read_all(prompt, part)
    for h, t, _ in np.ndindex(*q.shape[:2], 1):
        g = h * len(k) // len(q)
        logits = np.array([logit(q[h, t], k[g, j], t, j, group, neighbours, rotary) for j in range(t + 1)]) * q.shape[-1] ** -0.5
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(read.out[h, t], weights @ v[g, : t + 1] / weights.sum(), atol=2e-5)


@pytest.mark.parametrize(("group", "neighbours"), [(4, 64), (5, 33), (16, 300), (300, 20)])
def test_blocks_of_queries_meet_far_keys_of_other_blocks(group, neighbours):
    """The same over several of the blocks that queries are read in, at some of them."""
    drawn, D = np.random.default_rng(0), 8
    q, k, v = (drawn.standard_normal((n, 700, D)) for n in (4, 2, 2))
    read = Layer(plan("self_extend", group_tok=group, neighbour_tok=neighbours), q, k, v, D).read_all(690, 300)
    for t in (0, 31, 32, 63, 64, 255, 256, 299, 300, 319, 320, 511, 600, 689, 690, 699):
        for h in (0, 3):
            logits = np.array([logit(q[h, t], k[h // 2, j], t, j, group, neighbours, D) for j in range(t + 1)]) * D**-0.5
            weights = np.exp(logits - logits.max())
            np.testing.assert_allclose(read.out[h, t], weights @ v[h // 2, : t + 1] / weights.sum(), atol=2e-5)


@pytest.mark.parametrize("name", ["group_tok", "neighbour_tok"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ConfigError, match=f"pipeline.params.{name}=0 must be at least 1"):
        make_method(plan("self_extend", **{name: 0}))
