"""Rows of keys and values that Triton kernels find through a table."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from hipexp_kernels.dispatch import require
from hipexp_kernels.paged import Places


class Pages(NamedTuple):
    """:class:`hipexp_kernels.paged.Places` as a kernel takes them.

    ``newest``: how far behind the first slot the newest tokens begin, which are in another allocation, and ``newest_head`` from one head to
    the next, in numbers of the format of ``slots``; ``begin``: the first of these tokens. ``slot`` and ``slot_head``: from one slot, and
    within it from one head, to the next, in rows. A unit's number is ``unit * per_unit + head * per_head + which``.
    """

    slots: object
    table: object
    newest: object
    newest_head: object
    begin: object
    slot: object
    slot_head: object
    per_unit: object
    per_head: object
    which: object
    n_sinks: object
    sinks: object


@triton.jit
def _row(x, stride, token, head, UNIT: tl.constexpr, D: tl.constexpr):
    """Where the row of each ``token`` of a head begins, behind :func:`_base`. ``UNIT``: tokens of a unit, 0 for what is not paged.

    Any token may be asked for; one that is not there gets some row.
    """
    if UNIT > 0:
        far = tl.minimum(tl.maximum(token, 0), x.begin - 1)
        number = far // UNIT * x.per_unit + (head * x.per_head + x.which)
        listed = tl.load(x.table + tl.maximum(number - x.n_sinks, 0))
        slot = tl.where(number < x.n_sinks, number + x.sinks, tl.maximum(listed, 0))
        near = token >= x.begin
        row = tl.where(near, token - x.begin, slot * x.slot + (far % UNIT + head * x.slot_head))
        return tl.where(near, x.newest + head.to(tl.int64) * x.newest_head, 0) + row.to(tl.int64) * D
    else:
        return token.to(tl.int64) * stride


@triton.jit
def _base(x, stride, head, UNIT: tl.constexpr):
    """What the offsets of a head's rows are counted from."""
    if UNIT > 0:
        return x.slots
    else:
        return x + head.to(tl.int64) * stride


@triton.jit
def _values(x, newest):
    """Pages of values beside those of keys: their newest tokens are somewhere else."""
    return Pages(
        x.slots, x.table, newest, x.newest_head, x.begin, x.slot, x.slot_head, x.per_unit, x.per_head, x.which + 1, x.n_sinks, x.sinks
    )


def pages_of(places: Places) -> Pages:
    """The argument of a kernel. Raises ValueError for memory that is not as :class:`Places` says."""
    slots, newest, lists = places.slots, places.newest, places.lists
    n, in_list, unit_tok, D = slots.shape
    apart, rest = divmod(newest.data_ptr() - slots.data_ptr(), slots.element_size())
    require(
        slots.is_contiguous() and newest.stride()[1:] == (D, 1) and newest.dtype == slots.dtype and rest == 0 and places.begin > 0,
        f"paged keys lie in slots {tuple(slots.shape)} and newest rows {tuple(newest.shape)}, which must be contiguous and of one format",
    )
    require(n * in_list * unit_tok < 2**31, f"slots {tuple(slots.shape)} have 2**31 rows or more; make the pool smaller")
    return Pages(
        slots, places.table, apart, newest.stride(0), places.begin, in_list * unit_tok, unit_tok if lists == 1 else 0,
        2 * lists, 2 if lists > 1 else 0, places.which, places.n_sinks, places.sinks,
    )  # fmt: skip


def pages_types(dtype: str) -> Pages:
    """Their types, for what is compiled ahead of time."""
    return Pages(f"*{dtype}", "*i32", *["i64:16"] * 2, *["i32:16"] * 2, *["i32"] * 2, "i32", "i32", "i32:16", "i32")
