"""Chunks whose share of the attention is too small to keep, against the softmax in float64."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention import Memory
from hipexp.attention.methods.hip import worth_keeping
from hipexp.config.schema import Heads, Representative
from test_layer import D, layer, plan, random_qkv


@st.composite
def candidates(draw):
    """Scores ``[K, N, C]``, starts, counts and the number of lists; some chunks hold nothing and have -inf."""
    K, N, C = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    lists = draw(st.sampled_from([1, K]))
    S, shared = draw(st.sampled_from([1, lists])), draw(st.booleans())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = 8 * torch.randn(K, N, C, generator=g)
    starts = torch.rand(S, 1 if shared else N, C, generator=g).argsort(-1).sort(-1).values * 8
    if S == 1 and shared:
        starts = starts[:, :1]
    counts = torch.randint(0, C + 1, (S, N), generator=g)
    if draw(st.booleans()):
        scores[:, :, -1] = -torch.inf
    return scores, starts, counts, lists


@given(given=candidates(), least=st.sampled_from([0.001, 0.05, 0.3, 0.9]))
@settings(max_examples=60)
def test_those_stay_whose_softmax_reaches_the_least_share_of_one_head(given, least):
    scores, starts, counts, lists = given
    best, kept_starts, kept = worth_keeping(scores, starts, counts, lists, least, 0.5)
    K, N, _ = scores.shape
    for s in range(lists):
        heads = range(K) if lists == 1 else [s]
        for n in range(N):
            row, expected = int(counts[min(s, len(counts) - 1), n]), []
            for c in range(row):
                shares = [torch.softmax(0.5 * scores[h, n, :row].double(), 0)[c] for h in heads]
                if any(abs(float(share) - least) < 1e-7 for share in shares):
                    return
                if any(not share < least for share in shares):
                    start = starts[min(s, len(starts) - 1), min(n, starts.shape[1] - 1), c]
                    expected.append((int(start), max(float(scores[h, n, c]) for h in heads)))
            found = list(zip(kept_starts[s, n].tolist(), best[s, n].tolist(), strict=True))[: int(kept[s, n])]
            assert found == expected


def test_a_score_that_is_not_a_number_stays_to_be_refused():
    scores = torch.tensor([[[1.0, float("nan"), 2.0]]])
    best, _, kept = worth_keeping(scores, torch.arange(3)[None, None], torch.tensor([[3]]), 1, 0.9, 1.0)
    assert bool(best[0, 0, : int(kept)].isnan().any())


def with_share(p, share):
    def last(stages):
        return [*stages[:-1], dataclasses.replace(stages[-1], least_share=share, representative=Representative.exact)]

    return dataclasses.replace(p, stages=last(p.stages), decode=last(p.decode))


@pytest.mark.parametrize("heads", list(Heads))
@pytest.mark.parametrize("decoding", [False, True])
def test_a_layer_attends_to_the_chunks_that_a_cap_alone_keeps_less_the_small_ones(heads, decoding):
    """Lists stay ascending; one of a single key/value head is cut, not changed."""
    q, k, v = random_qkv(340, seed=3)
    q = 6 * q
    found = {}
    for share in (0.0, 0.02, 0.2):
        chosen = []

        class Heard:
            def scores(self, number, scoring):
                pass

            def attends(self, queries, n_exact, selection, chosen=chosen):
                chosen.append(selection)

        attention = layer(with_share(plan(heads=heads), share), listener=Heard())
        if decoding:
            attention(q[:, 339:], k, v, 339, Memory(), state=attention.method.new_state())
        else:
            attention(q, k, v, 0)
        found[share] = chosen[-1]
    lists = [_lists(selection) for selection in found.values()]
    for kept in (kept for some in lists for kept in some):
        assert kept == sorted(set(kept)) and all(start >= 8 for start in kept)
    n_kept = [sum(map(len, some)) for some in lists]
    assert n_kept[0] > n_kept[1] > n_kept[2]
    if heads is Heads.per_kv:  # in a shared list there is room for what another head likes
        for more, fewer in pairwise(lists):
            assert all(set(a) >= set(b) for a, b in zip(more, fewer, strict=True))


def _lists(selection):
    """The starts of every list."""
    S, N = selection.counts.shape
    return [selection.blocks[s, n, : int(selection.counts[s, n])].tolist() for s in range(S) for n in range(N)]


def test_a_sharp_query_attends_to_its_needle_alone():
    T, spot = 340, 120
    q, k, v = (0.1 * x for x in random_qkv(T))
    direction = torch.zeros(D)
    direction[D // 2 - 1] = direction[D - 1] = 4.0
    k[:, spot - spot % 4] = 4 * direction
    q[:, -1] = direction
    p = with_share(plan(), 0.01)
    p.decode[:] = [dataclasses.replace(stage, representative=Representative.exact) for stage in p.decode]
    memory = Memory()
    layer(p)(q[:, -1:], k, v, T - 1, memory)
    starts, counts = memory.lists[3]
    assert counts.tolist() == [[1]] and int(starts[0, 0, 0]) == spot and bool((starts[0, 0, 1:] == -1).all())
