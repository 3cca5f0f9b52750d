"""Merging partial attentions: brute force, empty parts, any order."""

import itertools

import numpy as np
import pytest
import torch
from hipexp_kernels import merge_lse
from hypothesis import given
from hypothesis import strategies as st

IMPLS = ("reference", "vectorized")


def attention(logits, values):
    """Output and log-sum-exp of one part ``[rows, n]``, ``[n, D]``; NaN and -inf if it is empty."""
    if logits.shape[1] == 0:
        return np.full((len(logits), values.shape[1]), np.nan), np.full(len(logits), -np.inf)
    top = logits.max(1, keepdims=True)
    weights = np.exp(logits - top)
    return weights @ values / weights.sum(1, keepdims=True), np.log(weights.sum(1)) + top[:, 0]


def merge(parts, impl):
    outs, lses = zip(*parts, strict=True)
    out, lse = merge_lse([torch.from_numpy(o).float() for o in outs], [torch.from_numpy(x).float() for x in lses], impl=impl)
    assert lse.dtype == torch.float32
    return out.numpy(), lse.numpy()


@st.composite
def parts(draw):
    """Attention over each of a few disjoint sets of keys, some empty, and over all of them."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(sum))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((3, sum(sizes))) * draw(st.sampled_from([1, 10, 60]))
    values = rng.standard_normal((sum(sizes), 4))
    edges = np.cumsum([0, *sizes])
    cut = [attention(logits[:, a:b], values[a:b]) for a, b in itertools.pairwise(edges)]
    return cut, attention(logits, values)


@pytest.mark.parametrize("impl", IMPLS)
@given(parts())
def test_brute_force_in_any_order(impl, case):
    cut, (out, lse) = case
    for order in (cut, cut[::-1]):
        merged, total = merge(order, impl)
        np.testing.assert_allclose(merged, out, atol=3e-5)
        np.testing.assert_allclose(total, lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@given(parts(), st.integers(0, 5))
def test_associative(impl, case, at):
    cut, _ = case
    at = min(at, len(cut))
    pieces = [merge(piece, impl) for piece in (cut[:at], cut[at:]) if piece]
    for merged, expected in zip(merge(pieces, impl), merge(cut, impl), strict=True):
        np.testing.assert_allclose(merged, expected, atol=3e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_at_all(impl):
    out, lse = merge_lse([torch.full((2, 3), float("nan"))] * 2, [torch.full((2,), float("-inf"))] * 2, impl=impl)
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("out", "lse", "sum"), [(1, np.nan, np.nan), (np.nan, 0, np.log(2)), (np.nan, -300, 0), (np.nan, np.inf, np.inf)])
def test_what_is_no_number_stays_visible(impl, order, out, lse, sum):
    """Only an lse of -inf is an empty part. +inf is what a logit that overflowed leaves, with NaN as output."""
    bad, good = (np.array([[out, 1.0], [2.0, 2.0]]), np.array([lse, 0.0])), (np.ones((2, 2)), np.zeros(2))
    nothing = (np.full((2, 2), np.nan), np.full(2, -np.inf))
    merged, total = merge([bad, nothing, good][::order], impl)
    assert np.isnan(merged[0, 0]) and total[0] == pytest.approx(sum, nan_ok=True)
    assert merged[1].tolist() == [1.5, 1.5] and total[1] == pytest.approx(np.log(2))


@pytest.mark.parametrize("impl", IMPLS)
def test_keeps_the_type_of_the_outputs(impl):
    out, lse = merge_lse(
        [torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)], [torch.zeros(2), torch.zeros(2)], impl=impl
    )
    assert out.dtype == torch.bfloat16 and (out == 0.5).all() and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one"),
        ([torch.zeros(2, 3)], [torch.zeros(2), torch.zeros(2)], "as many lses as outs"),
        ([torch.zeros(2, 3)], [torch.zeros(3)], "does not go with lse"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2), torch.zeros(2)], "does not go with lse"),
    ],
)
def test_refusals(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_lse(outs, lses)
