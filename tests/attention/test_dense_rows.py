"""Queries that attend to all keys against a plain statement in double precision, one query at a time."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory, dense_rows
from hipexp.attention.dense_rows import attend_to_all
from hipexp.attention.methods import make_method
from hipexp.cache.offloaded import OffloadedStore
from hipexp.cache.placement import Placement
from hipexp.config.schema import ConfigError, Pipeline, Stage

T, D, TRAINED = 448, 16, 256


def cos_sin(positions):
    angle = positions[:, None] * 100.0 ** (-torch.arange(0, D, 2) / D)
    return 1.2 * angle.cos(), 1.2 * angle.sin()  # with an attention factor


def product(q, k, distance):
    """A query with keys ``[n, D]`` that lie so far before it ``[n]``; the attention factor counts for both."""
    angle = distance[:, None] * 100.0 ** (-np.arange(0, D, 2) / D)
    (a, b), (x, y) = np.split(q, 2), np.split(k, 2, axis=1)
    return 1.2**2 * ((a * x + b * y) * np.cos(angle) + (a * y - b * x) * np.sin(angle)).sum(1)


def one(q, k, v, p, trained, far_tok, scale, softcap, rope=True):
    """Output of the query at ``p`` of one head, over keys and values of its key/value head."""
    distance = p - np.arange(p + 1)
    distance = np.minimum(distance, far_tok) if p >= trained else distance
    logits = scale * (product(q[p], k[: p + 1], distance) if rope else k[: p + 1] @ q[p])
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    weight = np.exp(logits - logits.max())
    return weight @ v[: p + 1] / weight.sum()


def inputs(seed=0, K=2, G=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, T, D, generator=generator) for n in (K * G, K, K))


def expected(q, k, v, at, trained, far_tok, softcap=None, rope=True):
    q, k, v = (x.double().numpy() for x in (q, k, v))
    G = len(q) // len(k)
    return np.stack([[one(q[h], k[h // G], v[h // G], p, trained, far_tok, 0.3, softcap, rope) for p in at] for h in range(len(q))])


@given(
    start=st.integers(0, T - 1), step=st.sampled_from([1, 7, 64]), n=st.integers(1, 12), trained=st.sampled_from([16, 200, 4096]),
    far_tok=st.sampled_from([1, 8, 100]), softcap=st.sampled_from([None, 3.0]), rope=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_all_keys_at_positions_that_the_model_knows(start, step, n, trained, far_tok, softcap, rope, seed):
    q, k, v = inputs(seed)
    at = range(start, min(T, start + n * step), step)
    tables = ExactTables(cos_sin, trained) if rope else None
    out = attend_to_all(q[:, at.start : at.stop : step], at, k, v, tables, 0.3, softcap, far_tok)
    np.testing.assert_allclose(out, expected(q, k, v, at, trained, far_tok, softcap, rope), atol=2e-5)


def test_cut_into_pieces_it_is_the_same(monkeypatch):
    q, k, v = inputs()
    at, tables = range(100, T), ExactTables(cos_sin, TRAINED)
    whole = attend_to_all(q[:, 100:], at, k, v, tables, 0.3, None, 64)
    monkeypatch.setattr(dense_rows, "KEYS", 50)
    monkeypatch.setattr(dense_rows, "QUERIES", 9)
    torch.testing.assert_close(attend_to_all(q[:, 100:], at, k, v, tables, 0.3, None, 64), whole, atol=2e-5, rtol=0)


def test_keys_may_lie_elsewhere():
    q, k, v = inputs()
    placement = Placement(
        unit_tok=8, per_head=False, sink_tok=8, window_tok=64, page_tok=64, device_tok=256, host_tok=None, format="auto", policy="clock"
    )
    store = OffloadedStore(placement)
    store.reserve(T, k)
    store.append(k, v)
    store.settle()
    at, tables = range(T - 20, T), ExactTables(cos_sin, TRAINED)
    assert torch.equal(
        attend_to_all(q[:, T - 20 :], at, *store.view(), tables, 0.3, None, 64),
        attend_to_all(q[:, T - 20 :], at, k, v, tables, 0.3, None, 64),
    )
    store.close()


SMALL = Pipeline(stages=[Stage(32, 96, 64, 4), Stage(8, 32, 64)], sink_tok=8, window_tok=64)


class Sequence:
    def __init__(self, pipeline, seed=0):
        self.attention = LayerAttention(pipeline.plan_layer(0, []), ExactTables(cos_sin, TRAINED), 0.3)
        self.state, (self.q, self.k, self.v) = self.attention.method.new_state(), inputs(seed)

    def read(self, begin, end, prompt_tok=None):
        parts = self.q[:, begin:end], self.k[:, :end], self.v[:, :end]
        return self.attention(*parts, begin, state=self.state, prompt_tok=prompt_tok)

    def step(self, t):
        return self.attention(self.q[:, t : t + 1], self.k[:, : t + 1], self.v[:, : t + 1], t, Memory(), state=self.state)


@pytest.mark.parametrize("last", [1, 70, 200])
@pytest.mark.parametrize("parts", [[0, 440], [0, 128, 440], [0, 384, 440], [0, 64, 128, 192, 256, 320, 384, 440]])
def test_the_last_queries_of_a_prompt_see_all(last, parts):
    """However it is cut, if its end is told; other queries and decode steps are as without."""
    plain, dense = Sequence(SMALL), Sequence(replace(SMALL, dense_last_tok=last))
    out = torch.cat([dense.read(begin, end, 440) for begin, end in pairwise(parts)], 1)
    torch.testing.assert_close(out[:, : 440 - last], plain.read(0, 440)[:, : 440 - last], atol=2e-5, rtol=0)
    np.testing.assert_allclose(out[:, 440 - last :], expected(dense.q, dense.k, dense.v, range(440 - last, 440), TRAINED, 64), atol=2e-5)
    assert torch.equal(dense.step(440), plain.step(440))


def test_what_is_read_behind_the_prompt_is_not_its_end():
    plain, dense = Sequence(SMALL), Sequence(replace(SMALL, dense_last_tok=64))
    for one in (plain, dense):
        one.read(0, 320, 320)
    assert torch.equal(dense.read(320, 440, 320), plain.read(320, 440))


@pytest.mark.parametrize("every", [1, 16, 64])
@pytest.mark.parametrize("parts", [[0, 440], [0, 128, 440], [0, 64, 320, 440]])
def test_the_first_of_a_group_corrects_it(every, parts):
    plain, corrected = Sequence(SMALL), Sequence(replace(SMALL, delta_every_tok=every))
    out = torch.cat([corrected.read(begin, end) for begin, end in pairwise(parts)], 1).numpy()
    sparse, pruned = plain.read(0, 440).numpy(), 64  # the first block sees all: 8 sinks, 32 selected, a window of 64
    dense = expected(plain.q, plain.k, plain.v, range(440), TRAINED, 64)
    np.testing.assert_allclose(out[:, :pruned], sparse[:, :pruned], atol=2e-5)
    for p in range(pruned, 440):
        first = p // every * every
        np.testing.assert_allclose(out[:, p], sparse[:, p] + dense[:, first] - sparse[:, first], atol=5e-5)


def test_groups_that_are_no_part_of_a_block_are_refused():
    with pytest.raises(ConfigError, match=r"pipeline\.delta_every_tok=48 must divide 64, .* try 16"):
        make_method(replace(SMALL, delta_every_tok=48).plan_layer(0, []))


@pytest.mark.parametrize("option", ["dense_last_tok", "delta_every_tok"])
def test_a_method_that_selects_nothing_is_refused(option):
    with pytest.raises(ConfigError, match=f"pipeline.{option}=64 is for methods that select keys, and pipeline.method=ntk"):
        make_method(Pipeline(method="ntk", **{option: 64}).plan_layer(0, []))
