"""The Triton selection against the reference and the definition: ties, NaN, padding, shared lists, pieces, capacity."""

import numpy as np
import pytest
import torch
from hipexp_kernels.keep_top import keep_top
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_device import DEVICE, needs_triton, on_device

pytestmark = needs_triton

INF, NAN = float("inf"), float("nan")


def both(scores, starts, counts, limits, **sizes):
    """Triton's answer, after comparing it with the reference's."""
    scores, starts, counts, limits = (torch.as_tensor(x) for x in (scores, starts, counts, limits))
    expected = keep_top(scores, starts, counts, limits, **sizes, impl="reference")
    out, kept = keep_top(*on_device_all(scores, starts, counts, limits), **sizes, impl="triton")
    assert out.dtype == starts.dtype and kept.dtype == counts.dtype
    assert out.tolist() == expected[0].tolist() and kept.tolist() == expected[1].tolist()
    return out.tolist(), kept.tolist()


def on_device_all(*tensors):
    return [on_device(x) for x in tensors]


def one_list(row, keep, count=None, chunk_tok=1, next_tok=1, limit=10**6):
    """Starts kept of one list whose chunks lie side by side."""
    scores = torch.tensor([[row]], dtype=torch.float32)
    starts = chunk_tok * torch.arange(len(row))[None, None]
    counts = torch.tensor([[len(row) if count is None else count]])
    sizes = dict(keep=keep, lists=1, chunk_tok=chunk_tok, next_tok=next_tok)
    out, kept = both(scores, starts, counts, torch.tensor([limit]), **sizes)
    assert out[0][0][kept[0][0] :] == [-1] * (len(out[0][0]) - kept[0][0])
    return out[0][0][: kept[0][0]]


@settings(max_examples=16)
@given(
    heads=st.integers(1, 4),
    N=st.integers(1, 3),
    C=st.integers(0, 70),
    keep=st.integers(0, 80),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    own=st.booleans(),
    shared_starts=st.booleans(),
    cut=st.sampled_from([(1, 1), (8, 8), (8, 2), (32, 8)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_reference(heads, N, C, keep, levels, own, shared_starts, cut, seed):
    rng = np.random.default_rng(seed)
    scores = np.where(rng.random((heads, N, C)) < 0.1, -np.inf, rng.integers(-levels, levels, (heads, N, C))).astype(np.float32)
    S = heads if own and rng.random() < 0.5 else 1
    starts = cut[0] * np.arange(C)[None, None] if shared_starts and S == 1 else np.sort(rng.integers(0, 9 * C + 1, (S, N, C)), -1)
    counts = rng.integers(0, C + 1, (S, N))
    scores[:, np.arange(C) >= counts.max(0)[:, None]] = np.nan  # nothing past the counts may be read
    starts = np.where(np.arange(C) < counts[..., None], starts, -1) if not (shared_starts and S == 1) else starts
    limits = rng.integers(1, 9 * C + 40, N)
    both(scores, starts, counts, limits, keep=keep, lists=heads if own else 1, chunk_tok=cut[0], next_tok=cut[1])


@pytest.mark.device
def test_ties_go_to_the_lowest_index():
    assert one_list([1, 3, 1, 2, 1, 2], 4) == [0, 1, 3, 5]
    assert one_list([1, 3, 1, 2, 1, 2], 2) == [1, 3]
    assert one_list([0.0, -0.0, 0.0, -1.0], 2) == [0, 1]
    assert one_list([-0.0, 0.0, 0.0, -1.0], 2) == [0, 1]


@pytest.mark.parametrize("few", [0, 32])
def test_ties_over_the_parts(monkeypatch, few):
    from hipexp_kernels.keep_top import triton as kernels

    monkeypatch.setattr(kernels, "FEW", few)
    for levels in ([7.0], [7.0, -INF], [1.0, 2.0, -3.0]):
        row = np.random.default_rng(2).choice(levels, 256).tolist()
        for keep in (1, 63, 64, 65, 255, 256):
            one_list(row, keep, chunk_tok=4, next_tok=2, limit=701)


def test_more_room_than_chunks_and_no_room():
    assert one_list([3, 1, 2], 7) == [0, 1, 2]
    assert one_list([3, 1, 2], 3, count=2) == [0, 1]
    assert one_list([3, 1, 2], 0) == []
    assert one_list([3, 1, 2], 2, count=0) == []


def test_minus_infinity_is_the_worst():
    assert one_list([-INF, -INF, -INF, 1, -INF], 2) == [0, 3]
    assert one_list([-1e38, -INF, 1e-40, 0.0, -1e-40, INF], 3) == [2, 3, 5]


def test_pieces_at_or_past_the_limit_are_left_out():
    assert one_list([5, 1, 6], 2, chunk_tok=8, next_tok=4) == [0, 4, 16, 20]
    assert one_list([5, 1, 6], 2, chunk_tok=8, next_tok=4, limit=21) == [0, 4, 16, 20]
    assert one_list([5, 1, 6], 2, chunk_tok=8, next_tok=4, limit=20) == [0, 4, 16]
    assert one_list([5, 1, 6], 2, chunk_tok=8, next_tok=4, limit=16) == [0, 4]


def test_a_score_that_is_no_number_counts_as_the_best():
    scores = torch.tensor([[[5.0, 1, NAN, 7]], [[5.0, -NAN, 2, INF]]], device=DEVICE)
    rest = on_device_all(torch.arange(4)[None, None], torch.tensor([[4]]), torch.tensor([9]))
    sizes = dict(chunk_tok=1, next_tok=1, impl="triton")
    assert keep_top(scores, *rest, keep=2, lists=1, **sizes)[0].tolist() == [[[1, 2]]]
    assert keep_top(scores, *rest, keep=1, lists=2, **sizes)[0].tolist() == [[[2]], [[1]]]


def test_narrow_integers():
    scores, starts = torch.tensor([[[1.0, 3, 2]]]), torch.tensor([[[0, 8, 16]]], dtype=torch.int32)
    both(scores, starts, torch.tensor([[3]], dtype=torch.int32), torch.tensor([20]), keep=2, lists=1, chunk_tok=8, next_tok=4)


def test_lists_longer_than_the_registers_hold(monkeypatch):
    from hipexp_kernels.keep_top import triton as kernels

    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.standard_normal((2, 2, 300)).astype(np.float32)).mul(4).round()
    starts, counts, limits = 8 * torch.arange(300)[None, None], torch.tensor([[300, 131]]), torch.tensor([2400, 1000])
    for tile in (64, 128):
        monkeypatch.setattr(kernels, "IN_REGISTERS", tile)
        for keep in (1, 40, 200):
            both(scores, starts, counts, limits, keep=keep, lists=1, chunk_tok=8, next_tok=4)
            both(scores, starts, counts, limits, keep=keep, lists=2, chunk_tok=8, next_tok=8)


@pytest.mark.device
@pytest.mark.parametrize("few", [0, 32])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e30])
def test_large_rows(monkeypatch, spread, few):
    """A capacity larger than the counts; scores that differ in the last bits only, and by many orders of magnitude.

    One program writes all of a list, or several a part each.
    """
    from hipexp_kernels.keep_top import triton as kernels

    monkeypatch.setattr(kernels, "FEW", few)
    rng = np.random.default_rng(1)
    scores = torch.from_numpy((1 + spread * rng.standard_normal((1, 3, 1000))).astype(np.float32))
    both(scores, torch.arange(0, 32000, 32)[None, None], torch.tensor([[900, 257, 3]]), torch.tensor([32000, 32000, 100]),
         keep=128, lists=1, chunk_tok=32, next_tok=8)  # fmt: skip
