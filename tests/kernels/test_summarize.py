"""Key summaries: brute force, ties, what they inherit from keys, what is refused; Triton against the reference."""

import numpy as np
import pytest
import torch
from hipexp_kernels import coarsen, summarize
from hipexp_kernels.rope import rotate
from hypothesis import given
from hypothesis import strategies as st

import brute
from triton_device import DEVICE, DTYPES, needs_triton

IMPLS = ("reference", "vectorized", pytest.param("triton", marks=needs_triton))


def run(k, piece_tok, impl):
    return summarize(k.to(DEVICE), piece_tok=piece_tok, impl=impl).cpu()


@pytest.mark.parametrize("impl", IMPLS[:2])
@given(
    K=st.integers(1, 3), T=st.integers(0, 70), D=st.sampled_from([1, 3, 16]), piece=st.sampled_from([1, 2, 8, 32]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_brute_force(impl, K, T, D, piece, seed):
    k = np.random.default_rng(seed).integers(-8, 9, (K, T, D)).astype(float)  # whole, so that ties are ties
    expected = [[brute.landmarks(k[h, t : t + piece]) for t in range(0, T - piece + 1, piece)] for h in range(K)]
    found = run(torch.from_numpy(k).float(), piece, impl)
    np.testing.assert_allclose(found, np.array(expected).reshape(K, T // piece, 2, D), atol=1e-5)


@pytest.mark.device
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 64, 80, 128, 256])
def test_triton(D, dtype):
    for piece, T in ((64, 200), (8, 63), (1, 5), (64, 10)):
        k = torch.randn(2, T, D, generator=torch.Generator().manual_seed(D + piece)).to(dtype)
        buffer = torch.full((2, T + 30, D), torch.nan, dtype=dtype)
        buffer[:, :T] = k
        precision = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(run(buffer[:, :T], piece, "triton"), run(k, piece, "reference"), atol=precision, rtol=precision)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_first_key(impl):
    k = torch.tensor([[[1.0, 0], [-1, 0], [0, 1], [0, -1]]])  # all equally far from their mean
    mean, outlier = run(k, 4, impl)[0, 0]
    assert mean.tolist() == [0, 0] and outlier.tolist() == pytest.approx([0.4, 0])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_all_keys_have_in_common_and_one_angle_for_all(impl):
    k, common = torch.randn(2, 64, 16), 30 * torch.randn(16)
    cos, sin = torch.tensor([0.6, 0.8]).repeat(4), torch.tensor([0.8, -0.6]).repeat(4)
    plain = run(k, 16, impl)
    torch.testing.assert_close(run(k + common, 16, impl), plain + common, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(rotate(k, cos, sin), 16, impl), rotate(plain, cos, sin), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_that_are_nan_surface(impl):
    k = torch.randn(1, 32, 8)
    k[0, 9, 3] = torch.nan
    assert run(k, 8, impl).isnan().any(-1).tolist() == [[[False, False], [True, True], [False, False], [False, False]]]


@given(
    K=st.integers(1, 3), T=st.integers(0, 150), D=st.sampled_from([1, 3, 16]), piece=st.sampled_from([4, 8]), times=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_coarser_ones_by_brute_force(K, T, D, piece, times, seed):
    k = np.random.default_rng(seed).standard_normal((K, T, D))
    fine = [[brute.landmarks(k[h, t : t + piece]) for t in range(0, T - piece + 1, piece)] for h in range(K)]
    expected = [[brute.coarse_landmarks(row[p : p + times]) for p in range(0, len(row) - times + 1, times)] for row in fine]
    found = coarsen(torch.from_numpy(np.array(fine).reshape(K, T // piece, 2, D)), times=times)
    np.testing.assert_allclose(found, np.array(expected).reshape(K, T // piece // times, 2, D), atol=1e-4)


def test_a_single_key_leaves_a_trace_in_coarser_ones():
    k = torch.zeros(1, 256, 4)
    k[0, 77, 2] = 8.0
    mean, outlier = coarsen(run(k, 32, "reference"), times=8)[0, 0]
    assert mean[2] == pytest.approx(8 / 256) and outlier[2] == pytest.approx(8 / 256 + 0.25 * (8 - 8 / 256))


def test_coarser_ones_in_parts_are_those_at_once(monkeypatch):
    rows = torch.randn(2, 40, 2, 8)
    once = coarsen(rows, times=4)
    monkeypatch.setitem(coarsen.__globals__, "FLOATS", 300)
    assert torch.equal(coarsen(rows, times=4), once)


def test_refusals():
    with pytest.raises(ValueError, match="times=0 must be at least 1"):
        coarsen(torch.zeros(1, 8, 2, 4), times=0)
    with pytest.raises(ValueError, match=r"rows \(1, 8, 4\) must be"):
        coarsen(torch.zeros(1, 8, 4), times=2)
    with pytest.raises(ValueError, match="piece_tok=6 must be a power of two"):
        summarize(torch.zeros(1, 8, 4), piece_tok=6)
    with pytest.raises(ValueError, match=r"k \(8, 4\) must be"):
        summarize(torch.zeros(8, 4), piece_tok=2)
