"""The scan reads every key that it probes (``exact``, ``grid``), or every landmark (``bounds``), once for all queries of the group."""

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
    _limit,
    _list,
    _load,
    _max,
    _query_in,
    _query_position,
    _turned_keys,
)
from hipexp_kernels.triton_paged import _base, _row


@triton.jit(do_not_specialize=[*PLAIN, "tiles", "n_from", "chunk_from"])
def _scan(
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
    tiles,
    n_from,
    chunk_from,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    LISTED: tl.constexpr,
    EACH: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    n, kv, begin = tl.program_id(0), tl.program_id(1), tl.program_id(2) * tiles * TILE
    if UNIT > 0:
        n, begin = n + n_from, begin + chunk_from
    sizes = Sizes(list_stride, block_stride, count_stride, N, C, T, trained_tok, scan_window_tok, first_tok)
    scores += (kv * N + n).to(tl.int64) * C
    count = _count(lists, sizes, kv, n).to(tl.int32)
    live = tl.minimum(tl.maximum(count - begin + TILE - 1, 0) // TILE, tiles)  # tiles with chunks
    for i in range(live, tiles):
        rank = begin + i * TILE + tl.arange(0, TILE)
        tl.store(scores + rank, tl.full([TILE], float("-inf"), tl.float32), mask=rank < C)
    if live == 0:
        return
    starts, limit = _list(lists, sizes, kv, n), _limit(lists, sizes, n)
    first, last = _block(angles, n, MODE)
    k, some = _base(keys.k, keys.head, kv, UNIT), keys.k.slots if UNIT > 0 else keys.k
    at_once = tl.arange(0, TILE * TOGETHER)  # every chunk once for each of its keys that are multiplied together

    for column in range(0, GROUP * ROWS, COLUMNS):
        if GROUP * ROWS > COLUMNS:
            tl.debug_barrier()  # scores of the pass before are read again, by other threads
        at_column = tl.minimum(column + tl.arange(0, COLUMNS), GROUP * ROWS - 1)  # padding repeats the last one
        r = at_column % ROWS
        row = (((kv * GROUP + at_column // ROWS) * N + n) * ROWS + r)[:, None]
        at = _query_position(angles, sizes, n, r, count, ROWS, MODE)
        q1, q2, q3 = _query_in(some.dtype.element_ty, q, row, angles, at, MODE, HALF, REST, 16)
        for i in range(live):
            key_rank = begin + i * TILE + at_once // TOGETHER
            start, length, present = _chunks(starts, key_rank, count, limit, CHUNK)
            best = tl.full([TILE * TOGETHER], float("-inf"), tl.float32)
            for offset in range(0, EACH, TOGETHER):
                probe = offset + at_once % TOGETHER
                if STEP:
                    token = start + tl.minimum(STEP // 2 + probe * STEP, length - 1)
                elif LISTED:
                    token = tl.maximum(start - first_tok, 0) // (2 * CHUNK // EACH) * 2 + probe
                else:
                    token = tl.minimum(key_rank, C - 1) * EACH + probe
                k1, k2, k3 = _load(k, _row(keys.k, keys.tok, token[:, None], kv, UNIT, 2 * HALF + REST), HALF, REST, 16)
                at_key = _key_position(token, key_rank, count, first, last, trained_tok, MODE)
                k1, k2 = _turned_keys(k1, k2, angles, at_key[:, None], MODE, HALF, 16)
                best = tl.maximum(best, _best_product(k1, k2, k3, q1, q2, q3, REST), propagate_nan=tl.PropagateNan.ALL)
            score = _max(tl.reshape(tl.where(present, best, float("-inf")), (TILE, TOGETHER)), 1)
            rank = begin + i * TILE + tl.arange(0, TILE)
            if column > 0:
                score = tl.maximum(score, tl.load(scores + rank, mask=rank < C), propagate_nan=tl.PropagateNan.ALL)
            tl.store(scores + rank, score, mask=rank < C)
