"""Which units of keys and values lie in which slots of a device pool: the policies of :mod:`hipexp.cache.policies` on whole lists at once.

Given the same lists in ascending order, those fetch and evict the same units; they are the plain statement of what is here. n below is the
number of units asked for, repetitions included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hipexp.cache.policies import Lfu
from hipexp.config.schema import ConfigError

_UNITS = 2**31  # no unit is as large; larger ones would need a table of more than 8 GiB
_BEYOND = 2**62  # every count, and every time, as there are not 2**30 lists


class Fetched(NamedTuple):
    """What a list of units costs: those that were missing, ascending, and their slots, all int64.

    ``missing`` ``[m]`` and ``slots`` ``[m]``: where each has to be copied; ``hits``: how many different units were there;
    ``evicted`` ``[e]``: those that made room, in no particular order.
    """

    missing: Tensor
    slots: Tensor
    hits: int
    evicted: Tensor


def _fill(x: Tensor, at: Tensor, value: int) -> Tensor:
    """Write ``value`` into ``x`` ``[N]`` at ``at`` ``[n]``; on the CPU in about half the time that ``index_fill_`` takes."""
    return x.scatter_(0, at, torch.full_like(at, value, dtype=x.dtype))


class _Lru:
    """The slots of a pool: what lies in them, and when it was last asked for; the least recent give way first, of one list the smaller.

    ``unit``, ``stamp`` int64 ``[capacity]``; a stamp is ``now``, the number of the list by twos, or 0.
    """

    def __init__(self, capacity: int, device: torch.device | str):
        self.unit = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.stamp = torch.zeros_like(self.unit)
        self.now = 0

    def use(self, slots: Tensor) -> None:
        """A new list begins, and asks for what lies in ``slots`` ``[n]``, repetitions allowed. O(n)."""
        self.now += 2
        _fill(self.stamp, slots, self.now)

    def victims(self, n: int) -> Tensor:
        """The slots of the ``n`` units that give way, none of them asked for by this list, as there are so many. O(capacity)."""
        return self._recency().topk(n, largest=False, sorted=False).indices

    def admit(self, slots: Tensor, units: Tensor) -> None:
        """``units`` of this list move into ``slots``."""
        self.unit.scatter_(0, slots, units)
        _fill(self.stamp, slots, self.now)

    def end(self, n: int) -> None:
        """The list is over; ``n`` different units were in it."""

    def _recency(self) -> Tensor:
        return torch.add(self.unit, self.stamp, alpha=_UNITS)


class _Clock(_Lru):
    """Second chance: a stamp of 0 says that the hand came by since the last use."""

    def __init__(self, capacity: int, device: torch.device | str):
        super().__init__(capacity, device)
        self.hand = 0

    def victims(self, n: int) -> Tensor:
        """As above; looks at some n slots at first, then at twice as many as before, so at few more than the hand passes.

        The hand passes what this list asks for, and what was used since it last came by: amortised O(n).
        """
        found, window = [], 64 + 4 * n
        while n:
            seen = self.stamp[self.hand : self.hand + window]
            unused = (seen == 0).nonzero().flatten()[:n]
            n -= len(unused)
            passed = len(seen) if n else int(unused[-1]) + 1
            seen = seen[:passed]
            seen.mul_(seen == self.now)  # 0, but for what this list asks for
            _fill(seen, unused, self.now)  # not a second time, should the hand come round
            found.append(unused + self.hand)
            self.hand = (self.hand + passed) % len(self.stamp)
            window *= 2
        return torch.cat(found)


class _Lfu(_Lru):
    """The least often used give way first, of those the least recent; counts are halved every ``Lfu.AGE`` times the capacity uses.

    Within a list, what was fetched is more recent than what was there: its stamp is odd.
    """

    def __init__(self, capacity: int, device: torch.device | str):
        super().__init__(capacity, device)
        self.count = torch.zeros_like(self.unit)
        self.uses = 0

    def use(self, slots: Tensor) -> None:
        super().use(slots)
        self.count.scatter_(0, slots, self.count.index_select(0, slots).add_(1))  # once, however often a slot is there

    def victims(self, n: int) -> Tensor:
        count = torch.add(self.count, self.stamp >= self.now, alpha=_BEYOND)  # not what this list asks for
        most = count.topk(n, largest=False, sorted=False).values.max()  # first by counts alone: with times they may not fit in one number
        rank = self._recency().add_((count - most).sign_(), alpha=_BEYOND)
        return rank.topk(n, largest=False, sorted=False).indices

    def admit(self, slots: Tensor, units: Tensor) -> None:
        self.unit.scatter_(0, slots, units)
        _fill(self.stamp, slots, self.now + 1)
        _fill(self.count, slots, 1)

    def end(self, n: int) -> None:
        self.uses += n
        if self.uses >= Lfu.AGE * len(self.count):
            self.count >>= 1
            self.uses = 0


_RULES: dict[str, type[_Lru]] = {"lru": _Lru, "clock": _Clock, "lfu": _Lfu}


class Residency:
    """Which units lie in which slot of a pool of ``capacity`` slots, under a ``policy`` (lru, clock, lfu).

    ``table``: int32, the slot of every unit below its length, or -1. It grows by half at least, and is then another tensor.
    Usable within and outside ``torch.inference_mode()``. Holds 17 bytes a slot, 25 for lfu, and 4 bytes a unit of the table.
    Raises ValueError for a capacity that is not at least 1 and below 2**31, ConfigError for another policy.
    """

    def __init__(self, capacity: int, policy: str, device: torch.device | str = "cpu"):
        if not 1 <= capacity < _UNITS:
            raise ValueError(f"capacity={capacity} must be at least 1 unit and below 2**31")
        if policy not in _RULES:
            raise ConfigError(f"policy {policy!r} cannot rule a pool on a device; use one of {', '.join(_RULES)}")
        self.capacity, self._rule = capacity, _RULES[policy]
        with torch.inference_mode(False):
            self.table = torch.empty(0, dtype=torch.int32, device=device)
            self._none = torch.empty(0, dtype=torch.int64, device=device)
            self._asked = torch.empty(capacity, dtype=torch.bool, device=device)  # slots, of this list
        self.forget()

    def access(self, units: Tensor) -> Fetched:
        """Have all of ``units`` (int64 ``[n]``, any order, repetitions allowed) resident at once; the caller then fills ``slots``.

        O(n), and a count over one byte a slot, if all are there; else a sort of what is missing and what the policy costs: lru and lfu look
        at all slots, clock at a multiple of what its hand passes. Waits for the device, as sizes depend on what is missing.
        Raises ValueError, before anything is changed, for more different units than the capacity, and for units that are not int64 ``[n]``,
        negative, or 2**31 and above.
        """
        self._check(units)
        if not len(units):
            return Fetched(self._none, self._none, 0, self._none)
        slot, missing = self.table.index_select(0, units), self._none
        if slot.min().item() < 0:
            there = slot >= 0
            missing, slot = units.masked_select(~there).unique(), slot.masked_select(there)
        slot = slot.long()
        hits = int(_fill(self._asked.zero_(), slot, True).count_nonzero())
        if hits + len(missing) > self.capacity:
            raise ValueError(
                f"{hits + len(missing)} different units are asked for at once, and capacity={self.capacity}; "
                f"read the list in parts, or make the pool larger"
            )
        self._slots.use(slot)
        slots, evicted = self._admit(missing) if len(missing) else (self._none, self._none)
        self._slots.end(hits + len(missing))
        return Fetched(missing, slots, hits, evicted)

    def know(self, n_units: int) -> None:
        """Make the table as long as ``n_units``."""
        if n_units > len(self.table):
            self._grow(n_units)

    def __len__(self) -> int:
        """How many units are resident."""
        return self._length

    def forget(self) -> None:
        """Everything is gone, and what was learnt about it. O(capacity and table)."""
        self._length = 0
        self.table.fill_(-1)
        with torch.inference_mode(False):
            self._slots = self._rule(self.capacity, self.table.device)

    def _check(self, units: Tensor) -> None:
        """Raises as :meth:`access` says; makes the table long enough."""
        if units.dtype != torch.int64 or units.ndim != 1:
            raise ValueError(f"units are {units.dtype} {list(units.shape)} and must be int64 [n]; convert and flatten them")
        if not len(units):
            return
        low, high = torch.stack(units.aminmax()).tolist()
        if low < 0 or high >= _UNITS:
            raise ValueError(f"unit {low if low < 0 else high} is not in 0 ... 2**31 - 1; ask for units that exist only")
        if high >= len(self.table):
            self._grow(high + 1)

    def _grow(self, n_units: int) -> None:
        known = len(self.table)
        with torch.inference_mode(False):
            table = self.table.new_full((max(n_units, known + known // 2),), -1)
            table[:known] = self.table
        self.table = table

    def _admit(self, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Slots for what is missing, and what was evicted from them. Free ones lie behind the full ones, as only a full pool evicts."""
        full, new = self._length, min(len(missing), self.capacity - self._length)
        slots, evicted = torch.arange(full, full + new, device=missing.device), self._none
        if new < len(missing):
            self._slots.stamp[full:] = self._slots.now  # no victims, as they are taken already
            victims = self._slots.victims(len(missing) - new)
            slots, evicted = torch.cat([slots, victims]), self._slots.unit.index_select(0, victims)
            _fill(self.table, evicted, -1)
        self._slots.admit(slots, missing)
        self.table.scatter_(0, missing, slots.int())
        self._length += new
        return slots, evicted
