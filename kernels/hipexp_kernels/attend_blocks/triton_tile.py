"""What the kernels of attention are made of: a call's arguments, positions, angles, rows, softmax, the merge of splits."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from hipexp_kernels.triton_paged import _values

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Queries(NamedTuple):
    """``[H, N, Q, D]`` and its strides; the last is 1."""

    q: object
    head: object
    block: object
    row: object


class Keys(NamedTuple):
    """Keys and values ``[K, T, D]`` and their strides; the last is 1. Or pages of keys, and the newest values."""

    k: object
    v: object
    k_head: object
    k_tok: object
    v_head: object
    v_tok: object


class Lists(NamedTuple):
    """``blocks`` ``[S, N, M]``, ``counts`` ``[S, N]``, ``first`` and ``exact`` ``[N]``, contiguous."""

    blocks: object
    counts: object
    first: object
    exact: object


class Angles(NamedTuple):
    """cos and sin ``[rows, HALF]``, contiguous."""

    cos: object
    sin: object


class Sizes(NamedTuple):
    """Lengths of dimensions; ``per_head`` is 1 if every key/value head has its own list, else 0."""

    K: object
    N: object
    T: object
    M: object
    per_head: object
    angles: object


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


@triton.constexpr_function
def padded(n):
    """A width ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(n))


# -- which keys --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _span(lists, sizes, n, list_at, SINK: tl.constexpr, WINDOW: tl.constexpr, BLOCK_TOK: tl.constexpr, LIST_TILE: tl.constexpr):
    first = tl.load(lists.first + n).to(tl.int32)
    exact = tl.load(lists.exact + n).to(tl.int32)
    near = tl.maximum(first - (WINDOW - 1), 0) * (1 - exact)
    count = tl.load(lists.counts + list_at).to(tl.int32)
    n_selected = tl.zeros([LIST_TILE], tl.int32)
    for begin in range(0, sizes.M, LIST_TILE):
        slot = begin + tl.arange(0, LIST_TILE)
        start = tl.load(lists.blocks + list_at * sizes.M + slot, mask=slot < sizes.M, other=0).to(tl.int32)
        # blocks ascend, so those that reach past near are the last ones: their number says where the list is cut
        n_selected += tl.where(slot < count, tl.minimum(tl.maximum(near - start, 0), BLOCK_TOK), 0)
    n_sink = tl.minimum(near, SINK)
    return Span(first, near, n_sink, n_sink + tl.sum(n_selected), exact)


@triton.jit
def _tokens(j, span, lists, sizes, list_at, BLOCK_TOK: tl.constexpr):
    """Token at each packed index."""
    slot = j - span.n_sink
    selected = (slot >= 0) & (j < span.n_far)
    start = tl.load(lists.blocks + list_at * sizes.M + slot // BLOCK_TOK, mask=selected, other=0).to(tl.int32)
    return tl.where(selected, start + slot % BLOCK_TOK, tl.where(slot < 0, j, span.near + j - span.n_far))


@triton.jit
def _keys_values(kv, UNIT: tl.constexpr):
    """Both by themselves, as :func:`hipexp_kernels.triton_paged._row` takes them."""
    if UNIT > 0:
        return kv.k, _values(kv.k, kv.v)
    else:
        return kv.k, kv.v


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
def _angle(angles, sizes, row, HALF: tl.constexpr):
    """cos and sin ``[n, padded(HALF)]`` of table rows ``[n]``. Rows of keys and queries nobody asks for may lie past the table."""
    d = tl.arange(0, padded(HALF))
    at = tl.minimum(row, sizes.angles - 1)[:, None] * HALF + d
    mask = (d < HALF)[None, :]
    return tl.load(angles.cos + at, mask=mask, other=1.0), tl.load(angles.sin + at, mask=mask, other=0.0)


@triton.jit
def _shifted(angles, sizes, begin, local, HALF: tl.constexpr):
    """Angles of rows ``begin`` on from those of rows 0 on (``local``): one row is read. Row 0 is the attention factor, at angle 0."""
    one, _ = _angle(angles, sizes, tl.zeros([1], tl.int32), HALF)
    cos, sin = _angle(angles, sizes, tl.zeros([1], tl.int32) + begin, HALF)
    cos, sin = cos / one, sin / one
    return cos * local[0] - sin * local[1], sin * local[0] + cos * local[1]


@triton.jit
def _key_angle(
    angles, sizes, local, begin, token, span, MODE: tl.constexpr, Q: tl.constexpr, WINDOW: tl.constexpr, TRAINED: tl.constexpr,
    KEYS: tl.constexpr, SHIFT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Angles of the keys with packed indices ``begin`` on, as :meth:`hipexp_kernels.rope.AttendRotation.keys`.

    ``SHIFT`` (of ``streaming``): they come from ``local``, the first rows of the table. With a single query both it and the keys
    are turned back by ``begin`` rows instead: only the distance between them matters.
    """
    j = begin + tl.arange(0, KEYS)
    if MODE == "streaming":
        if not SHIFT:
            return _angle(angles, sizes, j, HALF)
        elif Q == 1:
            return local
        else:
            return _shifted(angles, sizes, begin, local, HALF)
    elif MODE == "infllm":
        return _angle(angles, sizes, tl.maximum(j - span.n_far + 1 - span.exact, 0), HALF)
    elif MODE == "native":
        return _angle(angles, sizes, token, HALF)
    else:
        far = j < span.n_far
        packed = tl.where(far, tl.maximum(j + span.first - WINDOW + 1 - span.n_far, 0), token)
        near_cos, near_sin = _angle(angles, sizes, packed, HALF)
        far_cos, far_sin = _angle(angles, sizes, tl.where(far, _squeezed(token, span, Q, TRAINED), token), HALF)
        return 0.75 * near_cos + 0.25 * far_cos, 0.75 * near_sin + 0.25 * far_sin


@triton.jit
def _query_angle(angles, sizes, begin, r, span, MODE: tl.constexpr, HALF: tl.constexpr):
    """As :meth:`hipexp_kernels.rope.AttendRotation.query`; short windows included, a query's row is that of its own key.

    ``begin``: by how many rows it is turned back, with its keys (``streaming`` only).
    """
    own = r + span.n_far + span.first - span.near
    if MODE == "streaming":
        return _angle(angles, sizes, own - begin, HALF)
    elif MODE == "infllm":
        return _angle(angles, sizes, own - span.n_far + 1 - span.exact, HALF)
    else:
        return _angle(angles, sizes, r + span.first, HALF)


# -- rows in up to three pieces: the two rotated halves, and what is not rotated -----------------------------------------------------


@triton.jit
def _piece(base, offset, inside, BEGIN: tl.constexpr, SIZE: tl.constexpr):
    """Columns ``BEGIN .. BEGIN + SIZE`` of the rows at ``offset``, padded with zeros."""
    d = tl.arange(0, padded(SIZE))
    mask = inside[:, None] if SIZE == padded(SIZE) else inside[:, None] & (d < SIZE)[None, :]
    return tl.load(base + offset[:, None] + (BEGIN + d)[None, :], mask=mask, other=0.0)


@triton.jit
def _pieces(base, offset, inside, D: tl.constexpr, HALF: tl.constexpr):
    one, two, rest = 0, 0, 0
    if HALF > 0:
        one = _piece(base, offset, inside, 0, HALF)
        two = _piece(base, offset, inside, HALF, HALF)
    if D > 2 * HALF:
        rest = _piece(base, offset, inside, 2 * HALF, D - 2 * HALF)
    return one, two, rest


@triton.jit
def _turned(pieces, angle):
    """Pieces, the halves rotated by cos and sin (rows of them, or one for all)."""
    one, two, rest = pieces
    cos, sin = angle
    x, y = one.to(tl.float32), two.to(tl.float32)
    return (x * cos - y * sin).to(one.dtype), (y * cos + x * sin).to(one.dtype), rest


@triton.jit
def _products(q, k, D: tl.constexpr, HALF: tl.constexpr):
    """Dot products ``[rows, keys]`` of queries and keys in pieces."""
    if HALF > 0:
        products = tl.dot(q[0], tl.trans(k[0]), input_precision="ieee")
        products = tl.dot(q[1], tl.trans(k[1]), products, input_precision="ieee")
        if D > 2 * HALF:
            products = tl.dot(q[2], tl.trans(k[2]), products, input_precision="ieee")
    else:
        products = tl.dot(q[2], tl.trans(k[2]), input_precision="ieee")
    return products


# -- softmax -----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _logits(products, scale, SOFTCAP: tl.constexpr):
    """Scaled, and bounded if asked for; in powers of two."""
    if SOFTCAP > 0.0:
        return SOFTCAP * LOG2_E * (2 * tl.sigmoid(products * (2 * scale / SOFTCAP)) - 1)
    else:
        return products * (scale * LOG2_E)


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


@triton.jit
def _store(results, out, lse, row, head, n, N, G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr):
    d, is_row = tl.arange(0, padded(D)), row < G * Q
    at = ((head * G + row // Q).to(tl.int64) * N + n) * Q + row % Q
    mask = is_row[:, None] & (d < D)[None, :]
    tl.store(results.out + at[:, None] * D + d[None, :], out.to(results.out.dtype.element_ty), mask=mask)
    tl.store(results.lse + at, lse * LN_2, mask=is_row)


# -- merging splits ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _store_part(parts, out, lse, row, part, N_ROWS: tl.constexpr, D: tl.constexpr):
    d, at = tl.arange(0, padded(D)), part * N_ROWS + row
    tl.store(parts.out + at[:, None] * D + d[None, :], out, mask=(row < N_ROWS)[:, None] & (d < D)[None, :])
    tl.store(parts.lse + at, lse, mask=row < N_ROWS)


@triton.jit
def _arrive(parts, group, PROGRAMS: tl.constexpr):
    """Whether the other programs of the group have stored their parts. Whoever comes last puts the counter back for the next call."""
    tl.debug_barrier()  # all threads have stored before one of them announces it
    ticket = tl.atomic_add(parts.tickets + group, 1, sem="acq_rel", scope="gpu")
    if ticket == PROGRAMS - 1:
        tl.store(parts.tickets + group, 0)
    return ticket == PROGRAMS - 1


@triton.jit
def _merged(parts, group, SPLITS: tl.constexpr, N_ROWS: tl.constexpr, AT_ONCE: tl.constexpr, D: tl.constexpr):
    """Output ``[rows, padded(D)]`` and log-sum-exp ``[rows]`` over all splits of a group. Past the L1 cache: others wrote them."""
    ROWS: tl.constexpr = triton.next_power_of_2(N_ROWS)
    row, d, s = tl.arange(0, ROWS), tl.arange(0, padded(D)), tl.arange(0, AT_ONCE)
    state = (tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, padded(D)], tl.float32))
    for begin in range(0, SPLITS, AT_ONCE):
        at = (group * SPLITS + begin + s)[:, None] * N_ROWS + row[None, :]
        inside = (begin + s < SPLITS)[:, None] & (row < N_ROWS)[None, :]
        lse = tl.load(parts.lse + at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        wide = inside[:, :, None] & (d < D)[None, None, :]
        out = tl.load(parts.out + at[:, :, None] * D + d[None, None, :], mask=wide, other=0.0, cache_modifier=".cg")
        top, total, acc = state
        new_top = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)  # where all splits so far are empty
        weight, fade = tl.exp2(lse - safe[None, :]), tl.exp2(top - safe)
        state = (new_top, total * fade + tl.sum(weight, 0), acc * fade[:, None] + tl.sum(out * weight[:, :, None], 0))
    return _finish(state)
