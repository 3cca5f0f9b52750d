"""One program for each list: the score of the worst chunk to keep by radix selection, then one pass that writes in order.

Scores become integers, the better the smaller, and the threshold is found by its digits, highest first: a histogram of those scores
that share the digits found so far tells the next one. Nothing is sorted. A list of up to ``IN_REGISTERS`` chunks is read once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import require_triton_can

IN_REGISTERS = 8192  # longer lists are read again for every digit, in tiles of this many chunks
CHUNKS_PER_WARP = 256
MAX_WARPS = 16


def keep_top(
    scores: Tensor, starts: Tensor, counts: Tensor, limits: Tensor, *,
    keep: int, lists: int, chunk_tok: int, next_tok: int, out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`hipexp_kernels.keep_top.keep_top`. Nothing waits for the device; a score that is NaN counts as the best of all."""
    require_triton_can("keep_top", scores)
    K, N, C = scores.shape
    scores, counts, limits = scores.contiguous(), counts.contiguous(), limits.contiguous()
    starts = starts if starts.stride(2) == 1 else starts.contiguous()
    keep = min(keep, C)
    n_out = keep * (chunk_tok // next_tok)
    found, kept = out or (
        torch.empty(lists, N, n_out, dtype=starts.dtype, device=scores.device),
        torch.empty(lists, N, dtype=counts.dtype, device=scores.device),
    )
    if not N or not n_out:
        return found, kept.zero_()
    constexprs, options = launch(C, K // lists, chunk_tok, next_tok)
    _keep_top[(N, lists)](
        scores, starts, counts, limits, found, kept,
        starts.stride(0) if len(starts) > 1 else 0, starts.stride(1) if starts.shape[1] > 1 else 0, N if len(counts) > 1 else 0,
        N, C, keep, n_out, **constexprs, **options,
    )  # fmt: skip
    return found, kept


def launch(n_chunks: int, heads: int, chunk_tok: int, next_tok: int) -> tuple[dict, dict]:
    """The constexpr arguments and the compiler options for lists of up to ``n_chunks`` that ``heads`` key/value heads share."""
    tile = min(max(32, triton.next_power_of_2(n_chunks)), IN_REGISTERS)
    constexprs = dict(HEADS=heads, CHUNK=chunk_tok, NEXT=next_tok, TILE=tile, ONE_TILE=n_chunks <= tile)
    return constexprs, dict(num_warps=min(max(4, tile // CHUNKS_PER_WARP), MAX_WARPS), num_stages=1)


def aot_cases() -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What is compiled ahead of time: name, kernel, signature, constexprs, options."""
    for name, n_chunks, heads, chunk_tok, next_tok in (
        ("stage1_shared", 4096, 8, 256, 32),
        ("stage2_shared", 1024, 8, 32, 8),
        ("stage3_shared", 1024, 8, 8, 8),
        ("stage1_own", 4096, 1, 256, 32),
        ("stage1_long", 8192, 8, 256, 32),
        ("tiles", 131072, 8, 256, 32),
    ):
        constexprs, options = launch(n_chunks, heads, chunk_tok, next_tok)
        types = dict(scores_ptr="*fp32", starts_ptr="*i64", counts_ptr="*i64", limits_ptr="*i64", out_ptr="*i64", kept_ptr="*i64")
        signature = {arg: "constexpr" if arg in constexprs else types.get(arg, "i32") for arg in _keep_top.arg_names}
        yield name, _keep_top, signature, constexprs, options


@triton.jit(do_not_specialize=["N", "C", "keep", "n_out", "starts_stride_s", "starts_stride_n", "counts_stride_s"])
def _keep_top(
    scores_ptr,  # [K, N, C] fp32
    starts_ptr,  # [S or 1, N or 1, C]
    counts_ptr,  # [S or 1, N]
    limits_ptr,  # [N]
    out_ptr,  # [lists, N, n_out]
    kept_ptr,  # [lists, N]
    starts_stride_s,
    starts_stride_n,
    counts_stride_s,
    N,
    C,
    keep,
    n_out,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    NEXT: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    n, s = tl.program_id(0), tl.program_id(1)
    head_stride = N.to(tl.int64) * C
    scores_ptr += s * HEADS * head_stride + n.to(tl.int64) * C
    starts_ptr += s.to(tl.int64) * starts_stride_s + n.to(tl.int64) * starts_stride_n
    out_ptr += (s * N + n).to(tl.int64) * n_out
    count = tl.load(counts_ptr + s * counts_stride_s + n).to(tl.int32)
    limit = tl.load(limits_ptr + n).to(tl.int32)
    count = tl.minimum(count, C)
    last = tl.maximum(count - 1, 0)  # read in place of those past the count
    room = tl.minimum(keep, count)  # chunks still to be found

    cached = _order(scores_ptr, head_stride, 0, count, HEADS, TILE)
    threshold = tl.zeros([], tl.uint32)
    for shift in tl.static_range(24, -1, -8):
        if ONE_TILE:
            histogram = _count_digits(cached, threshold, shift)
        else:
            histogram = tl.zeros([256], tl.int32)
            for begin in range(0, count, TILE):
                order = _order(scores_ptr, head_stride, begin, count, HEADS, TILE)
                histogram += _count_digits(order, threshold, shift)
        digit = tl.arange(0, 256)
        up_to = tl.cumsum(histogram, 0)
        # The first digit at which there are enough, and how many there are before it, in one reduction.
        found = tl.min(tl.where(up_to >= room, digit << 23 | (up_to - histogram), 0x7FFFFFFF), 0)
        room -= found & 0x7FFFFF
        threshold |= (found >> 23).to(tl.uint32) << shift

    # ``room`` of those exactly at the threshold are kept: the first ones.
    if ONE_TILE:
        total, _ = _write(cached, starts_ptr, out_ptr, 0, last, limit, threshold, room, 0, CHUNK, NEXT, TILE)
    else:
        total = tl.zeros([], tl.int32)
        for begin in range(0, count, TILE):
            order = _order(scores_ptr, head_stride, begin, count, HEADS, TILE)
            total, room = _write(order, starts_ptr, out_ptr, begin, last, limit, threshold, room, total, CHUNK, NEXT, TILE)
    for begin in range(0, n_out, TILE):
        slot = begin + tl.arange(0, TILE)
        tl.store(out_ptr + slot, tl.full([TILE], -1, tl.int32).to(out_ptr.dtype.element_ty), mask=(slot >= total) & (slot < n_out))
    tl.store(kept_ptr + s * N + n, total.to(kept_ptr.dtype.element_ty))


@triton.jit
def _order(scores_ptr, head_stride, begin, count, HEADS: tl.constexpr, TILE: tl.constexpr):
    """The best scores of ``TILE`` chunks over the heads as unsigned integers, the better the smaller: 0 is NaN, -0 is as 0.

    Those past ``count`` are worse than all.
    """
    chunk = begin + tl.arange(0, TILE)
    readable = tl.minimum(chunk, tl.maximum(count - 1, 0))  # ptxas spreads loads that have a condition, so that each is waited for
    best = tl.full([TILE], 0xFFFFFFFF, tl.uint32)
    for head in tl.range(HEADS, loop_unroll_factor=4):
        score = tl.load(scores_ptr + head * head_stride + readable)
        bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
        order = bits ^ tl.where(bits >> 31 == 1, 0, 0x7FFFFFFF).to(tl.uint32)
        best = tl.minimum(best, tl.where(score == score, order, 0))
    return tl.where(chunk < count, best, 0xFFFFFFFF)


@triton.jit
def _count_digits(order, found, shift: tl.constexpr):
    """How many of the chunks that share the digits above ``shift`` with ``found`` have each digit at ``shift``: ``[256]``."""
    digit = ((order >> shift) & 255).to(tl.int32)
    if shift == 24:
        histogram = tl.histogram(digit, 256)
    else:
        histogram = tl.histogram(digit, 256, mask=(order >> (shift + 8)) == (found >> (shift + 8)))
    return histogram


@triton.jit
def _write(
    order, starts_ptr, out_ptr, begin, last, limit, threshold, room, total, CHUNK: tl.constexpr, NEXT: tl.constexpr, TILE: tl.constexpr
):
    """Write the pieces of the kept chunks of a tile after the first ``total``; the new ``total``, and the ``room`` left for ties."""
    # Asked for now, needed after the sums; without a condition, see ``_order``.
    start = tl.load(starts_ptr + tl.minimum(begin + tl.arange(0, TILE), last)).to(tl.int32)
    tied = (order == threshold).to(tl.int32)
    kept = (order < threshold) | ((tied == 1) & (tl.cumsum(tied, 0) <= room))
    before_limit = tl.minimum(tl.maximum(limit - start, 0), CHUNK)
    pieces = tl.where(kept, tl.cdiv(before_limit, NEXT), 0)
    slot = total + tl.cumsum(pieces, 0) - pieces
    for piece in tl.static_range(CHUNK // NEXT):
        tl.store(out_ptr + slot + piece, (start + piece * NEXT).to(out_ptr.dtype.element_ty), mask=piece < pieces)
    return total + tl.sum(pieces, 0), tl.maximum(room - tl.sum(tied, 0), 0)
