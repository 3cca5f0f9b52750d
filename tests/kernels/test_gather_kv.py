"""Blocks out of pages: brute force, every implementation, pages that do not lie together, what is refused."""

import pytest
import torch
from hipexp_kernels import gather_kv
from hypothesis import given
from hypothesis import strategies as st

from triton_device import DEVICE, needs_gpu, needs_triton

IMPLS = ("reference", "vectorized", pytest.param("triton", marks=needs_triton))


def paged(x, page_tok, order, apart=1):
    """Pages of ``x`` ``[K, T, D]`` in the given order, NaN where nothing stands; every ``apart``-th page of what holds them."""
    K, T, D = x.shape
    held = torch.full((len(order) * apart, K, page_tok, D), torch.nan, dtype=x.dtype)
    for i in range(-(-T // page_tok)):
        part = x[:, i * page_tok : (i + 1) * page_tok]
        held[order[i] * apart, :, : part.shape[1]] = part
    return held.to(DEVICE)[::apart]


def brute(x, starts, counts, block_tok):
    """From ``x`` in one piece."""
    found = torch.zeros(x.shape[0], len(starts[0]), block_tok, x.shape[2], dtype=x.dtype)
    for head in range(len(x)):
        s = head % len(starts)
        for m, start in enumerate(starts[s][: counts[s]]):
            found[head, m] = x[head, start : start + block_tok]
    return found.flatten(1, 2)


def run(x, page_tok, starts, counts, block_tok, impl, order=None, apart=1, **more):
    order = range(-(-x[0].shape[1] // page_tok)) if order is None else order
    pages = [paged(part, page_tok, order, apart) for part in x]
    lists = torch.tensor(starts).view(len(starts), -1)
    past = torch.arange(lists.shape[1]) >= torch.tensor(counts)[:, None]
    lists = lists.masked_fill(past, -1).long().to(DEVICE)
    table, counts = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (list(order), counts))
    return gather_kv(*pages, table, lists, counts, block_tok=block_tok, impl=impl, **more)


@st.composite
def cases(draw):
    K, block = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 8]))
    page_tok, n_blocks = block * draw(st.sampled_from([1, 4])), draw(st.integers(1, 12))
    shape = K, n_blocks * block, draw(st.sampled_from([1, 3, 16]))
    lists, M = draw(st.sampled_from([1, K])), draw(st.integers(0, 5))
    starts = [[block * draw(st.integers(0, n_blocks - 1)) for _ in range(M)] for _ in range(lists)]
    counts = [draw(st.integers(0, M + 1)) for _ in range(lists)]
    order = draw(st.permutations(range(-(-shape[1] // page_tok) + 2)))
    return shape, block, page_tok, starts, counts, order, draw(st.integers(1, 2)), draw(st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("impl", IMPLS)
@given(case=cases())
def test_brute_force(impl, case):
    shape, block, page_tok, starts, counts, order, apart, seed = case
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    found = run(x, page_tok, starts, counts, block, impl, order, apart)
    for mine, raw in zip(found, x, strict=True):
        assert torch.equal(mine.cpu(), brute(raw, starts, counts, block))


@needs_triton
@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("D", "block"), [(32, 8), (80, 8), (128, 64), (256, 16), (96, 1)])
def test_triton_in_every_size(D, block, dtype):
    x = torch.randn(2, 2, 4 * 64 - 7, D).to(dtype)
    starts = [[64, 0, 128, 64 + 64 - block], [128, 64, 0, block]]
    found = run(x, 64, starts, [4, 2], block, "triton", order=[2, 0, 3, 1])
    for mine, raw in zip(found, x, strict=True):
        assert mine.dtype == dtype and torch.equal(mine.cpu(), brute(raw, starts, [4, 2], block))


@pytest.mark.device
@pytest.mark.parametrize("impl", IMPLS)
def test_pages_past_two_to_the_31_numbers(impl):
    """Of which few are touched."""
    far = 2**31 // (64 * 64)
    pages = torch.empty(far + 2, 1, 64, 64, dtype=torch.float16, device=DEVICE)
    pages[far + 1] = torch.randn(64, 64)
    starts, counts = torch.tensor([[72]], device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    found = gather_kv(pages, pages, torch.tensor([0, far + 1], device=DEVICE), starts, counts, block_tok=8, impl=impl)
    assert torch.equal(found[0][0], pages[far + 1, 0, 8:16]) and torch.equal(found[1], found[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_given_to_write_over(impl):
    x = torch.randn(2, 2, 32, 4)
    out = tuple(torch.full((2, 24, 4), torch.nan, device=DEVICE) for _ in range(2))
    found = run(x, 16, [[8, 24, 0]], [2], 8, impl, out=out)
    assert found[0] is out[0] and found[1] is out[1]
    assert torch.equal(out[1].cpu(), brute(x[1], [[8, 24, 0]], [2], 8))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_page_and_one_head_may_lie_anywhere(impl):
    pages = torch.randn(1, 1, 16, 4, device=DEVICE).as_strided((1, 1, 16, 4), (7, 5, 4, 1))
    table, starts, counts = (torch.zeros(shape, dtype=torch.int64, device=DEVICE) for shape in ((1,), (1, 1), (1,)))
    found = gather_kv(pages, pages, table, starts + 8, counts + 1, block_tok=8, impl=impl)
    assert torch.equal(found[0][0], pages[0, 0, 8:])


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_gather(impl):
    none = torch.zeros(0, 2, 16, 4, device=DEVICE)
    table, starts, counts = (torch.full(shape, value, device=DEVICE) for shape, value in (((0,), 0), ((1, 3), -1), ((1,), 0)))
    keys, values = gather_kv(none, none, table, starts, counts, block_tok=8, impl=impl)
    assert keys.shape == values.shape == (2, 24, 4) and not keys.any() and not values.any()


@needs_gpu
@pytest.mark.gpu
def test_pinned_pages_are_read_over_the_link():
    x = torch.randn(2, 4, 4096, 128, dtype=torch.bfloat16)
    pages = [part.view(4, 64, 64, 128).transpose(0, 1).contiguous().pin_memory() for part in x]
    starts = torch.randperm(512)[None].mul(8)
    table, counts = torch.arange(64, dtype=torch.int32), torch.tensor([512])
    found = gather_kv(*pages, table.to(DEVICE), starts.to(DEVICE), counts.to(DEVICE), block_tok=8)
    for mine, raw in zip(found, x, strict=True):
        assert mine.is_cuda and torch.equal(mine.cpu(), brute(raw, starts.tolist(), [512], 8))
    with pytest.raises(ValueError, match="pages in host memory must be pinned"):
        gather_kv(*(page.clone() for page in pages), table.to(DEVICE), starts.to(DEVICE), counts.to(DEVICE), block_tok=8)


def test_refusals():
    pages, table, starts, counts = torch.zeros(3, 2, 16, 4), torch.arange(3), torch.zeros(1, 5, dtype=torch.int64), torch.tensor([5])
    for change, message in (
        (dict(k_pages=pages[0]), r"k_pages \(2, 16, 4\) and v_pages \(3, 2, 16, 4\) must both be"),
        (dict(v_pages=pages.half()), "of one number format"),
        (dict(block_tok=3), "block_tok=3 must divide the 16 tokens of a page"),
        (dict(k_pages=torch.zeros(3, 16, 2, 4).transpose(1, 2)), "must lie one after the other"),
        (dict(starts=starts.expand(3, 5)), r"starts \(3, 5\), counts \(1,\) and table \(3,\) must be"),
        (dict(out=(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))), r"must be two contiguous \(2, 40, 4\)"),
        (dict(out=(torch.zeros(2, 40, 4),) * 2), "must be two tensors, one for keys and one for values"),
        (dict(starts=starts.float()), "must be whole numbers on one device"),
        (dict(impl="numpy"), "impl='numpy' is unknown"),
    ):
        call = dict(k_pages=pages, v_pages=pages, table=table, starts=starts, counts=counts, block_tok=8) | change
        with pytest.raises(ValueError, match=message):
            gather_kv(**call)
