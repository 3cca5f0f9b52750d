"""All parts of a row in one pass; the parts are separate tensors, handed over as a tuple."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import require_triton_can


@triton.jit
def _merge(outs, lses, merged, total, n_rows, n_parts: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, ROWS: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, D_P)
    is_row = row < n_rows
    at, mask = row[:, None] * D + d[None, :], is_row[:, None] & (d < D)[None, :]
    acc, weights = tl.zeros([ROWS, D_P], tl.float32), tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(n_parts):
        top = tl.maximum(top, tl.load(lses[i] + row, mask=is_row, other=float("-inf")).to(tl.float32))
    safe = tl.where(top == float("-inf"), 0.0, top)  # where all parts are empty
    for i in tl.static_range(n_parts):
        lse = tl.load(lses[i] + row, mask=is_row, other=float("-inf")).to(tl.float32)
        out = tl.load(outs[i] + at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.exp(lse - safe)
        weights += weight
        acc += tl.where((lse == float("-inf"))[:, None], 0.0, out * weight[:, None])  # an empty part may hold anything
    sum_or_one = tl.where(top == float("-inf"), 1.0, weights)
    tl.store(merged + at, (acc / sum_or_one[:, None]).to(merged.dtype.element_ty), mask=mask)
    sum = tl.where(top == float("inf"), top, safe + tl.log(weights))  # an overflow stays one, its weight is NaN
    tl.store(total + row, sum, mask=is_row)


def launch(D: int) -> tuple[dict, dict]:
    """Tile sizes (constexprs) and compiler options."""
    d_padded = triton.next_power_of_2(D)
    return dict(D=D, D_P=d_padded, ROWS=max(1, 2048 // d_padded)), dict(num_warps=4)


def merge_lse(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    require_triton_can("merge_lse", outs[0], multiplies=False)
    merged, total = torch.empty_like(outs[0], memory_format=torch.contiguous_format), torch.empty(outs[0].shape[:-1], device=outs[0].device)
    if total.numel():
        tile, options = launch(outs[0].shape[-1])
        parts = tuple(x.contiguous() for x in outs), tuple(x.contiguous() for x in lses)
        grid = (triton.cdiv(total.numel(), tile["ROWS"]),)
        _merge[grid](*parts, merged, total, total.numel(), n_parts=len(outs), **tile, **options)
    return merged, total


def aot_cases(dtype: str, dim: int, group: int, hopper: bool) -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What ``hipexp_kernels.aot`` compiles: name, kernel, types, constants, options."""
    tile, options = launch(dim)
    types = dict(outs=(f"*{dtype}",) * 2, lses=("*fp32",) * 2, merged=f"*{dtype}", total="*fp32", n_rows="i32")
    yield "", _merge, types, dict(n_parts=2, **tile), options
