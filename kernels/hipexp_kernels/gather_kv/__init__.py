"""Collect blocks of keys and values out of pages, through a page table."""

from __future__ import annotations

from math import prod

from torch import Tensor

from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.gather_kv.reference import gather_kv as reference
from hipexp_kernels.gather_kv.vectorized import gather_kv as vectorized


def gather_kv(
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    block_tok: int,
    out: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the keys and values ``[K, M * block_tok, D]`` of the blocks at ``starts``, one block after the other, on its device.

    ``k_pages``, ``v_pages`` ``[P, K, page_tok, D]``: a head's tokens of one page lie one after the other. Token ``t`` stands in row
    ``t % page_tok`` of page ``table[t // page_tok]``, ``table`` ``[pages of the sequence]``. Pages may lie in pinned host memory while
    all else is on a GPU: ``triton`` reads them there, across the link, without a copy before. ``starts`` ``[S, M]`` (``S`` is 1 if all
    heads share one list, or K): the first ``counts[s]`` of them count (all of them, if there are no more), and are multiples of
    ``block_tok``, which divides ``page_tok``, so that no block lies in two pages. In place of the others stands 0. ``out``: written over
    and returned.

    Raises ``ValueError`` on shapes that do not match; on a GPU nothing waits to look whether starts and pages exist.
    """
    P, K, page_tok, D = k_pages.shape if k_pages.ndim == 4 else (0, 0, 0, 0)
    require(
        k_pages.ndim == 4 and v_pages.shape == k_pages.shape and v_pages.dtype == k_pages.dtype,
        f"gather_kv: k_pages {tuple(k_pages.shape)} and v_pages {tuple(v_pages.shape)} must both be "
        "[pages, key/value heads, tokens of a page, dimension], of one number format",
    )
    require(block_tok > 0 and page_tok % block_tok == 0, f"gather_kv: block_tok={block_tok} must divide the {page_tok} tokens of a page")
    require(
        all(_in_blocks(x, block_tok * D) for x in (k_pages, v_pages)),
        "gather_kv: a head's tokens of a page must lie one after the other, and heads and pages a multiple of blocks apart",
    )
    require(
        starts.ndim == 2 and starts.shape[0] in (1, K) and counts.shape == starts.shape[:1] and table.ndim == 1,
        f"gather_kv: starts {tuple(starts.shape)}, counts {tuple(counts.shape)} and table {tuple(table.shape)} must be [1 or {K} lists, "
        "blocks], [lists] and [pages]",
    )
    require(
        table.device == counts.device == starts.device and not any(x.is_floating_point() for x in (table, counts, starts)),
        f"gather_kv: table ({table.device}), starts ({starts.device}) and counts ({counts.device}) must be whole numbers on one device",
    )
    shape = (K, starts.shape[1] * block_tok, D)
    if out is None:
        out = k_pages.new_empty(shape, device=starts.device), v_pages.new_empty(shape, device=starts.device)
    require(
        len(out) == 2 and (out[0].data_ptr() != out[1].data_ptr() or not prod(shape)),
        "gather_kv: out must be two tensors, one for keys and one for values",
    )
    require(
        all(x.shape == shape and x.dtype == k_pages.dtype and x.device == starts.device and x.is_contiguous() for x in out),
        f"gather_kv: out {[tuple(x.shape) for x in out]} must be two contiguous {shape} of {k_pages.dtype} on {starts.device}",
    )
    if not (P and K and len(table) and starts.numel()):
        return out[0].zero_(), out[1].zero_()
    run = choose(impl, {"reference": reference, "vectorized": vectorized, "triton": lazy("gather_kv")}, starts.device)
    run(k_pages, v_pages, table, starts, counts, out, block_tok=block_tok)
    return out


def _in_blocks(pages: Tensor, block: int) -> bool:
    """Whether blocks of so many numbers are pieces of memory that lie a multiple of blocks apart."""
    P, K, page_tok, D = pages.shape
    inner = (page_tok == 1 or pages.stride(2) == D) and (D == 1 or pages.stride(3) == 1)
    return inner and (P == 1 or pages.stride(0) % block == 0) and (K == 1 or pages.stride(1) % block == 0)
