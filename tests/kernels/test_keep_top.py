"""Selection of the best chunks: brute force, ties, padding."""

import numpy as np
import pytest
import torch
from hipexp_kernels import keep_top
from hypothesis import given
from hypothesis import strategies as st

import brute

IMPLS = ("reference", "vectorized")


@pytest.mark.parametrize("impl", IMPLS)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 40)),
    keep=st.integers(0, 45),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_brute_force(impl, shape, keep, levels, seed):
    rng = np.random.default_rng(seed)
    scores = np.where(rng.random(shape) < 0.1, -np.inf, rng.integers(0, levels, shape)).astype(np.float32)
    counts = rng.integers(0, shape[2] + 1, shape[:2])
    scores[np.arange(shape[2]) >= counts[..., None]] = np.nan  # nothing past the count may be read
    index, kept = keep_top(torch.from_numpy(scores), torch.from_numpy(counts), keep, impl=impl)
    assert index.shape == (*shape[:2], min(keep, shape[2])) and index.dtype == torch.int64 and kept.shape == shape[:2]
    for s, n in np.ndindex(shape[:2]):
        best = brute.keep_top(scores[s, n, : counts[s, n]], keep)
        assert kept[s, n] == len(best) == min(keep, counts[s, n])
        assert index[s, n].tolist() == best + [-1] * (index.shape[2] - len(best))  # ascending, unique, padded


@pytest.mark.parametrize("impl", IMPLS)
def test_large_rows(impl):
    torch.manual_seed(0)
    scores = torch.randn(2, 5, 1024).mul(20).round()  # many ties
    counts = torch.tensor([[1024, 1000, 257, 256, 3]]).expand(2, -1)
    index, kept = keep_top(scores, counts, 256, impl=impl)
    for s, n in np.ndindex(2, 5):
        count = int(counts[s, n])
        order = np.lexsort((np.arange(count), -scores[s, n, :count].numpy()))
        assert index[s, n, : kept[s, n]].tolist() == sorted(order[:256])


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_index(impl):
    scores = torch.tensor([[[1.0, 3, 1, 2, 1, 2]]])
    assert keep_top(scores, torch.tensor([[6]]), 4, impl=impl)[0].tolist() == [[[0, 1, 3, 5]]]
    assert keep_top(scores, torch.tensor([[6]]), 2, impl=impl)[0].tolist() == [[[1, 3]]]


@pytest.mark.parametrize("impl", IMPLS)
def test_absent_candidates_are_chosen_last(impl):
    scores = torch.full((1, 1, 5), float("-inf"))
    scores[..., 3] = 1
    assert keep_top(scores, torch.tensor([[5]]), 2, impl=impl)[0].tolist() == [[[0, 3]]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("at", [(0, 0, 0), (0, 1, 2), (1, 0, 3)])
def test_a_score_that_is_no_number_is_an_error_if_it_counts(impl, at):
    counts = torch.tensor([[1, 3], [4, 0]])
    scores = torch.arange(20.0).view(2, 2, 5).masked_fill(torch.arange(5) >= counts[..., None], float("nan"))
    assert keep_top(scores, counts, 2, impl=impl)[0].tolist() == [[[0, -1], [1, 2]], [[2, 3], [-1, -1]]]
    scores[at] = float("nan")
    with pytest.raises(FloatingPointError, match="a score is NaN"):
        keep_top(scores, counts, 2, impl=impl)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), -1), "keep=-1 must not be negative"),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64), 1), "do not go with counts"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 1), "do not go with counts"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        keep_top(*arguments)
