"""Rows of keys and values that Triton kernels find through a table."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from hipexp_kernels.dispatch import require
from hipexp_kernels.paged import Places


class Pages(NamedTuple):
    """:class:`hipexp_kernels.paged.Places` as a kernel takes them.

    ``newest_head``: numbers from one head of ``newest`` to the next; ``slot`` and ``slot_head``: rows from one slot, and within it from one
    head, to the next. A unit's number is ``unit * per_unit + head * per_head + which``.
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
    """Where the row of each ``token`` of a head begins: added to :func:`_base`, a pointer. ``UNIT``: tokens of a unit, 0 if not paged.

    Any token may be asked for; one that is not there gets some row.
    """
    if UNIT > 0:
        far = tl.minimum(tl.maximum(token, 0), x.begin - 1)
        number = far // UNIT * x.per_unit + (head * x.per_head + x.which)
        listed = tl.load(x.table + tl.maximum(number - x.n_sinks, 0))
        slot = tl.where(number < x.n_sinks, number + x.sinks, tl.maximum(listed, 0))
        in_slots = slot * x.slot + (far % UNIT + head * x.slot_head)
        in_newest = x.newest + head.to(tl.int64) * x.newest_head + (token - x.begin).to(tl.int64) * D
        return tl.where(token >= x.begin, in_newest, x.slots + in_slots.to(tl.int64) * D)
    else:
        return token.to(tl.int64) * stride


@triton.jit
def _base(x, stride, head, UNIT: tl.constexpr):
    """What the rows of a head are counted from: nothing, if they lie in two places."""
    if UNIT > 0:
        return 0
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
    require(
        slots.is_contiguous() and newest.stride()[1:] == (D, 1) and newest.dtype == slots.dtype and places.begin > 0,
        f"paged keys lie in slots {tuple(slots.shape)} and newest rows {tuple(newest.shape)}, which must be contiguous and of one format",
    )
    require(n * in_list * unit_tok < 2**31, f"slots {tuple(slots.shape)} have 2**31 rows or more; make the pool smaller")
    return Pages(
        slots, places.table, newest, newest.stride(0), places.begin, in_list * unit_tok, unit_tok if lists == 1 else 0,
        2 * lists, 2 if lists > 1 else 0, places.which, places.n_sinks, places.sinks,
    )  # fmt: skip


def pages_types(dtype: str) -> Pages:
    """Their types, for what is compiled ahead of time."""
    numbers = dict.fromkeys(("slot_head", "per_unit", "per_head", "which", "sinks"), "i32") | dict.fromkeys(
        ("begin", "slot", "n_sinks"), "i32:16"
    )
    return Pages(slots=f"*{dtype}", table="*i32", newest=f"*{dtype}", newest_head="i64:16", **numbers)
