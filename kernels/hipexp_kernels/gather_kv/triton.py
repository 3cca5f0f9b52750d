"""A few programs copy tiles of a few runs each. The pages may lie in host memory: few programs keep a link busy.

Runs are bytes, of a length that is known when the kernel is compiled. From it and from where pages begin the compiler knows how wide an
access may be: 16 bytes if both are multiples of 16, two bytes for runs of 66.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import require, require_triton_can

PROGRAMS_ON_A_LINK = 32  # from memory of the host: what waits for the link keeps a multiprocessor from others
TILE = 8192  # bytes that a program moves at a time, 64 by each thread: 32 programs ask for 256 KB at once


@triton.jit(do_not_specialize=["n"])
def _gather(
    pages,  # [N, RUN], bytes
    blocks,  # [n]
    out,  # [n, RUN]
    n,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,  # runs of a tile
    COLUMNS: tl.constexpr,  # bytes of each
):
    for first in range(tl.program_id(0) * ROWS, n, tl.num_programs(0) * ROWS):
        at = first + tl.arange(0, ROWS)
        there = at < n
        source = tl.load(blocks + at, mask=there, other=0).to(tl.int64)[:, None] * RUN
        target = at.to(tl.int64)[:, None] * RUN
        for begin in range(0, RUN, COLUMNS):
            i = begin + tl.arange(0, COLUMNS)[None, :]
            mask = there[:, None] & (i < RUN)
            tl.store(out + target + i, tl.load(pages + source + i, mask=mask), mask=mask)


def launch(run: int) -> dict:
    """Tile sizes (constexprs) for runs of so many bytes."""
    columns = min(TILE, triton.next_power_of_2(run))
    return dict(RUN=run, ROWS=TILE // columns, COLUMNS=columns)


def gather_kv(pages: Tensor, blocks: Tensor, out: Tensor, *, programs: int | None = None) -> None:
    """See :func:`hipexp_kernels.gather_kv.gather_kv`. ``programs``: how many copy at most."""
    require_triton_can("gather_kv", blocks, multiplies=False)
    on_link = blocks.is_cuda and not pages.is_cuda
    require(not on_link or pages.is_pinned(), "gather_kv: pages in host memory must be pinned or registered with CUDA")
    constexprs = launch(pages.shape[1] * pages.element_size())
    tiles = triton.cdiv(len(blocks), constexprs["ROWS"])
    programs = programs or (PROGRAMS_ON_A_LINK if on_link else tiles)
    pages, out = (x.view(-1).view(torch.uint8) for x in (pages, out))
    with torch.cuda.device_of(out):  # a thread that reads ahead begins on the first GPU
        _gather[(min(tiles, programs),)](pages, blocks.contiguous(), out, len(blocks), **constexprs)


def aot_cases(dtype: str, dim: int, group: int, hopper: bool) -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What ``hipexp_kernels.aot`` compiles: name, kernel, types, constants, options."""
    types = dict(pages="*u8", blocks="*i64", out="*u8", n="i32")
    for name, run in (("units of 8", 8 * dim * (4 if dtype == "fp32" else 2)), ("rows of int8", dim + 2)):
        yield name, _gather, types, launch(run), {}
