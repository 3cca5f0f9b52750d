"""One pass over a packed list of keys (sinks, selected blocks, window), the query heads of a key/value head in one tile.

Few queries: the list is split over programs, and the last of them to finish merges their results. Work follows the number of
keys a block attends to, never ``T``; nothing is read back by the host, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import require, require_triton_can
from hipexp_kernels.rope import AttendRotation

MODES = ("streaming", "infllm", "native", "dynamic")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
N_TICKETS = 65536


class Queries(NamedTuple):
    """``[H, N, Q, D]`` and its strides; the last is 1."""

    q: object
    head: object
    block: object
    row: object


class Keys(NamedTuple):
    """Keys and values ``[K, T, D]``, their strides (the last is 1) and ``T``."""

    k: object
    v: object
    k_head: object
    k_tok: object
    v_head: object
    v_tok: object
    length: object
    n_heads: object


class Lists(NamedTuple):
    """``blocks`` ``[S, N, M]`` and ``counts`` ``[S, N]``, contiguous; ``per_head`` is 1 if every head has its own list, else 0."""

    blocks: object
    counts: object
    first: object
    exact: object
    n_blocks: object
    width: object
    per_head: object


class Angles(NamedTuple):
    """cos and sin ``[rows, HALF]``, contiguous."""

    cos: object
    sin: object
    rows: object


class Results(NamedTuple):
    """``[H, N, Q, D]`` and ``[H, N, Q]``, contiguous."""

    out: object
    lse: object


class Parts(NamedTuple):
    """What each split found, ``[group, SPLITS, G * Q, D]`` and ``[group, SPLITS, G * Q]``, and the tickets ``[group]``."""

    out: object
    lse: object
    tickets: object


class Span(NamedTuple):
    """The packed list of a block: ``n_sink`` sinks, selected tokens up to ``n_far``, then keys from ``near`` on.

    For an exact block it is all keys from 0 on (``near`` and ``n_far`` are 0), which makes every mode native.
    """

    first: object
    near: object
    n_sink: object
    n_far: object
    exact: object


# -- which keys --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _span(lists, n, list_at, SINK: tl.constexpr, WINDOW: tl.constexpr, BLOCK_TOK: tl.constexpr, LIST_TILE: tl.constexpr):
    first = tl.load(lists.first + n).to(tl.int32)
    exact = tl.load(lists.exact + n).to(tl.int32)
    near = tl.maximum(first - (WINDOW - 1), 0) * (1 - exact)
    count = tl.load(lists.counts + list_at).to(tl.int32)
    n_selected = tl.zeros([LIST_TILE], tl.int32)
    for begin in range(0, lists.width, LIST_TILE):
        slot = begin + tl.arange(0, LIST_TILE)
        start = tl.load(lists.blocks + list_at * lists.width + slot, mask=slot < lists.width, other=0).to(tl.int32)
        # blocks ascend, so those that reach past near are the last ones: their number says where the list is cut
        n_selected += tl.where(slot < count, tl.minimum(tl.maximum(near - start, 0), BLOCK_TOK), 0)
    n_sink = tl.minimum(near, SINK)
    return Span(first, near, n_sink, n_sink + tl.sum(n_selected), exact)


@triton.jit
def _tokens(j, span, lists, list_at, BLOCK_TOK: tl.constexpr):
    """Token at each packed index."""
    slot = j - span.n_sink
    selected = (slot >= 0) & (j < span.n_far)
    start = tl.load(lists.blocks + list_at * lists.width + slot // BLOCK_TOK, mask=selected, other=0).to(tl.int32)
    return tl.where(selected, start + slot % BLOCK_TOK, tl.where(slot < 0, j, span.near + j - span.n_far))


# -- where they stand --------------------------------------------------------------------------------------------------------------


@triton.jit
def _squeezed(token, span, Q: tl.constexpr, TRAINED: tl.constexpr):
    """:func:`hipexp_kernels.rope.dynamic_positions`."""
    window: tl.constexpr = TRAINED // 4
    last = span.first + Q - 1
    end = tl.maximum(span.first - window, 1)
    shrunk = end - ((end - token).to(tl.int64) * (TRAINED - window) // end).to(tl.int32)
    keep = (last < TRAINED) | (token >= last - window) | (token >= end) | (end <= TRAINED - window)
    return tl.maximum(tl.where(keep, token, tl.maximum(shrunk, last - TRAINED)), 0)


@triton.jit
def _angle(angles, row, HALF: tl.constexpr, HALF_P: tl.constexpr):
    """cos and sin ``[n, HALF_P]``. Rows nobody attends to may lie past the table."""
    d = tl.arange(0, HALF_P)
    at = tl.minimum(row, angles.rows - 1)[:, None] * HALF + d
    return tl.load(angles.cos + at, mask=(d < HALF)[None, :], other=0.0), tl.load(angles.sin + at, mask=(d < HALF)[None, :], other=0.0)


@triton.jit
def _key_angle(
    angles, j, token, span,
    MODE: tl.constexpr, Q: tl.constexpr, WINDOW: tl.constexpr, TRAINED: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr,
):  # fmt: skip
    """As :meth:`hipexp_kernels.rope.AttendRotation.keys`."""
    if MODE == "streaming":
        return _angle(angles, j, HALF, HALF_P)
    elif MODE == "infllm":
        return _angle(angles, tl.maximum(j - span.n_far + 1 - span.exact, 0), HALF, HALF_P)
    elif MODE == "native":
        return _angle(angles, token, HALF, HALF_P)
    else:
        far = j < span.n_far
        packed = tl.where(far, tl.maximum(j + span.first - WINDOW + 1 - span.n_far, 0), token)
        near_cos, near_sin = _angle(angles, packed, HALF, HALF_P)
        far_cos, far_sin = _angle(angles, tl.where(far, _squeezed(token, span, Q, TRAINED), token), HALF, HALF_P)
        return 0.75 * near_cos + 0.25 * far_cos, 0.75 * near_sin + 0.25 * far_sin


@triton.jit
def _query_angle(angles, r, span, MODE: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr):
    """As :meth:`hipexp_kernels.rope.AttendRotation.query`; short windows included, a query's row is that of its own key."""
    if MODE == "streaming":
        return _angle(angles, r + span.n_far + span.first - span.near, HALF, HALF_P)
    elif MODE == "infllm":
        return _angle(angles, r + span.first - span.near + 1 - span.exact, HALF, HALF_P)
    else:
        return _angle(angles, r + span.first, HALF, HALF_P)


# -- rows in up to three pieces: the two rotated halves, and what is not rotated -----------------------------------------------------


@triton.jit
def _piece(base, offset, inside, BEGIN: tl.constexpr, SIZE: tl.constexpr, SIZE_P: tl.constexpr):
    """Columns ``BEGIN .. BEGIN + SIZE`` of the rows at ``offset``, padded with 0 to ``SIZE_P``."""
    d = tl.arange(0, SIZE_P)
    mask = inside[:, None] if SIZE == SIZE_P else inside[:, None] & (d < SIZE)[None, :]
    return tl.load(base + offset[:, None] + (BEGIN + d)[None, :], mask=mask, other=0.0)


@triton.jit
def _turned(base, offset, inside, cos, sin, HALF: tl.constexpr, HALF_P: tl.constexpr):
    one = _piece(base, offset, inside, 0, HALF, HALF_P)
    two = _piece(base, offset, inside, HALF, HALF, HALF_P)
    x, y = one.to(tl.float32), two.to(tl.float32)
    return (x * cos - y * sin).to(one.dtype), (y * cos + x * sin).to(one.dtype)


# -- softmax -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _bounded(logits, scale, SOFTCAP: tl.constexpr):
    """Scaled logits, in powers of two."""
    if SOFTCAP:
        return SOFTCAP * LOG2_E * (2 * tl.sigmoid(logits * (2 * scale / SOFTCAP)) - 1)
    else:
        return logits * (scale * LOG2_E)


@triton.jit
def _update(state, logits, values):
    """Add keys with ``logits`` ``[rows, keys]`` (powers of two) to the running maximum, sum and output."""
    top, total, acc = state
    new_top = tl.maximum(top, tl.max(logits, 1))
    weight = tl.exp2(logits - new_top[:, None])
    fade = tl.exp2(top - new_top)
    acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return new_top, total * fade + tl.sum(weight, 1), acc


@triton.jit
def _finish(state):
    """Output and log-sum-exp (powers of two); 0 and -inf if there were no keys."""
    top, total, acc = state
    return acc / tl.where(total == 0, 1.0, total)[:, None], top + tl.log2(total)


# -- merging splits ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _arrive(parts, group, SPLITS: tl.constexpr):
    """Whether all other splits of the group have stored their part. Whoever comes last puts the counter back for the next call."""
    tl.debug_barrier()  # all threads have stored before one of them announces it
    ticket = tl.atomic_add(parts.tickets + group, 1, sem="acq_rel", scope="gpu")
    if ticket == SPLITS - 1:
        tl.store(parts.tickets + group, 0)
    return ticket == SPLITS - 1


@triton.jit
def _merged(
    parts, group, SPLITS: tl.constexpr, N_ROWS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr
):
    """Output ``[ROWS, D_P]`` and log-sum-exp ``[ROWS]`` over all splits of a group."""
    row, d, s = tl.arange(0, ROWS), tl.arange(0, D_P), tl.arange(0, AT_ONCE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_P], tl.float32)
    for begin in range(0, SPLITS, AT_ONCE):
        at = (group * SPLITS + begin + s)[:, None] * N_ROWS + row[None, :]
        inside = (begin + s < SPLITS)[:, None] & (row < N_ROWS)[None, :]
        lse = tl.load(parts.lse + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        out = tl.load(
            parts.out + at[:, :, None] * D + d[None, None, :],
            mask=inside[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, fade = tl.exp2(lse - safe[None, :]), tl.exp2(top - safe)
        acc = acc * fade[:, None] + tl.sum(out * weight[:, :, None], 0)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
    return _finish((top, total, acc))


# -- the kernel --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _logits(q_pieces, kv, head, token, inside, cos, sin, scale, HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr,
            SOFTCAP: tl.constexpr):  # fmt: skip
    """Logits ``[rows, keys]`` in powers of two, ``-inf`` where not ``inside``."""
    offset = token.to(tl.int64) * kv.k_tok + head.to(tl.int64) * kv.k_head
    if HALF:
        one, two = _turned(kv.k, offset, inside, cos, sin, HALF, HALF_P)
        logits = tl.dot(q_pieces[0], tl.trans(one), input_precision="ieee")
        logits = tl.dot(q_pieces[1], tl.trans(two), logits, input_precision="ieee")
        if REST:
            rest = _piece(kv.k, offset, inside, 2 * HALF, REST, REST_P)
            logits = tl.dot(q_pieces[2], tl.trans(rest), logits, input_precision="ieee")
    else:
        logits = tl.dot(q_pieces[2], tl.trans(_piece(kv.k, offset, inside, 0, REST, REST_P)), input_precision="ieee")
    return tl.where(inside[None, :], _bounded(logits, scale, SOFTCAP), float("-inf"))


@triton.jit
def _values(kv, head, token, inside, D: tl.constexpr, D_P: tl.constexpr):
    return _piece(kv.v, token.to(tl.int64) * kv.v_tok + head.to(tl.int64) * kv.v_head, inside, 0, D, D_P)


@triton.jit
def _query_pieces(q, offset, inside, angles, r, span, MODE: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr,
                  REST_P: tl.constexpr):  # fmt: skip
    if HALF:
        cos, sin = _query_angle(angles, r, span, MODE, HALF, HALF_P)
        one, two = _turned(q, offset, inside, cos, sin, HALF, HALF_P)
    else:
        one, two = 0, 0
    if REST:
        rest = _piece(q, offset, inside, 2 * HALF, REST, REST_P)
    else:
        rest = 0
    return one, two, rest


@triton.jit
def _attend(
    queries, kv, lists, angles, results, parts, scale,
    G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, MODE: tl.constexpr, TRAINED: tl.constexpr,
    BLOCK_TOK: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D_P: tl.constexpr, HALF_P: tl.constexpr, REST_P: tl.constexpr, LIST_TILE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    N_ROWS: tl.constexpr = G * Q
    TILES: tl.constexpr = (N_ROWS + ROWS - 1) // ROWS
    REST: tl.constexpr = D - 2 * HALF
    tile, rest = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    split, group = rest % SPLITS, rest // SPLITS
    head, n = group % kv.n_heads, group // kv.n_heads
    list_at = head * lists.per_head * lists.n_blocks + n
    span = _span(lists, n, list_at, SINK, WINDOW, BLOCK_TOK, LIST_TILE)

    row = tile * ROWS + tl.arange(0, ROWS)
    g, r, is_row = row // Q, row % Q, row < N_ROWS
    q_at = (head * G + g).to(tl.int64) * queries.head + n.to(tl.int64) * queries.block + r * queries.row
    q_pieces = _query_pieces(queries.q, q_at, is_row, angles, r, span, MODE, HALF, HALF_P, REST, REST_P)

    state = (tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, D_P], tl.float32))
    n_before = span.n_far + span.first - span.near
    n_shared = n_before + 1 if Q == 1 else n_before  # keys that all rows attend to; a single query is one of them
    share = ((n_shared + SPLITS - 1) // SPLITS + 15) // 16 * 16
    end = tl.minimum(n_shared, (split + 1) * share)
    for begin in range(split * share, end, KEYS):
        j = begin + tl.arange(0, KEYS)
        inside = j < end
        token = _tokens(j, span, lists, list_at, BLOCK_TOK)
        cos, sin = 0.0, 0.0
        if HALF:
            cos, sin = _key_angle(angles, j, token, span, MODE, Q, WINDOW, TRAINED, HALF, HALF_P)
        logits = _logits(q_pieces, kv, head, token, inside, cos, sin, scale, HALF, HALF_P, REST, REST_P, SOFTCAP)
        state = _update(state, logits, _values(kv, head, token, inside, D, D_P))

    if Q > 1 and split == SPLITS - 1:
        for begin in range(0, Q, KEYS):
            own = begin + tl.arange(0, KEYS)
            token = span.first + own
            inside = (own < Q) & (token < kv.length)
            cos, sin = 0.0, 0.0
            if HALF:
                cos, sin = _key_angle(angles, n_before + own, token, span, MODE, Q, WINDOW, TRAINED, HALF, HALF_P)
            logits = _logits(q_pieces, kv, head, token, inside, cos, sin, scale, HALF, HALF_P, REST, REST_P, SOFTCAP)
            logits = tl.where(own[None, :] <= r[:, None], logits, float("-inf"))
            state = _update(state, logits, _values(kv, head, token, inside, D, D_P))

    out, lse = _finish(state)
    if SPLITS == 1:
        _store(results, out, lse, row, head, n, lists.n_blocks, G, Q, D, D_P)
    else:
        part = (group * SPLITS + split) * N_ROWS + row
        d = tl.arange(0, D_P)
        tl.store(parts.out + part[:, None] * D + d[None, :], out, mask=is_row[:, None] & (d < D)[None, :])
        tl.store(parts.lse + part, lse, mask=is_row)
        if _arrive(parts, group, SPLITS * TILES):
            out, lse = _merged(parts, group, SPLITS, N_ROWS, MERGE_ROWS, AT_ONCE, D, D_P)
            _store(results, out, lse, tl.arange(0, MERGE_ROWS), head, n, lists.n_blocks, G, Q, D, D_P)


@triton.jit
def _store(results, out, lse, row, head, n, n_blocks, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr):
    g, r, d = row // Q, row % Q, tl.arange(0, D_P)
    at = ((head * G + g).to(tl.int64) * n_blocks + n) * Q + r
    tl.store(
        results.out + at[:, None] * D + d[None, :], out.to(results.out.dtype.element_ty), mask=(row < G * Q)[:, None] & (d < D)[None, :]
    )
    tl.store(results.lse + at, lse * LN_2, mask=row < G * Q)


# -- launching ---------------------------------------------------------------------------------------------------------------------


def padded(n: int) -> int:
    """A width ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(n))


def launch(G: int, Q: int, D: int, half: int, n_groups: int, max_keys: int, n_programs: int, element_bytes: int) -> tuple[dict, dict]:
    """Tile sizes (constexprs) and compiler options for a call.

    ``n_groups``: query blocks times key/value heads; ``max_keys``: what a block attends to at most, exact blocks left aside;
    ``n_programs``: how many programs should run at once.
    """
    n_rows = G * Q
    wide = element_bytes == 4 or D > 128
    rows = min(padded(n_rows), 64 if wide else 128)
    keys = 32 if wide else 64
    tiles = triton.cdiv(n_rows, rows)
    splits = max(1, min(n_programs // (n_groups * tiles), triton.cdiv(max_keys, keys)))
    merge_rows = triton.next_power_of_2(n_rows)
    if merge_rows > 64:  # the merging program holds all rows
        splits = 1
    d_padded = padded(D)
    tile = dict(
        D_P=d_padded, HALF_P=padded(half), REST_P=padded(D - 2 * half), ROWS=rows, KEYS=keys, SPLITS=splits, MERGE_ROWS=merge_rows,
        AT_ONCE=max(1, min(triton.next_power_of_2(splits), 8192 // (merge_rows * d_padded))),
    )  # fmt: skip
    return tile, dict(num_warps=8 if rows > 64 else 4, num_stages=3 if not wide else 2)


@cache
def tickets(device: torch.device) -> Tensor:
    """Counters that are 0 between calls. Calls on one device must not overlap: run them on one stream."""
    return torch.zeros(N_TICKETS, dtype=torch.int32, device=device)


@cache
def n_programs(device: torch.device) -> int:
    """One and a half programs for each multiprocessor."""
    return 3 * torch.cuda.get_device_properties(device).multi_processor_count // 2 if device.type == "cuda" else 8


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, *,
    block_tok: int, sink_tok: int, window_tok: int, scale: float, rotation: AttendRotation | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    require_triton_can("attend_blocks", q)
    mode = rotation.mode if rotation else "none"
    require(mode in (*MODES, "none"), f"attention rotation {mode!r} is unknown; use {', '.join(MODES)}")
    H, N, Q, D = q.shape
    K, T, _ = k.shape
    S, _, M = blocks.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    blocks, counts, first, exact = (x.contiguous() for x in (blocks, counts, first, exact))
    cos, sin = (rotation.table.cos, rotation.table.sin) if rotation else (first, first)
    half = cos.shape[1] if rotation else 0
    tile, options = launch(H // K, Q, D, half, N * K, sink_tok + M * block_tok + window_tok, n_programs(q.device), q.element_size())
    splits = tile["SPLITS"]
    out, lse = torch.empty((H, N, Q, D), dtype=q.dtype, device=q.device), torch.empty((H, N, Q), device=q.device)
    parts = Parts(out, lse, lse)
    if splits > 1:
        n_parts = N * H * Q * splits
        parts = Parts(torch.empty(n_parts * D, device=q.device), torch.empty(n_parts, device=q.device), tickets(q.device))
    tiles = triton.cdiv(H // K * Q, tile["ROWS"])
    _attend[(N * K * splits * tiles,)](
        Queries(q, q.stride(0), q.stride(1), q.stride(2)),
        Keys(k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1), T, K),
        Lists(blocks, counts, first, exact, N, M, int(S > 1)),
        Angles(cos.contiguous(), sin.contiguous(), cos.shape[0]),
        Results(out, lse),
        parts,
        scale,
        G=H // K, Q=Q, D=D, HALF=half, MODE=mode, TRAINED=rotation.trained_tok if rotation else 0,
        BLOCK_TOK=block_tok, SINK=sink_tok, WINDOW=window_tok, SOFTCAP=softcap or 0.0,
        LIST_TILE=min(512, padded(M)),
        **tile,
        **options,
    )  # fmt: skip
    return out, lse
