"""Selection of the best chunks: brute force, ties, padding."""

import numpy as np
import pytest
import torch
from hipexp_kernels import keep_top
from hypothesis import given
from hypothesis import strategies as st

import brute

IMPLS = ("reference", "vectorized")


def best(scores, counts, keep, impl):
    """Which list indices are kept: chunks of one token that begin at their own index."""
    C = scores.shape[2]
    rest = dict(keep=keep, lists=len(scores), chunk_tok=1, next_tok=1, impl=impl)
    starts = torch.arange(C).expand(len(scores), scores.shape[1], C)
    return keep_top(scores, starts, counts, torch.full((scores.shape[1],), C), **rest)


@pytest.mark.parametrize("impl", IMPLS)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 40)),
    lists=st.sampled_from([(1, 1), (1, 3), (3, 3)]),  # of the starts, of the result; where there are three heads
    keep=st.integers(0, 45),
    cut=st.sampled_from([(1, 1), (8, 8), (8, 4), (8, 1)]),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    together=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_brute_force(impl, shape, lists, keep, cut, levels, together, seed):
    (K, N, C), (chunk, piece), rng = shape, cut, np.random.default_rng(seed)
    S, out = [min(n, K) if n > 1 else 1 for n in lists]
    if K == 2:
        S = out = 2
    scores = np.where(rng.random(shape) < 0.1, -np.inf, rng.integers(0, levels, shape)).astype(np.float32)
    counts = rng.integers(0, C + 1, (S, N))
    scores[np.broadcast_to(np.arange(C) >= counts[..., None], shape)] = np.nan  # nothing past the count may be read
    starts = chunk * np.sort(rng.permuted(np.tile(np.arange(2 * C), (S, N, 1)), axis=-1)[..., :C]) + 3
    if together and S == 1:
        starts = starts[:, :1]
    limits = rng.integers(0, 2 * chunk * C + 9, N)
    tensors = (torch.from_numpy(x) for x in (scores, starts, counts, limits))
    found, kept = keep_top(*tensors, keep=keep, lists=out, chunk_tok=chunk, next_tok=piece, impl=impl)
    assert found.shape == (out, N, min(keep, C) * (chunk // piece)) and found.dtype == torch.int64 and kept.shape == (out, N)
    for s, n in np.ndindex(out, N):
        own, row = min(s, S - 1), scores[:, n].max(0) if out == 1 else scores[s, n]
        chosen = [starts[own, n % starts.shape[1], c] for c in brute.keep_top(row[: counts[own, n]], keep)]
        pieces = [start + p for start in chosen for p in range(0, chunk, piece) if start + p < limits[n]]
        assert kept[s, n] == len(pieces)
        assert found[s, n].tolist() == pieces + [-1] * (found.shape[2] - len(pieces))  # ascending, unique, padded


@pytest.mark.parametrize("impl", IMPLS)
def test_large_rows(impl):
    torch.manual_seed(0)
    scores = torch.randn(2, 5, 1024).mul(20).round()  # many ties
    counts = torch.tensor([[1024, 1000, 257, 256, 3]]).expand(2, -1)
    index, kept = best(scores, counts, 256, impl)
    for s, n in np.ndindex(2, 5):
        count = int(counts[s, n])
        order = np.lexsort((np.arange(count), -scores[s, n, :count].numpy()))
        assert index[s, n, : kept[s, n]].tolist() == sorted(order[:256])


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_index(impl):
    scores = torch.tensor([[[1.0, 3, 1, 2, 1, 2]]])
    assert best(scores, torch.tensor([[6]]), 4, impl)[0].tolist() == [[[0, 1, 3, 5]]]
    assert best(scores, torch.tensor([[6]]), 2, impl)[0].tolist() == [[[1, 3]]]


@pytest.mark.parametrize("impl", IMPLS)
def test_absent_candidates_are_chosen_last(impl):
    scores = torch.full((1, 1, 5), float("-inf"))
    scores[..., 3] = 1
    assert best(scores, torch.tensor([[5]]), 2, impl)[0].tolist() == [[[0, 3]]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("at", [(0, 0, 0), (0, 1, 2), (1, 0, 3)])
def test_a_score_that_is_no_number_is_an_error_if_it_counts(impl, at):
    counts = torch.tensor([[1, 3], [4, 0]])
    scores = torch.arange(20.0).view(2, 2, 5).masked_fill(torch.arange(5) >= counts[..., None], float("nan"))
    assert best(scores, counts, 2, impl)[0].tolist() == [[[0, -1], [1, 2]], [[2, 3], [-1, -1]]]
    scores[at] = float("nan")
    with pytest.raises(FloatingPointError, match="a score is NaN"):
        best(scores, counts, 2, impl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(keep=-1), "keep=-1 must not be negative"),
        (dict(counts=torch.zeros(1, 3, dtype=torch.int64)), "do not go with counts"),
        (dict(limits=torch.zeros(1)), "do not go with counts"),
        (dict(scores=torch.zeros(2, 3)), "do not go with starts"),
        (dict(starts=torch.zeros(1, 2, 4, dtype=torch.int64)), "do not go with starts"),
        (dict(lists=3), "lists=3 must be 1 or 2"),
        (dict(next_tok=3), "next_tok=3 must divide chunk_tok=8"),
        (dict(next_tok=0), "next_tok=0 must divide"),
    ],
)
def test_refusals(change, message):
    call = dict(scores=torch.zeros(2, 2, 3), starts=torch.zeros(1, 1, 3, dtype=torch.int64), counts=torch.zeros(1, 2, dtype=torch.int64),
                limits=torch.zeros(2), keep=1, lists=1, chunk_tok=8, next_tok=4)  # fmt: skip
    keep_top(**call)
    with pytest.raises(ValueError, match=message):
        keep_top(**{**call, **change})
