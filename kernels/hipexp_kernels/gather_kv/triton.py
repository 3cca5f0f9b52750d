"""A few programs copy one block of one head after the other. The pages may lie in pinned host memory: few programs keep a link busy."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import gpu, require, require_triton_can

PROGRAMS_PER_SM = 4  # from memory of the GPU
PROGRAMS_ON_A_LINK = 32  # from memory of the host: what waits for the link keeps a multiprocessor from others
NUMBERS = 4096  # of keys, and of values, that a program moves at a time


@triton.jit(do_not_specialize=["n_blocks", "M"])
def _gather(
    k_pages,  # [P, K, page_tok, D]
    v_pages,
    table,  # [pages of the sequence]
    starts,  # [S, M]
    counts,  # [S]
    k_out,  # [K, M * BLOCK_TOK, D]
    v_out,
    n_blocks,  # of all heads
    M,
    starts_stride,  # 0 if all heads share one list
    counts_stride,
    k_stride_page,
    k_stride_head,
    v_stride_page,
    v_stride_head,
    PAGE_TOK: tl.constexpr,
    BLOCK_TOK: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    RUN: tl.constexpr = BLOCK_TOK * D  # a block of one head is one run of memory
    for at in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        head, slot = tl.cast(at // M, tl.int64), at % M
        there = slot < tl.load(counts + head * counts_stride)
        start = tl.load(starts + head * starts_stride + slot, mask=there, other=0).to(tl.int64)
        page = tl.load(table + start // PAGE_TOK).to(tl.int64)
        row = start % PAGE_TOK * D
        k_from = k_pages + page * k_stride_page + head * k_stride_head + row
        v_from = v_pages + page * v_stride_page + head * v_stride_head + row
        to = tl.cast(at, tl.int64) * RUN
        for begin in range(0, RUN, TILE):
            i = begin + tl.arange(0, TILE)
            keys = tl.load(k_from + i, mask=there & (i < RUN), other=0.0)
            values = tl.load(v_from + i, mask=there & (i < RUN), other=0.0)
            tl.store(k_out + to + i, keys, mask=i < RUN)
            tl.store(v_out + to + i, values, mask=i < RUN)


def launch(block_tok: int, dim: int, page_tok: int, itemsize: int) -> tuple[dict, dict]:
    """Tile sizes (constexprs) and compiler options. ``itemsize``: bytes of a number."""
    tile = min(NUMBERS, triton.next_power_of_2(block_tok * dim))
    warps = max(1, min(8, tile * itemsize // 512))  # a thread moves 16 bytes at a time
    return dict(PAGE_TOK=page_tok, BLOCK_TOK=block_tok, D=dim, TILE=tile), dict(num_warps=triton.next_power_of_2(warps))


def gather_kv(
    k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, counts: Tensor, out: tuple[Tensor, Tensor], *, block_tok: int,
    programs: int | None = None,
) -> None:  # fmt: skip
    """See :func:`hipexp_kernels.gather_kv.gather_kv`. ``programs``: how many copy at most."""
    require_triton_can("gather_kv", starts, multiplies=False)
    on_link = starts.is_cuda and not k_pages.is_cuda
    require(not on_link or (k_pages.is_pinned() and v_pages.is_pinned()), "gather_kv: pages in host memory must be pinned")
    starts, counts, table = starts.contiguous(), counts.contiguous(), table.contiguous()
    (_, K, page_tok, D), (S, M) = k_pages.shape, starts.shape
    constexprs, options = launch(block_tok, D, page_tok, k_pages.element_size())
    programs = programs or (PROGRAMS_ON_A_LINK if on_link else PROGRAMS_PER_SM * gpu(starts.device)[0])
    _gather[(min(K * M, programs),)](
        k_pages, v_pages, table, starts, counts, *out, K * M, M, M if S > 1 else 0, int(S > 1),
        *k_pages.stride()[:2], *v_pages.stride()[:2], **constexprs, **options,
    )  # fmt: skip


def aot_cases(dtype: str, dim: int, group: int, hopper: bool) -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What ``hipexp_kernels.aot`` compiles: name, kernel, types, constants, options."""
    pointers = dict.fromkeys(("k_pages", "v_pages", "k_out", "v_out"), f"*{dtype}") | dict.fromkeys(("table", "counts"), "*i32")
    strides = dict.fromkeys((f"{x}_stride_{of}" for x in "kv" for of in ("page", "head")), "i64:16")
    types = dict.fromkeys(_gather.arg_names, "i32") | pointers | strides | dict(starts="*i64")
    for block_tok in (8, 64):
        yield f"blocks of {block_tok}", _gather, types, *launch(block_tok, dim, 64, 4 if dtype == "fp32" else 2)
