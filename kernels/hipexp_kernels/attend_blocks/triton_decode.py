"""A single query per block (decode), built for latency: one tile of keys per program, everything it reads under way at once.

What is attended to at most has a fixed order: sinks, the listed blocks, the window from a full tile on. So which rows of keys and
values a program reads depends on its own entries of the list alone, not on how many keys come before them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hipexp_kernels.attend_blocks.triton_tile import (
    LN_2,
    Sizes,
    Span,
    _angle,
    _arrive,
    _key_angle,
    _keys_values,
    _logits,
    _piece,
    _pieces,
    _products,
    _query_angle,
    _store,
    _store_part,
    _turned,
    _update,
    padded,
)
from hipexp_kernels.triton_paged import _base, _row

# -- which keys --------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Keys that are all sinks, all ``listed`` or all in the window: tokens from ``origin`` on, or those of the blocks of its entries.

    Those below ``bound`` count, and only those of the first ``n_slots`` blocks.
    """

    listed: object
    origin: object
    bound: object
    n_slots: object


@triton.jit
def _entries(begin, lists, sizes, list_at, list_from, window_from, KEYS: tl.constexpr, BLOCK_TOK: tl.constexpr):
    """Start of the block that each key of a tile is listed in; 0 in other tiles."""
    slot = (begin - list_from) // BLOCK_TOK + tl.arange(0, KEYS) // BLOCK_TOK
    listed = (begin >= list_from) & (begin < window_from)
    return tl.load(lists.blocks + list_at * sizes.M + slot, mask=listed & (slot < sizes.M), other=0).to(tl.int32)


@triton.jit
def _tokens(entry, offset, tile, BLOCK_TOK: tl.constexpr):
    """Tokens at an offset within a tile, and whether they are attended to."""
    token = tl.where(tile.listed, entry + offset % BLOCK_TOK, tile.origin + offset)
    return token, (token < tile.bound) & (offset // BLOCK_TOK < tile.n_slots)


@triton.jit
def _span(starts, first, near, count, SINK: tl.constexpr, BLOCK_TOK: tl.constexpr, LIST_TILE: tl.constexpr):
    # blocks ascend, so those that reach past near are the last ones: their number says where the list is cut
    below = tl.minimum(tl.maximum(near - starts.to(tl.int32), 0), BLOCK_TOK)
    n_sink = tl.minimum(near, SINK)
    return Span(first, near, n_sink, n_sink + tl.sum(tl.where(tl.arange(0, LIST_TILE) < count, below, 0)), 0)


# -- a tile of keys ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _here(x):
    """``x``. Triton would move what a product needs to shared memory as soon as it is loaded, waiting for it; this stops it."""
    return tl.where((tl.arange(0, x.shape[0]) >= 0)[:, None], x, 0.0)


@triton.jit
def _on_top(one, two):
    """Rows of ``one``, then those of ``two``, in registers."""
    both = tl.permute(tl.join(one, two), (2, 0, 1))
    return tl.reshape(both, (2 * one.shape[0], one.shape[1]))


@triton.jit
def _beside(one, two):
    """Columns of ``one``, then those of ``two``, in registers: what a product needs goes to shared memory once."""
    both = tl.permute(tl.join(one, two), (0, 2, 1))
    return tl.reshape(both, (one.shape[0], 2 * one.shape[1]))


@triton.jit
def _stacked(keys, PART: tl.constexpr, PIECES: tl.constexpr):
    """A part of the rows of all pieces."""
    if PIECES == 1:
        return keys[0][PART]
    elif PIECES == 2:
        return _on_top(keys[0][PART], keys[1][PART])
    elif PIECES == 4:
        return _on_top(_on_top(keys[0][PART], keys[1][PART]), _on_top(keys[2][PART], keys[3][PART]))
    else:
        one = _on_top(_on_top(keys[0][PART], keys[1][PART]), _on_top(keys[2][PART], keys[3][PART]))
        two = _on_top(_on_top(keys[4][PART], keys[5][PART]), _on_top(keys[6][PART], keys[7][PART]))
        return _on_top(one, two)


@triton.jit
def _rows(
    entries, entries_all, tile, kv, head, D: tl.constexpr, HALF: tl.constexpr, BLOCK_TOK: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows of keys and values, ``PIECE`` at a time, and their tokens."""
    k, v = _keys_values(kv, UNIT)
    k_head, v_head = _base(k, kv.k_head, head, UNIT), _base(v, kv.v_head, head, UNIT)
    keys, tokens = (), ()
    for i in tl.static_range(PIECES):
        token, inside = _tokens(entries[i], i * PIECE + tl.arange(0, PIECE), tile, BLOCK_TOK)
        keys = keys + (_pieces(k_head, _row(k, kv.k_tok, token, head, UNIT, D), inside, D, HALF),)
        tokens = tokens + (tl.where(inside, token, 0),)
    token, inside = _tokens(entries_all, tl.arange(0, PIECES * PIECE), tile, BLOCK_TOK)
    values = _piece(v_head, _row(v, kv.v_tok, token, head, UNIT, D), inside, 0, D)
    return keys, tokens, values


@triton.jit
def _state(
    rows, n_keys, packed, q, angles, sizes, local, step, span, scale, D: tl.constexpr, HALF: tl.constexpr,
    MODE: tl.constexpr, TRAINED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SHIFT: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Maximum ``[rows]``, sum and output ``[rows, D]`` over the first ``n_keys`` (maybe none) of a tile."""
    keys, tokens, values = rows
    if HALF > 0:
        back = tl.minimum(packed, span.n_far + span.first - span.near) if SHIFT else 0
        q = _turned(q, _query_angle(angles, sizes, back, tl.zeros([1], tl.int32), span, MODE, HALF))
    cos, sin = local
    turned = ()
    for i in tl.static_range(PIECES):
        key = keys[i]
        if HALF > 0:
            if not SHIFT:
                at = packed + i * PIECE
                cos, sin = _key_angle(angles, sizes, local, at, tokens[i], span, MODE, 1, WINDOW, TRAINED, PIECE, False, HALF)
            key = _turned(key, (cos, sin))
            if SHIFT:
                cos, sin = cos * step[0] - sin * step[1], sin * step[0] + cos * step[1]
        turned = turned + (key,)
    if HALF > 0:
        # Keys on the left of a wide product fill the tensor cores (wgmma). In this product only: where two of them find their second factor
        # at the same place of shared memory, ptxas 12.8 loses moves of uniform registers, and the second one reads elsewhere.
        both = _beside(_stacked(turned, 0, PIECES), _stacked(turned, 1, PIECES))
        products = tl.dot(both, tl.trans(_beside(q[0], q[1])), input_precision="ieee")
        if D > 2 * HALF:
            products = tl.dot(_here(_stacked(turned, 2, PIECES)), tl.trans(_here(q[2])), products, input_precision="ieee")
    else:
        products = tl.dot(_here(_stacked(turned, 2, PIECES)), tl.trans(q[2]), input_precision="ieee")
    logits = tl.where((tl.arange(0, PIECES * PIECE) < n_keys)[:, None], _logits(products, scale, SOFTCAP), float("-inf"))
    top = tl.max(logits, 0)
    weight = tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top)[None, :])
    out = tl.dot(tl.trans(weight.to(values.dtype)), _here(values), input_precision="ieee")
    return top, tl.sum(weight, 0), out


@triton.jit
def _exact(
    split, first, q, kv, head, angles, sizes, scale, D: tl.constexpr, HALF: tl.constexpr, MODE: tl.constexpr, TRAINED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """As ``_state``, over the keys of an exact block that are this split's: any number."""
    span = Span(first, 0, 0, 0, 1)
    k, v = _keys_values(kv, UNIT)
    k_head, v_head = _base(k, kv.k_head, head, UNIT), _base(v, kv.v_head, head, UNIT)
    if HALF > 0:
        q = _turned(q, _query_angle(angles, sizes, 0, tl.zeros([1], tl.int32), span, MODE, HALF))
    state = (tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, padded(D)], tl.float32))
    for begin in range(split * KEYS, first + 1, SPLITS * KEYS):
        token = begin + tl.arange(0, KEYS)
        values = _piece(v_head, _row(v, kv.v_tok, token, head, UNIT, D), token <= first, 0, D)
        keys = _pieces(k_head, _row(k, kv.k_tok, token, head, UNIT, D), token <= first, D, HALF)
        if HALF > 0:
            keys = _turned(keys, _key_angle(angles, sizes, 0, begin, token, span, MODE, 1, WINDOW, TRAINED, KEYS, False, HALF))
        logits = _logits(_products(q, keys, D, HALF), scale, SOFTCAP)
        state = _update(state, tl.where((token <= first)[None, :], logits, float("-inf")), values)
    return state


# -- merging splits ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _merge(
    parts, group, results, head, n, N, SPLITS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Store what all splits of a group found together, so many columns at a time. Past the L1 cache: others wrote the parts."""
    row, s = tl.arange(0, triton.next_power_of_2(G)), tl.arange(0, triton.next_power_of_2(SPLITS))
    outs, lses = parts.out + group * (SPLITS * G * D), parts.lse + group * (SPLITS * G)
    part = s[None, :] * G + row[:, None]
    inside = (s < SPLITS)[None, :] & (row < G)[:, None]
    at = (head * G + row).to(tl.int64) * N + n
    lse = tl.load(lses + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
    for begin in tl.static_range(0, padded(D), COLUMNS):
        d = begin + tl.arange(0, COLUMNS)
        wide = inside[:, :, None] & (d < D)[None, None, :]
        out = tl.load(outs + part[:, :, None] * D + d[None, None, :], mask=wide, other=0.0, cache_modifier=".cg")
        top = tl.max(lse, 1)
        weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(weight, 1)
        out = tl.sum(out * weight[:, :, None], 1) * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
        mask = (row < G)[:, None] & (d < D)[None, :]
        tl.store(results.out + at[:, None] * D + d[None, :], out.to(results.out.dtype.element_ty), mask=mask)
        if begin == 0:
            tl.store(results.lse + at, (top + tl.log2(total)) * LN_2, mask=row < G)


# -- the kernel --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "T", "M", "n_angles", "n_from"])
def _attend_one(
    queries, kv, lists, angles, results, parts, K, N, T, M, per_head, n_angles, scale, n_from,
    G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, MODE: tl.constexpr, TRAINED: tl.constexpr,
    BLOCK_TOK: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LIST_TILE: tl.constexpr,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = KEYS // PIECE
    LIST_FROM: tl.constexpr = (SINK + KEYS - 1) // KEYS * KEYS
    sizes = Sizes(K, N, T, M, per_head, n_angles)
    split, head, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if UNIT > 0:
        n += n_from
    group = n * sizes.K + head
    list_at = head * sizes.per_head * sizes.N + n
    begin = split * KEYS
    window_from = LIST_FROM + (sizes.M * BLOCK_TOK + KEYS - 1) // KEYS * KEYS

    # none of these loads waits for another
    first, exact = tl.load(lists.first + n).to(tl.int32), tl.load(lists.exact + n).to(tl.int32)
    count = tl.load(lists.counts + list_at).to(tl.int32)
    entries = ()
    for i in tl.static_range(PIECES):
        entries = entries + (_entries(begin + i * PIECE, lists, sizes, list_at, LIST_FROM, window_from, PIECE, BLOCK_TOK),)
    entries_all = _entries(begin, lists, sizes, list_at, LIST_FROM, window_from, KEYS, BLOCK_TOK)
    slot, row = tl.arange(0, LIST_TILE), tl.arange(0, ROWS)
    starts = tl.load(lists.blocks + list_at * sizes.M + slot, mask=slot < sizes.M, other=0)
    q_at = (head * G + row).to(tl.int64) * queries.head + n.to(tl.int64) * queries.block
    q = _pieces(queries.q, q_at, row < G, D, HALF)
    local, step = (0.0, 0.0), (0.0, 0.0)
    if SHIFT:
        local = _angle(angles, sizes, tl.arange(0, PIECE), HALF)
        cos, sin = _angle(angles, sizes, tl.zeros([1], tl.int32) + PIECE, HALF)
        scaled = 1.0 / tl.load(angles.cos)  # the first row is the attention factor, at angle 0
        step = (cos * scaled, sin * scaled)

    if exact:
        state = _exact(
            split, first, q, kv, head, angles, sizes, scale, D, HALF, MODE, TRAINED, WINDOW, SOFTCAP, min(64, KEYS), SPLITS, ROWS, UNIT
        )  # fmt: skip
    else:
        near = tl.maximum(first - (WINDOW - 1), 0)
        listed, windowed = (begin >= LIST_FROM) & (begin < window_from), begin >= window_from
        origin = tl.where(windowed, near + begin - window_from, begin)
        bound = tl.where(windowed, first + 1, tl.where(listed, near, tl.minimum(near, SINK)))
        n_slots = tl.where(listed, count - (begin - LIST_FROM) // BLOCK_TOK, KEYS)
        tile = Tile(listed, origin, bound, n_slots)
        rows = _rows(entries, entries_all, tile, kv, head, D, HALF, BLOCK_TOK, PIECE, PIECES, UNIT)
        span = _span(starts, first, near, count, SINK, BLOCK_TOK, LIST_TILE)
        # which are all that come before the first one that is not attended to
        n_keys = tl.where(windowed, first + 1 - origin, tl.where(listed, span.n_far - span.n_sink + LIST_FROM, span.n_sink) - begin)
        packed = tl.where(windowed, span.n_far + begin - window_from, tl.where(listed, SINK + begin - LIST_FROM, begin))
        state = _state(
            rows, n_keys, packed, q, angles, sizes, local, step, span, scale, D, HALF, MODE, TRAINED, WINDOW, SOFTCAP, SHIFT, PIECE, PIECES
        )

    top, total, out = state
    out, lse = out * (1.0 / tl.where(total == 0, 1.0, total))[:, None], top + tl.log2(total)
    if SPLITS == 1:
        _store(results, out, lse, row, head, n, sizes.N, G, 1, D)
    else:
        _store_part(parts, out, lse, row, group * SPLITS + split, G, D)
        if _arrive(parts, group, SPLITS):
            _merge(parts, group, results, head, n, sizes.N, SPLITS, G, D, COLUMNS)


# -- launching ---------------------------------------------------------------------------------------------------------------------


class Tuning(NamedTuple):
    """``keys`` of a tile, warps, registers of a thread."""

    keys: int
    num_warps: int
    registers: int


DECODE = Tuning(128, 4, 255)
ANGLES = Tuning(64, 4, 255)  # an angle of its own for every key
WIDE = Tuning(64, 8, 255)  # heads of more than 128
FP32 = Tuning(32, 8, 255)
PROGRAMS_PER_SM = 4  # with more, it counts how many keys a program takes and no longer how long it needs for the first
MAX_SPLITS = 64
MERGED = 128  # numbers of the parts that a thread of the merging program holds


def launch(
    G: int, D: int, half: int, mode: str, M: int, block: int, sink: int, window: int, n_groups: int, itemsize: int, n_sm: int
) -> tuple[dict, dict] | None:
    """Tile sizes (constexprs) and compiler options for a call; None if it has too many rows, keys or blocks for this kernel."""
    shift = half > 0 and mode == "streaming"
    tuning = FP32 if itemsize == 4 else WIDE if D > 128 else ANGLES if half > 0 and not shift else DECODE
    keys, num_warps, registers = tuning
    splits = sum(triton.cdiv(n, keys) for n in (sink, M * block, window))
    columns = min(padded(D), MERGED * 32 * num_warps // (triton.next_power_of_2(splits) * triton.next_power_of_2(G)))
    if G > 16 or keys % block or columns == 0 or splits > MAX_SPLITS or splits * n_groups > PROGRAMS_PER_SM * n_sm:
        return None
    # a thread loads 16 bytes of a half; angles of all keys would take too many registers, rows that are not turned need no pieces
    piece = min(keys, max(16, keys // 8, 256 * num_warps // padded(half))) if half else keys
    tile = dict(LIST_TILE=padded(M), SHIFT=shift, ROWS=16, KEYS=keys, PIECE=piece, SPLITS=splits, COLUMNS=columns)
    options = dict(num_warps=num_warps, num_stages=1)
    if not torch.version.hip:
        options["maxnreg"] = registers
    return tile, options
