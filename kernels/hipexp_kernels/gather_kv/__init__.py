"""Collect runs of keys or values out of pages."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.gather_kv.reference import gather_kv as reference
from hipexp_kernels.gather_kv.vectorized import gather_kv as vectorized


def gather_kv(pages: Tensor, blocks: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Return the runs ``blocks`` ``[n]`` of ``pages`` ``[N, run]``, one after the other, ``[n, run]``, on the device of ``blocks``.

    ``pages``: of any number format, or bytes, contiguous; ``blocks``: int32 or int64, in any order, with or without repetitions. Pages may
    lie in host memory that is pinned or registered with CUDA while ``blocks`` is on a GPU: ``triton`` reads them there, across the link,
    without a copy before. ``out``: written over and returned.

    Raises ``ValueError`` on shapes that do not match and on runs that do not exist; on a GPU nothing waits to look whether they do.
    """
    require(
        pages.ndim == 2 and pages.is_contiguous(),
        f"gather_kv: pages {tuple(pages.shape)}, strides {pages.stride()}, must be [runs, run], one run right behind the other",
    )
    require(
        blocks.ndim == 1 and blocks.dtype in (torch.int32, torch.int64),
        f"gather_kv: blocks {tuple(blocks.shape)} {blocks.dtype} must be [n], int32 or int64",
    )
    require(not len(blocks) or _exist(blocks, len(pages)), f"gather_kv: blocks must be from 0 to {len(pages) - 1}, there are no others")
    shape = len(blocks), pages.shape[1]
    out = pages.new_empty(shape, device=blocks.device) if out is None else out
    require(
        out.shape == shape and out.dtype == pages.dtype and out.device == blocks.device and out.is_contiguous(),
        f"gather_kv: out {tuple(out.shape)} {out.dtype} on {out.device} must be a contiguous {shape} of {pages.dtype} on {blocks.device}",
    )
    run = choose(impl, {"reference": reference, "vectorized": vectorized, "triton": lazy("gather_kv")}, blocks.device)
    if out.numel():
        run(pages.detach(), blocks, out)
    return out


def _exist(blocks: Tensor, n: int) -> bool:
    """Whether all are from 0 to before ``n``, as far as nobody waits for a GPU to know."""
    if blocks.device.type != "cpu":
        return n > 0
    least, most = blocks.aminmax()
    return bool(least >= 0) and bool(most < n)
