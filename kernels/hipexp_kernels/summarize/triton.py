"""A program for each piece and key/value head: its keys are read once, in one stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import require_triton_can
from hipexp_kernels.summarize.reference import OUTLIER_SHARE


@triton.jit
def _summarize(k_ptr, out_ptr, n_pieces, stride_h, stride_t, PIECE: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, SHARE: tl.constexpr):
    piece, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, d = tl.arange(0, PIECE), tl.arange(0, D_P)
    at = (piece.to(tl.int64) * PIECE + token)[:, None] * stride_t + d[None, :]
    keys = tl.load(k_ptr + head * stride_h + at, mask=(d < D)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(keys, 0) / PIECE
    deviation = keys - mean[None, :]
    farthest = tl.argmax(tl.sum(deviation * deviation, 1), 0)
    trace = tl.sum(tl.where((token == farthest)[:, None], deviation, 0.0), 0)
    out_ptr += (head * n_pieces + piece) * 2 * D
    tl.store(out_ptr + d, mean.to(out_ptr.dtype.element_ty), mask=d < D)
    # a NaN anywhere makes the mean one, whichever key is taken
    tl.store(out_ptr + D + d, (mean + SHARE * trace).to(out_ptr.dtype.element_ty), mask=d < D)


def launch(dim: int, piece_tok: int) -> tuple[dict, dict]:
    """Tile sizes (constexprs) and compiler options."""
    padded = triton.next_power_of_2(dim)
    return dict(PIECE=piece_tok, D=dim, D_P=padded, SHARE=OUTLIER_SHARE), dict(num_warps=max(1, min(8, piece_tok * padded // 2048)))


def summarize(k: Tensor, *, piece_tok: int) -> Tensor:
    """See :func:`hipexp_kernels.summarize.summarize`."""
    require_triton_can("summarize", k, multiplies=False)
    k = k if k.stride(2) == 1 else k.contiguous()
    K, T, D = k.shape
    out = torch.empty(K, T // piece_tok, 2, D, dtype=k.dtype, device=k.device)
    if out.numel():
        constexprs, options = launch(D, piece_tok)
        _summarize[(T // piece_tok, K)](k, out, T // piece_tok, k.stride(0), k.stride(1), **constexprs, **options)
    return out


def aot_cases(dtype: str, dim: int, group: int, hopper: bool) -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What ``hipexp_kernels.aot`` compiles: name, kernel, types, constants, options."""
    types = dict(k_ptr=f"*{dtype}", out_ptr=f"*{dtype}", n_pieces="i32", stride_h="i32:16", stride_t="i32:16")
    yield "", _summarize, types, *launch(dim, 64)
