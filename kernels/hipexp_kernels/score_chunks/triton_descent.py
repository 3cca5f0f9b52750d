"""Descents: every chunk is halved until one token is left, its better half by a probed key in each.

Of one query row (decode) they wait for keys, not for arithmetic: every query head of the group walks all chunks of the tile at once, and
products are sums on the ordinary cores. Of several rows (prefill) they take the heads one after the other and multiply on the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hipexp_kernels.score_chunks.triton_tile import (
    PLAIN,
    Sizes,
    _best_product,
    _block,
    _chunks,
    _count,
    _key_position,
    _keys,
    _limit,
    _list,
    _max,
    _query,
    _query_in,
    _query_position,
    _turned_keys,
)


@triton.constexpr_function
def _depth(chunk):
    """Halvings until one token is left; a chunk of one token is probed all the same."""
    return max(1, chunk.bit_length() - 1)


@triton.jit
def _better(best, left_score, right_score, left_exists, right_exists):
    """The best probes so far, and where the left half stays (ties: right)."""
    left_score = tl.where(left_exists, left_score, float("-inf"))
    right_score = tl.where(right_exists, right_score, float("-inf"))
    best = tl.maximum(best, left_score, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(best, right_score, propagate_nan=tl.PropagateNan.ALL), left_score > right_score


@triton.jit(do_not_specialize=PLAIN)
def _descend_one_row(
    q,  # [H, N, ROWS, D]
    keys,
    lists,
    angles,
    scores,  # [K, N, C] fp32
    list_stride,
    block_stride,
    count_stride,
    N,
    C,
    T,
    trained_tok,
    scan_window_tok,
    first_tok,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_AXIS: tl.constexpr,
):
    n, kv, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rank = tile * TILE + tl.arange(0, TILE)
    sizes = Sizes(list_stride, block_stride, count_stride, N, C, T, trained_tok, scan_window_tok, first_tok)
    scores += (kv * N + n).to(tl.int64) * C
    count = _count(lists, sizes, kv, n)
    if tile * TILE >= count:
        tl.store(scores + rank, tl.full([TILE], float("-inf"), tl.float32), mask=rank < C)
        return
    low, size, present = _chunks(_list(lists, sizes, kv, n), rank, count, _limit(lists, sizes, n), CHUNK)
    first, last = _block(angles, n, MODE)
    k = keys.k + kv.to(tl.int64) * keys.head

    # Tiles are [heads, chunks, dimensions], or with ``HEAD_AXIS`` 1 [chunks, heads, dimensions].
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    head = tl.minimum(tl.arange(0, HEADS), GROUP - 1)  # padding repeats the last one
    row = tl.expand_dims((kv * GROUP + head) * N + n, 1 - HEAD_AXIS)[:, :, None]
    at = _query_position(angles, sizes, n, 0, count, 1, MODE)
    r1, r2, r3 = _query(q, row, angles, at, MODE, HALF, REST, 1)
    l1, l2, l3 = r1, r2, r3
    if MODE == "relative":
        l1, l2, l3 = _query(q, row, angles, at + 1, MODE, HALF, REST, 1)

    rank, present = tl.expand_dims(rank, HEAD_AXIS), tl.expand_dims(present, HEAD_AXIS)
    best = tl.full([TILE, HEADS] if HEAD_AXIS else [HEADS, TILE], float("-inf"), tl.float32)
    low = tl.broadcast_to(tl.expand_dims(low, HEAD_AXIS), best.shape)
    size = tl.broadcast_to(tl.expand_dims(size, HEAD_AXIS), best.shape)
    for depth in range(_depth(CHUNK)):
        half = size // 2
        left, right = low + half // 2, low + half + (size - half) // 2
        left_exists = present & (size > 1)
        right_exists = present & ((size > 1) | (depth == 0))  # a chunk of one token is probed once, as a right half
        # Both are on their way before either is waited for.
        a1, a2, a3 = _keys(k, left[:, :, None], keys.tok, HALF, REST, 1)
        b1, b2, b3 = _keys(k, right[:, :, None], keys.tok, HALF, REST, 1)
        at_left = _key_position(left, rank, count, first, last, trained_tok, MODE)
        a1, a2 = _turned_keys(a1, a2, angles, at_left[:, :, None], MODE, HALF, 1)
        at_right = _key_position(right, rank, count, first, last, trained_tok, MODE)
        b1, b2 = _turned_keys(b1, b2, angles, at_right[:, :, None], MODE, HALF, 1)
        left_score, right_score = tl.sum(l1 * a1 + l2 * a2, 2), tl.sum(r1 * b1 + r2 * b2, 2)
        if REST:
            left_score += tl.sum(l3 * a3, 2)
            right_score += tl.sum(r3 * b3, 2)
        best, go_left = _better(best, left_score, right_score, left_exists, right_exists)
        low, size = tl.where(go_left, low, low + half), tl.where(go_left, half, size - half)
    rank = tile * TILE + tl.arange(0, TILE)
    tl.store(scores + rank, _max(best, HEAD_AXIS), mask=rank < C)


@triton.jit(do_not_specialize=PLAIN)
def _descend_rows(
    q,  # [H, N, ROWS, D]
    keys,
    lists,
    angles,
    scores,  # [K, N, C] fp32
    list_stride,
    block_stride,
    count_stride,
    N,
    C,
    T,
    trained_tok,
    scan_window_tok,
    first_tok,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    n, kv, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rank = tile * TILE + tl.arange(0, TILE)
    sizes = Sizes(list_stride, block_stride, count_stride, N, C, T, trained_tok, scan_window_tok, first_tok)
    scores += (kv * N + n).to(tl.int64) * C
    count = _count(lists, sizes, kv, n)
    if tile * TILE >= count:
        tl.store(scores + rank, tl.full([TILE], float("-inf"), tl.float32), mask=rank < C)
        return
    start, length, present = _chunks(_list(lists, sizes, kv, n), rank, count, _limit(lists, sizes, n), CHUNK)
    first, last = _block(angles, n, MODE)
    k = keys.k + kv.to(tl.int64) * keys.head

    COLUMNS: tl.constexpr = max(16, triton.next_power_of_2(ROWS))
    r = tl.minimum(tl.arange(0, COLUMNS), ROWS - 1)  # padding repeats the last one
    at = _query_position(angles, sizes, n, r, count, ROWS, MODE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    for head in range(GROUP):
        row = (((kv * GROUP + head) * N + n) * ROWS + r)[:, None]
        r1, r2, r3 = _query_in(k.dtype.element_ty, q, row, angles, at, MODE, HALF, REST, 16)
        l1, l2, l3 = r1, r2, r3
        if MODE == "relative":
            tl.debug_barrier()  # or ptxas turns both copies at once, and spills
            l1, l2, l3 = _query_in(k.dtype.element_ty, q, row, angles, at + 1, MODE, HALF, REST, 16)
        low, size = start, length
        width = length  # the same number, but in the layout of the pointers, where ``size`` is in that of the products
        for depth in range(_depth(CHUNK)):
            half = width // 2
            left, right = low + half // 2, low + half + (width - half) // 2
            a1, a2, a3 = _keys(k, left[:, None], keys.tok, HALF, REST, 16)
            if MODE == "none" or MODE == "relative" or MODE == "infllm":
                # Both are on their way before either is waited for.
                b1, b2, b3 = _keys(k, right[:, None], keys.tok, HALF, REST, 16)
                left_score = _best_product(a1, a2, a3, l1, l2, l3, REST)
            else:
                # One after the other: angles take registers too.
                at_left = _key_position(left, rank, count, first, last, trained_tok, MODE)
                a1, a2 = _turned_keys(a1, a2, angles, at_left[:, None], MODE, HALF, 16)
                left_score = _best_product(a1, a2, a3, l1, l2, l3, REST)
                b1, b2, b3 = _keys(k, right[:, None], keys.tok, HALF, REST, 16)
                at_right = _key_position(right, rank, count, first, last, trained_tok, MODE)
                b1, b2 = _turned_keys(b1, b2, angles, at_right[:, None], MODE, HALF, 16)
            right_score = _best_product(b1, b2, b3, r1, r2, r3, REST)
            best, go_left = _better(best, left_score, right_score, present & (size > 1), present & ((size > 1) | (depth == 0)))
            size = tl.where(go_left, size // 2, size - size // 2)
            # A gather changes the layout once; left to itself, Triton changes that of every pointer, with a barrier before each load.
            went_left = tl.gather(go_left.to(tl.int32), tl.arange(0, TILE), 0) == 1
            low, width = tl.where(went_left, low, low + half), tl.where(went_left, half, width - half)
    tl.store(scores + rank, best, mask=rank < C)
