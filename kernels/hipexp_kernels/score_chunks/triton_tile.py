"""What the kernels of chunk scores are made of: a call's arguments, chunks, positions, angles, rows.

Dimensions are held as the first halves of the rotated pairs, their second halves, and the rest, each padded to a power of two.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

RAW_KEYS = ("none", "relative", "infllm")  # modes that leave keys as they are


class Keys(NamedTuple):
    """Keys ``[K, T, D]``, or landmarks ``[K, pieces * 2, D]``, and their strides; the last is 1."""

    k: object
    head: object
    tok: object


class Lists(NamedTuple):
    """Candidates: ``starts`` ``[S or 1, N or 1, C]``, ``counts`` ``[S, N]``, ``limits`` ``[N]``."""

    starts: object
    counts: object
    limits: object


class Sizes(NamedTuple):
    """Lengths of dimensions, strides of the lists (0 where one serves all heads, or all blocks), what positions depend on, and the first
    token that has landmarks."""

    list_stride: object
    block_stride: object
    count_stride: object
    N: object
    C: object
    T: object
    trained_tok: object
    scan_window_tok: object
    first_tok: object


class Angles(NamedTuple):
    """cos and sin ``[rows, HALF]`` in fp32; ``position`` ``[N, ROWS]`` of the queries, ``first`` and ``last`` ``[N]`` of their blocks."""

    cos: object
    sin: object
    position: object
    first: object
    last: object


# Of the integers only the strides of the keys say something about alignment; the others would only bring more variants of a kernel.
PLAIN = list(Sizes._fields)


# -- which chunks ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _count(lists, sizes, kv, n):
    """How many candidates block ``n`` has in the list of a key/value head."""
    return tl.load(lists.counts + kv * sizes.count_stride + n)


@triton.jit
def _list(lists, sizes, kv, n):
    """Where its starts are."""
    return lists.starts + kv.to(tl.int64) * sizes.list_stride + n.to(tl.int64) * sizes.block_stride


@triton.jit
def _limit(lists, sizes, n):
    """Tokens before this one can be candidates of block ``n``."""
    return tl.minimum(tl.load(lists.limits + n), sizes.T)


@triton.jit
def _chunks(starts, rank, count, limit, CHUNK: tl.constexpr):
    """First token and number of tokens, below ``limit``, of the chunks at ``rank``, and which of them there are.

    The others get token 0, to be read and forgotten: ptxas spreads loads that have a condition, so that each is waited for.
    """
    start = tl.load(starts + rank, mask=rank < count, other=0)
    present = (rank < count) & (start < limit)
    size = tl.where(present, tl.minimum(limit - start, CHUNK), 1)
    return tl.where(present, start, 0).to(tl.int32), size.to(tl.int32), present


# -- where they stand --------------------------------------------------------------------------------------------------------------


@triton.jit
def _block(angles, n, MODE: tl.constexpr):
    """First and last position of the query block, where the positions of keys depend on them."""
    if MODE == "dynamic" or MODE == "self_extend":
        first, last = tl.load(angles.first + n).to(tl.int32), tl.load(angles.last + n).to(tl.int32)
    else:
        first, last = 0, 0
    return first, last


@triton.jit
def _query_position(angles, sizes, n, r, count, ROWS: tl.constexpr, MODE: tl.constexpr):
    """Table rows of the query rows ``r`` of block ``n`` for the right probe; for the left one it is one more if keys stay raw."""
    if MODE == "none" or MODE == "relative" or MODE == "infllm":
        at = r * 0 + sizes.scan_window_tok
    else:
        at = tl.load(angles.position + n * ROWS + r)
        if MODE == "rank":
            at = tl.minimum(at, count + sizes.scan_window_tok)
    return at


@triton.jit
def _key_position(token, rank, count, first, last, trained_tok, MODE: tl.constexpr):
    """Table rows of the keys ``token`` of the chunks ``rank`` of a list (:meth:`hipexp_kernels.rope.ScoreRotation.keys`)."""
    if MODE == "rank":
        at = token * 0 + tl.minimum(rank, count - 1)  # the table may have no more rows
    elif MODE == "dynamic":
        window = trained_tok // 4
        end = tl.maximum(first - window, 1)
        squeezed = tl.maximum(end - _quotient((end - token).to(tl.int64) * (trained_tok - window), end), last - trained_tok)
        keep = (last < trained_tok) | (token >= last - window) | (token >= end) | (end <= trained_tok - window)
        at = tl.maximum(tl.where(keep, token, squeezed), 0)
    elif MODE == "self_extend":
        near = tl.minimum(trained_tok // 2, 8192)
        grouped = ((token - first) >> 4) + first
        at = tl.maximum(tl.where((token > first - near) | (last < trained_tok), token, grouped), 0)
    else:
        at = token
    return at


@triton.jit
def _quotient(a, b):
    """``a // b`` (int32) of int64 ``a`` >= 0 and int32 ``b`` > 0, without the long division that GPUs lack."""
    b64, inverse = b.to(tl.int64), 1.0 / b.to(tl.float32)
    q = (a.to(tl.float32) * inverse).to(tl.int64)
    q += ((a - q * b64).to(tl.float32) * inverse).to(tl.int64)
    rest = a - q * b64
    return (q + (rest >= b64).to(tl.int64) - (rest < 0).to(tl.int64)).to(tl.int32)


# -- rows of queries and keys ------------------------------------------------------------------------------------------------------


@triton.jit
def _load(ptr, at, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr):
    """First halves, second halves and rest of the rows that begin at ``at`` ``[..., 1]``, 0 in padding; ``MIN``: least width of a tile."""
    first, second = _columns(ptr + at, HALF, MIN), _columns(ptr + at + HALF, HALF, MIN)
    if REST:
        rest = _columns(ptr + at + 2 * HALF, REST, MIN)
    else:
        rest = first  # never used
    return first, second, rest


@triton.jit
def _columns(ptr, N: tl.constexpr, MIN: tl.constexpr):
    """``N`` numbers from each of the pointers ``[..., 1]`` on."""
    WIDTH: tl.constexpr = max(MIN, triton.next_power_of_2(N))
    t = tl.arange(0, WIDTH)
    if N == WIDTH:
        x = tl.load(ptr + t)
    else:
        x = tl.load(ptr + t, mask=t < N, other=0.0)
    return x


@triton.jit
def _turned(first, second, angles, at, factor, HALF: tl.constexpr, MIN: tl.constexpr):
    """Both halves in fp32, rotated to the table rows ``at`` ``[..., 1]`` and multiplied by ``factor``."""
    at = at.to(tl.int64) * HALF
    cos, sin = _columns(angles.cos + at, HALF, MIN) * factor, _columns(angles.sin + at, HALF, MIN) * factor
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _query(q, row, angles, at, MODE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr):
    """Queries ``row`` ``[..., 1]`` in fp32, rotated to the table rows ``at``; before raw keys they carry the keys' attention factor too."""
    first, second, rest = _load(q, row.to(tl.int64) * (2 * HALF + REST), HALF, REST, MIN)
    first, second, rest = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
    if MODE != "none":
        factor = 1.0
        if MODE == "relative" or MODE == "infllm":
            factor = tl.load(angles.cos)  # cos of position 0
        first, second = _turned(first, second, angles, at, factor, HALF, MIN)
    return first, second, rest


@triton.jit
def _query_in(dtype: tl.constexpr, q, row, angles, at, MODE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr):
    """The same for rows with positions ``at`` of the same number, rounded to ``dtype``."""
    first, second, rest = _query(q, row, angles, at[:, None], MODE, HALF, REST, MIN)
    return first.to(dtype), second.to(dtype), rest.to(dtype)


@triton.jit
def _keys(k, token, stride, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr):
    """Raw keys ``token`` ``[..., 1]``."""
    return _load(k, token.to(tl.int64) * stride, HALF, REST, MIN)


@triton.jit
def _turned_keys(first, second, angles, at, MODE: tl.constexpr, HALF: tl.constexpr, MIN: tl.constexpr):
    """Keys at the table rows ``at`` ``[..., 1]``, in fp32; as they are if the strategy leaves keys raw."""
    if MODE == "rank" or MODE == "native" or MODE == "dynamic" or MODE == "self_extend":
        first, second = _turned(first, second, angles, at, 1.0, HALF, MIN)
    return first, second


# -- scores --------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _best_product(k1, k2, k3, q1, q2, q3, REST: tl.constexpr):
    """Best product of every key over the query rows, in the dtype of the queries."""
    product = tl.dot(k1.to(q1.dtype), tl.trans(q1), input_precision="ieee")
    product = tl.dot(k2.to(q1.dtype), tl.trans(q2), product, input_precision="ieee")
    if REST:
        product = tl.dot(k3.to(q1.dtype), tl.trans(q3), product, input_precision="ieee")
    return tl.max(product, 1)


@triton.jit
def _max(x, axis: tl.constexpr):
    """The maximum, NaN if there is one."""
    is_nan = tl.max((x != x).to(tl.int32), axis)
    return tl.where(is_nan == 1, float("nan"), tl.max(tl.where(x == x, x, float("-inf")), axis))
