"""Runs out of pages: brute force, every implementation, every length of a run, host memory, what is refused."""

import pytest
import torch
from hipexp_kernels import gather_kv
from hypothesis import given
from hypothesis import strategies as st

from triton_device import DEVICE, needs_gpu, needs_triton

IMPLS = ("reference", "vectorized", pytest.param("triton", marks=needs_triton))


def made(shape, dtype=torch.uint8, seed=0, before=0):
    """Random bytes, as numbers of ``dtype``, behind ``before`` numbers that are not theirs."""
    n = shape[0] * shape[1] + before
    values = torch.randint(256, (n * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return values.view(dtype).to(DEVICE)[before:].view(shape)


def as_bytes(x):
    return x.cpu().view(torch.uint8).tolist()


def brute(pages, blocks):
    pages = as_bytes(pages)
    return [pages[block] for block in blocks]


@pytest.mark.parametrize("impl", IMPLS)
@given(data=st.data())
def test_brute_force(impl, data):
    draw = data.draw
    N, run, before = draw(st.integers(1, 20)), draw(st.sampled_from([1, 3, 8, 16, 66, 80])), draw(st.integers(0, 5))
    dtype = draw(st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]))
    blocks = draw(st.lists(st.integers(0, N - 1), max_size=30))
    pages = made((N, run), dtype, draw(st.integers(0, 2**32 - 1)), before)
    listed = torch.tensor(blocks, dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)
    found = gather_kv(pages, listed, impl=impl)
    assert found.shape == (len(blocks), run) and found.dtype == dtype and found.device.type == DEVICE.type
    assert as_bytes(found) == brute(pages, blocks)

    around = made((len(blocks) + 2, run), dtype, 1, before)
    first, last = as_bytes(around[0]), as_bytes(around[-1])
    out = around[1:-1]
    assert gather_kv(pages, listed, out=out, impl=impl) is out
    assert as_bytes(around) == [first, *brute(pages, blocks), last]


@needs_triton
@pytest.mark.device
@pytest.mark.parametrize("programs", [None, 2])
@pytest.mark.parametrize("run", [1, 2, 66, 80, 130, 256, 528, 1040, 4096, 8192, 8200, 20000])
def test_triton_with_runs_of_every_length(run, programs):
    """Within a tile, longer than one, and of more tiles than there are programs."""
    from hipexp_kernels.gather_kv.triton import TILE
    from hipexp_kernels.gather_kv.triton import gather_kv as by_triton

    n = 5 * TILE // run + 7
    pages = made((13, run))
    blocks = torch.randint(13, (2 * n,), generator=torch.Generator().manual_seed(run)).to(DEVICE)[::2]
    out = torch.zeros(n, run, dtype=torch.uint8, device=DEVICE)
    by_triton(pages, blocks, out, programs=programs)
    assert torch.equal(out, pages[blocks])


@pytest.mark.device
@pytest.mark.parametrize("impl", IMPLS)
def test_pages_past_two_to_the_31_bytes(impl):
    """Of which few are touched."""
    far = 2**31 // 4096
    pages = torch.empty(far + 2, 4096, dtype=torch.uint8, device=DEVICE)
    pages[far + 1] = made((1, 4096))[0]
    found = gather_kv(pages, torch.tensor([far + 1], dtype=torch.int32, device=DEVICE), impl=impl)
    assert torch.equal(found[0], pages[far + 1])


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_gather(impl):
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for N, run, blocks in ((0, 16, none), (3, 16, none), (3, 0, none.new_tensor([1, 2]))):
        assert gather_kv(torch.zeros(N, run, device=DEVICE), blocks, impl=impl).shape == (len(blocks), run)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_run_and_runs_of_one_number_may_have_any_stride(impl):
    pages, zero = torch.randn(1, 8, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert torch.equal(gather_kv(pages.as_strided((1, 8), (5, 1)), zero, impl=impl), pages)
    assert torch.equal(gather_kv(pages.as_strided((8, 1), (1, 3)), zero + 6, impl=impl), pages[:, 6:7])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_do_not_flow(impl):
    pages = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    found = gather_kv(pages, torch.tensor([2], device=DEVICE), impl=impl)
    assert not found.requires_grad and torch.equal(found, pages[2:3])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("run", [66, 2048, 20000])
def test_host_memory_is_read_over_the_link(run, impl):
    """That of torch's allocator of pinned memory, and what was registered by itself."""
    plain = made((500, run)).cpu()
    blocks = torch.randperm(500)
    registered, cudart = plain.clone(), torch.cuda.cudart()
    torch.cuda.check_error(int(cudart.cudaHostRegister(registered.data_ptr(), registered.nbytes, 0)))
    try:
        for pages in (plain.pin_memory(), registered):
            found = gather_kv(pages, blocks.to(DEVICE), impl=impl)
            assert found.is_cuda and torch.equal(found.cpu(), plain[blocks])
    finally:
        torch.cuda.check_error(int(cudart.cudaHostUnregister(registered.data_ptr())))
    if impl == "triton":
        with pytest.raises(ValueError, match="pages in host memory must be pinned or registered with CUDA"):
            gather_kv(plain, blocks.to(DEVICE), impl=impl)


def test_refusals():
    pages, blocks = torch.zeros(6, 8), torch.arange(3)
    for change, message in (
        (dict(pages=pages[0]), r"pages \(8,\), strides \(1,\), must be \[runs, run\]"),
        (dict(pages=pages[:, :4]), "one run right behind the other"),
        (dict(pages=pages.T), "one run right behind the other"),
        (dict(blocks=blocks[None]), r"blocks \(1, 3\) torch.int64 must be \[n\], int32 or int64"),
        (dict(blocks=blocks.float()), "must be .*int32 or int64"),
        (dict(blocks=blocks - 1), "blocks must be from 0 to 5, there are no others"),
        (dict(blocks=blocks + 4), "blocks must be from 0 to 5"),
        (dict(pages=pages[:0]), "blocks must be from 0 to -1"),
        (dict(out=torch.zeros(3, 7)), r"out \(3, 7\) torch.float32 on cpu must be a contiguous \(3, 8\) of torch.float32 on cpu"),
        (dict(out=torch.zeros(3, 8).half()), r"out \(3, 8\) torch.float16"),
        (dict(out=torch.zeros(8, 3).T), "must be a contiguous"),
        (dict(impl="numpy"), "impl='numpy' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_kv(**dict(pages=pages, blocks=blocks) | change)
