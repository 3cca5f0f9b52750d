"""Attention by Triton kernels over an offloaded store, fetched by one, beside a resident one: the same bits, whatever the cache holds."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_device
from hipexp.attention import LayerAttention, Memory
from hipexp.cache.offloaded import OffloadedStore
from hipexp.cache.placement import Placement
from hipexp.cache.resident import ResidentStore
from hipexp.cache.summaries import KeySummaries
from hipexp.config.offload import POLICIES
from hipexp.config.schema import PAGE_TOK, AttendRope, Heads, PruneRope, Representative
from test_offloaded import D, K, attend, inputs, placement, plan_of, tables

OPS = ("attend_blocks", "gather_kv", "keep_top", "score_chunks", "summarize")
BOUNDS, GRID, EXACT = Representative.bounds, Representative.grid, Representative.exact


@pytest.fixture
def by_triton(monkeypatch):
    for op in OPS:
        monkeypatch.setattr(importlib.import_module(f"hipexp_kernels.{op}"), "choose", lambda _, known, device=None: known["triton"])


CASES = [
    ((BOUNDS, BOUNDS, EXACT), Heads.shared, PruneRope.relative, AttendRope.streaming, "clock", 0),
    ((BOUNDS, GRID, EXACT), Heads.per_kv, PruneRope.relative, AttendRope.infllm, "lfu", 0),
    ((EXACT, EXACT, GRID), Heads.shared, PruneRope.chunk_indexed, AttendRope.dynamic, "lru", 0),
    ((GRID, BOUNDS, BOUNDS), Heads.shared, PruneRope.infllm, AttendRope.native, "clock", 4096),
]
interpreted = pytest.mark.skipif(not triton_device.HAS_TRITON or triton_device.ON_GPU, reason="in Triton's interpreter")


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("representatives", "heads", "prune", "attend_rope", "policy", "more_tok"), CASES)
def test_attention_is_that_of_a_resident_store(by_triton, representatives, heads, prune, attend_rope, policy, more_tok):
    plan = plan_of(representatives, heads, prune, attend_rope)
    qkv = inputs(652, seed=more_tok)
    store = OffloadedStore(placement(plan, more_tok, policy=policy))
    offloaded = attend(plan, store, qkv, 648, 192)
    assert torch.equal(offloaded, attend(plan, ResidentStore(), qkv, 648, 192))
    assert sum(traffic.misses for (_, by), traffic in store.traffic.counts.items() if by == "attend") > 0


@interpreted
@pytest.mark.parametrize(
    ("representatives", "heads", "prune", "attend_rope", "policy", "more_tok"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_a_step_is_that_of_a_resident_store(by_triton, representatives, heads, prune, attend_rope, policy, more_tok):
    """A step that selects anew, and one that does not."""
    plan, (q, k, v), outs = plan_of(representatives, heads, prune, attend_rope), inputs(602), []
    for store in (ResidentStore(), OffloadedStore(placement(plan, more_tok, policy=policy))):
        attention, memory, summaries = LayerAttention(plan, tables(), D**-0.5), Memory(), KeySummaries()
        store.append(k[:, :600], v[:, :600])
        store.settle()
        for t in (600, 601):
            store.append(k[:, t : t + 1], v[:, t : t + 1])
            outs.append(attention(q[:, t : t + 1], *store.view(), t, memory, state=summaries))
    assert torch.equal(torch.cat(outs[:2]), torch.cat(outs[2:]))


def rows_at(places, token, head):
    """The row of a token, as a kernel finds it."""
    if token >= places.begin:
        return places.newest[head, token - places.begin]
    unit_tok, lists = places.slots.shape[2], places.lists
    number = (token // unit_tok * lists + (head if lists > 1 else 0)) * 2 + places.which
    slot = number + places.sinks if number < places.n_sinks else int(places.table[number - places.n_sinks])
    assert slot >= 0
    return places.slots[slot, 0 if lists > 1 else head, token % unit_tok]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), per_head=st.booleans(), policy=st.sampled_from(POLICIES), room_tok=st.sampled_from([8, 48, 160]))
def test_what_is_brought_is_where_it_is_said_to_be(data, per_head, policy, room_tok):
    """Keys and values at once, one run after the other; what does not fit is refused, and brought past the cache if it must."""
    store, (_, k, v) = OffloadedStore(Placement(8, per_head, 16, 64, PAGE_TOK, 16 + 64 + PAGE_TOK + room_tok, policy=policy)), inputs(400)
    store.append(k, v)
    store.settle()
    keys, values = store.view()
    for _ in range(4):
        of = data.draw(st.sampled_from([1, K]))
        begin = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 399), min_size=3, max_size=3), min_size=of, max_size=of)))
        end = begin + torch.tensor(data.draw(st.lists(st.integers(-2, 20), min_size=3, max_size=3)))
        past = data.draw(st.booleans())
        before = sum(traffic.misses for traffic in store.traffic.counts.values())
        found = keys.bring(begin, end, values, past=past)
        asked = {
            (token // 8, head if per_head else 0)
            for head in range(K)
            for first, last in zip(begin[head % of].tolist(), end[head % of].tolist(), strict=True)
            for token in range(max(16, first), min(last, store._begin))
        }
        fits = 2 * len(asked) <= room_tok // 8 * (K if per_head else 1) * 2
        if found is None:
            assert not fits and not past
            assert sum(traffic.misses for traffic in store.traffic.counts.values()) == before
            continue
        assert fits or past
        for places, whole in zip(found, (k, v), strict=True):
            for head in range(K):
                for first, last in zip(begin[head % of].tolist(), end[head % of].tolist(), strict=True):
                    for token in range(first, min(last, 400)):
                        assert torch.equal(rows_at(places, token, head), whole[head, token])
    token = torch.arange(100, 140)[None]
    assert torch.equal(keys.gather(token, slice(None), torch.empty(K, 40, D)), k[:, 100:140])


def test_keys_and_values_of_two_stores_are_not_brought_together():
    views = []
    for _ in range(2):
        store = OffloadedStore(Placement(8, False, 16, 64, PAGE_TOK, 16 + 64 + PAGE_TOK + 64))
        store.append(*inputs(400)[1:])
        store.settle()
        views.append(store.view())
    with pytest.raises(ValueError, match="must be of one store"):
        views[0][0].bring(torch.tensor([[100]]), torch.tensor([[120]]), views[1][1])
