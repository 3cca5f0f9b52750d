"""The score of the worst chunk to keep by counting, then one pass that writes in order; nothing is sorted.

Scores become integers, the better the smaller, between two of which the threshold lies. Every step counts the chunks below four more in
between and goes on within the fifth where there are enough, until those below one are as many as wanted, or only ties are left. A list
of up to ``IN_REGISTERS`` chunks is read once. For a longer one, a histogram of those that share the digits found so far tells the next
eight bits of the threshold, and every digit reads it again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import require_triton_can

IN_REGISTERS = 8192  # longer lists are read again for every digit, in tiles of this many chunks; their counts are to fit 16 bits
FEW = 32  # of up to as many lists, ``PARTS`` programs find the threshold of each, and each of them writes its part
PARTS = 8
CHUNKS_PER_WARP, CHUNKS_PER_WARP_MANY = 512, 1024
MIN_WARPS, MAX_WARPS = 4, 16


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
    strides = starts.stride(0) if len(starts) > 1 else 0, starts.stride(1) if starts.shape[1] > 1 else 0
    constexprs, options = launch(C, K // lists, chunk_tok, next_tok, N * lists)
    _keep_top[(N, lists, constexprs["PARTS"])](
        scores, starts, counts, limits, found, kept, *strides, N if len(counts) > 1 else 0,
        N, C, keep, n_out, **constexprs, **options,
    )  # fmt: skip
    return found, kept


def launch(n_chunks: int, heads: int, chunk_tok: int, next_tok: int, n_lists: int = 1) -> tuple[dict, dict]:
    """The constexpr arguments and the compiler options for lists of up to ``n_chunks`` that ``heads`` key/value heads share."""
    tile = min(max(32, triton.next_power_of_2(n_chunks)), IN_REGISTERS)
    one, few = n_chunks <= tile, n_lists <= FEW
    constexprs = dict(HEADS=heads, CHUNK=chunk_tok, NEXT=next_tok, TILE=tile, ONE_TILE=one, PARTS=PARTS if one and few else 1)
    warps = min(max(MIN_WARPS, tile // (CHUNKS_PER_WARP if few else CHUNKS_PER_WARP_MANY)), MAX_WARPS)
    options = dict(num_warps=warps, num_stages=1)
    if few and warps <= 8 and not torch.version.hip:
        options["maxnreg"] = 255  # or ptxas saves registers and has only some of the loads under way at once
    return constexprs, options


def aot_cases(dtype: str, dim: int, group: int, hopper: bool) -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What ``hipexp_kernels.aot`` compiles: name, kernel, types, constants, options. Scores are fp32 whatever keys are."""
    if (dtype, dim, group) != ("bf16", 128, 4):
        return
    types = dict(scores_ptr="*fp32", starts_ptr="*i64", counts_ptr="*i64", limits_ptr="*i64", out_ptr="*i64", kept_ptr="*i64")
    types = dict.fromkeys(_keep_top.arg_names, "i32") | types
    for name, n_chunks, heads, chunk_tok, next_tok, n_lists in (
        ("stage 1 shared", 4096, 8, 256, 32, 1),
        ("stage 2 shared", 1024, 8, 32, 8, 1),
        ("stage 3 shared", 1024, 8, 8, 8, 1),
        ("stage 1 per head", 4096, 1, 256, 32, 8),
        ("stage 1 at 2M", 8192, 8, 256, 32, 1),
        ("stage 1 prefill", 4096, 8, 256, 32, 512),
        ("in tiles", 131072, 8, 256, 32, 1),
    ):
        yield name, _keep_top, types, *launch(n_chunks, heads, chunk_tok, next_tok, n_lists)


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
    PARTS: tl.constexpr,
):
    n, s = tl.program_id(0), tl.program_id(1)
    head_stride = N.to(tl.int64) * C
    scores_ptr += s * HEADS * head_stride + n.to(tl.int64) * C
    starts_ptr += s.to(tl.int64) * starts_stride_s + n.to(tl.int64) * starts_stride_n
    out_ptr += (s * N + n).to(tl.int64) * n_out
    count = tl.load(counts_ptr + s * counts_stride_s + n).to(tl.int32)
    limit = tl.load(limits_ptr + n).to(tl.int32)
    count = tl.minimum(count, C)
    room = tl.minimum(keep, count)  # chunks still to be found

    if ONE_TILE:
        # All loads before anything waits, even for ``count``.
        order = _order(scores_ptr, head_stride, 0, count, C, HEADS, TILE)
        start = _starts(starts_ptr, 0, C, TILE)
        threshold, room, cut = _search(order, room, count, TILE)
        total, _ = _write(order, start, out_ptr, limit, threshold, room, cut, 0, CHUNK, NEXT, TILE, PARTS)
    else:
        threshold = tl.zeros([], tl.uint32)
        for shift in tl.static_range(24, -1, -8):
            histogram = tl.zeros([256], tl.int32)
            for begin in range(0, count, TILE):
                order = _order(scores_ptr, head_stride, begin, count, C, HEADS, TILE)
                histogram += _count_digits(order, threshold, shift)
            digit = tl.arange(0, 256)
            up_to = tl.cumsum(histogram, 0)
            # The first digit at which there are enough, and how many there are before it, in one reduction.
            found = tl.min(tl.where(up_to >= room, digit << 23 | (up_to - histogram), 0x7FFFFFFF), 0)
            room -= found & 0x7FFFFF
            threshold |= (found >> 23).to(tl.uint32) << shift
        total = tl.zeros([], tl.int32)
        for begin in range(0, count, TILE):
            order = _order(scores_ptr, head_stride, begin, count, C, HEADS, TILE)
            start = _starts(starts_ptr, begin, C, TILE)
            total, room = _write(order, start, out_ptr, limit, threshold, room, True, total, CHUNK, NEXT, TILE, PARTS)
    PAD: tl.constexpr = min(TILE, 1024)
    for begin in range(total + tl.program_id(2) * PAD, n_out, PARTS * PAD):
        slot = begin + tl.arange(0, PAD)
        tl.store(out_ptr + slot, tl.full([PAD], -1, tl.int32).to(out_ptr.dtype.element_ty), mask=slot < n_out)
    tl.store(kept_ptr + s * N + n, total.to(kept_ptr.dtype.element_ty))


@triton.jit
def _readable(begin, C, TILE: tl.constexpr):
    """The chunks of a tile, the last in place of those past the row: ptxas spreads loads with a condition, so that each is waited for."""
    return tl.minimum(begin + tl.arange(0, TILE), C - 1)


@triton.jit
def _starts(starts_ptr, begin, C, TILE: tl.constexpr):
    return tl.load(starts_ptr + _readable(begin, C, TILE)).to(tl.int32)


@triton.jit
def _order(scores_ptr, head_stride, begin, count, C, HEADS: tl.constexpr, TILE: tl.constexpr):
    """The best scores of ``TILE`` chunks over the heads as unsigned integers, the better the smaller: 0 is NaN, -0 is as 0.

    Those past ``count`` are worse than all.
    """
    readable = _readable(begin, C, TILE)
    best = tl.load(scores_ptr + readable)
    for head in tl.static_range(1, HEADS):
        best = tl.maximum(best, tl.load(scores_ptr + head * head_stride + readable), propagate_nan=tl.PropagateNan.ALL)
    bits = tl.where(best == 0, 0.0, best).to(tl.uint32, bitcast=True)
    order = bits ^ tl.where(bits >> 31 == 1, 0, 0x7FFFFFFF).to(tl.uint32)
    order = tl.where(best == best, order, 0)
    return tl.where(begin + tl.arange(0, TILE) < count, order, 0xFFFFFFFF)


@triton.jit
def _search(order, room, count, TILE: tl.constexpr):
    """The order of the worst chunk to keep, the room for those exactly there, and whether not all of these fit."""
    # Each quarter of the tile has one chunk of each group; ``room`` groups have as many chunks at least as good as the worst of the best.
    group = tl.min(tl.reshape(order, [4, TILE // 4]), 0)
    ends = tl.max(tl.join(group, 0xFFFFFFFF - group), 0)
    worst, best = tl.split(ends)
    low = 0xFFFFFFFF - best
    high = tl.minimum(tl.where(room <= TILE // 4, worst, 0xFFFFFFFF), 0xFF800000).to(tl.uint32)  # that is minus infinity
    high = tl.where(room == count, 0xFF800000, high).to(tl.uint32)
    up_to_high = tl.where(room == count, room, -1)  # not known
    below_low = tl.zeros([], tl.int32)
    while (low < high) & (up_to_high != room):
        step = (high - low) // 5 + 1
        a = (order < low + step).to(tl.int32) + (order < low + 2 * step).to(tl.int32) * 65536
        b = (order < low + 3 * step).to(tl.int32) + (order < low + 4 * step).to(tl.int32) * 65536
        a, b = tl.split(tl.sum(tl.join(a, b), 0))
        below_1, below_2, below_3, below_4 = a & 65535, a >> 16, b & 65535, b >> 16
        fifth = (below_1 < room).to(tl.uint32) + (below_2 < room) + (below_3 < room) + (below_4 < room)
        if fifth < 4:
            high = low + step * (fifth + 1) - 1
            up_to_high = tl.where(fifth == 0, below_1, tl.where(fifth == 1, below_2, tl.where(fifth == 2, below_3, below_4)))
        if fifth > 0:
            low += step * fifth
            below_low = tl.where(fifth == 1, below_1, tl.where(fifth == 2, below_2, tl.where(fifth == 3, below_3, below_4)))
    return high, room - below_low, up_to_high != room


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
    order, start, out_ptr, limit, threshold, room, cut, total,
    CHUNK: tl.constexpr, NEXT: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the pieces of the kept chunks of a tile after the first ``total``; the new ``total``, and the ``room`` left for ties.

    ``room`` of those exactly at the threshold are kept: the first ones. All are if not ``cut``.
    """
    kept = order <= threshold
    if cut:
        tied = (order == threshold).to(tl.int32)
        kept &= (tied == 0) | (tl.cumsum(tied, 0) <= room)
        room = tl.maximum(room - tl.sum(tied, 0), 0)
    before_limit = tl.minimum(tl.maximum(limit - start, 0), CHUNK)
    pieces = tl.where(kept, tl.cdiv(before_limit, NEXT), 0)
    if PARTS > 1:
        part = tl.arange(0, PARTS)[:, None] - tl.program_id(2)
        pieces, start = tl.reshape(pieces, [PARTS, TILE // PARTS]), tl.reshape(start, [PARTS, TILE // PARTS])
        # Of the parts before this, of all.
        sums = tl.sum(tl.join(tl.sum(tl.where(part < 0, pieces, 0), 0), tl.sum(pieces, 0)), 0)
        pieces, start = tl.sum(tl.where(part == 0, pieces, 0), 0), tl.sum(tl.where(part == 0, start, 0), 0)
        before, more = tl.split(sums)
    else:
        before, more = 0, tl.sum(pieces, 0)
    slot = total + before + tl.cumsum(pieces, 0) - pieces
    for piece in tl.static_range(CHUNK // NEXT):
        tl.store(out_ptr + slot + piece, (start + piece * NEXT).to(out_ptr.dtype.element_ty), mask=piece < pieces)
    return total + more, room
