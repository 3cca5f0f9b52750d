"""Which units of keys and values stay on a device that cannot hold all: replacement policies with one interface.

A unit is any int. What is asked for is a list of units that are needed at once, as attention needs all blocks of a selection: a policy
never evicts what the same list asks for. Sinks and window are always resident and are nobody's business here.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from hipexp.config.schema import ConfigError


class Fetch(NamedTuple):
    """What a list of units costs: those that have to be fetched, in the list's order, and those that make room for them."""

    missing: list[int]
    evicted: list[int]


class Policy(ABC):
    """Holds at most ``capacity`` units. Raises ValueError for a capacity below 1."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1 unit")
        self.capacity = capacity
        self._asked: Collection[int] = ()  # the list of this access

    def access(self, units: Sequence[int]) -> Fetch:
        """Have all of ``units``, which are distinct, resident at once.

        Raises ValueError for more units than the capacity: longer lists are read in parts.
        """
        if len(units) > self.capacity:
            raise ValueError(f"{len(units)} units are asked for at once, and capacity={self.capacity}; read the list in parts")
        self._asked = set(units)
        missing = []
        for unit in units:
            if unit in self:
                self._use(unit)
            else:
                missing.append(unit)
        evicted = [self._evict() for _ in range(len(self) + len(missing) - self.capacity)]
        for unit in missing:
            self._admit(unit)
        return Fetch(missing, evicted)

    @abstractmethod
    def __contains__(self, unit: object) -> bool:
        """Whether a unit is resident."""

    @abstractmethod
    def __len__(self) -> int:
        """How many units are resident."""

    @abstractmethod
    def _use(self, unit: int) -> None:
        """A resident unit is asked for."""

    @abstractmethod
    def _evict(self) -> int:
        """Give up a unit that this access does not ask for."""

    @abstractmethod
    def _admit(self, unit: int) -> None:
        """A unit becomes resident, in free room."""


class Lru(Policy):
    """Evicts what was not used for the longest time; within a list, later is more recent. O(1) an access.

    A larger cache holds everything that a smaller one holds.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._order: OrderedDict[int, None] = OrderedDict()

    def access(self, units: Sequence[int]) -> Fetch:
        fetch = super().access(units)
        for unit in units:  # by place in the list, whichever were missing: else caches of two sizes would order them differently
            self._order.move_to_end(unit)
        return fetch

    def __contains__(self, unit: object) -> bool:
        return unit in self._order

    def __len__(self) -> int:
        return len(self._order)

    def _use(self, unit: int) -> None:
        self._order.move_to_end(unit)

    def _evict(self) -> int:
        return self._order.popitem(last=False)[0]

    def _admit(self, unit: int) -> None:
        self._order[unit] = None


class Clock(Policy):
    """Second chance: a hand goes round the slots and evicts the first unit that was not used since it last came by. Amortised O(1).

    One bit a slot, set by every use, that of the fetch included.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._slots: list[int | None] = [None] * capacity
        self._used = bytearray(capacity)
        self._free = deque(range(capacity))
        self._at: dict[int, int] = {}
        self._hand = 0

    def __contains__(self, unit: object) -> bool:
        return unit in self._at

    def __len__(self) -> int:
        return len(self._at)

    def _use(self, unit: int) -> None:
        self._used[self._at[unit]] = 1

    def _evict(self) -> int:
        while True:
            slot, self._hand = self._hand, (self._hand + 1) % self.capacity
            unit = self._slots[slot]
            if unit is None or unit in self._asked:
                continue
            if self._used[slot]:
                self._used[slot] = 0
                continue
            self._slots[slot] = None
            self._free.append(slot)
            del self._at[unit]
            return unit

    def _admit(self, unit: int) -> None:
        slot = self._free.popleft()
        self._slots[slot], self._used[slot], self._at[unit] = unit, 1, slot


class _Ranked(Policy):
    """Evicts the unit of the least rank. Ranks lie in a heap where outdated ones stay until they surface: amortised O(log capacity)."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._ranks: dict[int, Any] = {}
        self._heap: list[tuple[Any, int]] = []
        self._aside: list[tuple[Any, int]] = []  # of this access's list, so not to be evicted now

    def access(self, units: Sequence[int]) -> Fetch:
        fetch = super().access(units)
        while self._aside:
            heapq.heappush(self._heap, self._aside.pop())
        if len(self._heap) > 4 * self.capacity:
            self._sort()
        return fetch

    def __contains__(self, unit: object) -> bool:
        return unit in self._ranks

    def __len__(self) -> int:
        return len(self._ranks)

    def _rank(self, unit: int, rank: Any) -> None:
        self._ranks[unit] = rank
        heapq.heappush(self._heap, (rank, unit))

    def _evict(self) -> int:
        while True:
            rank, unit = heapq.heappop(self._heap)
            if self._ranks.get(unit) != rank:
                continue
            if unit in self._asked:
                self._aside.append((rank, unit))
                continue
            del self._ranks[unit]
            return unit

    def _sort(self) -> None:
        """Make the heap anew, without what is outdated."""
        self._heap = [(rank, unit) for unit, rank in self._ranks.items()]
        heapq.heapify(self._heap)


class Lfu(_Ranked):
    """Evicts what was used least often, of those the least recent; all counts are halved every ``AGE`` times the capacity uses.

    Halved whole numbers, not decayed fractions, since a device can keep them in a few bits beside a slot and gets the same victims.
    A unit that returns begins anew.
    """

    AGE = 8  # in recorded runs of the embedded model 4 to 16 hit alike, within a point

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._uses = self._aged = 0

    def access(self, units: Sequence[int]) -> Fetch:
        fetch = super().access(units)
        if self._uses - self._aged >= self.AGE * self.capacity:
            self._aged = self._uses
            self._ranks = {unit: (count // 2, last) for unit, (count, last) in self._ranks.items()}
            self._sort()
        return fetch

    def _use(self, unit: int) -> None:
        self._uses += 1
        self._rank(unit, (self._ranks[unit][0] + 1, self._uses))

    def _admit(self, unit: int) -> None:
        self._uses += 1
        self._rank(unit, (1, self._uses))


class Belady(_Ranked):
    """Evicts what is needed again last, or never: no policy misses less often. For reference, as it has to know the ``future``.

    ``future``: all units that will be asked for, list after list. Raises ValueError if something else is asked for.
    """

    def __init__(self, capacity: int, future: Sequence[int]):
        super().__init__(capacity)
        self._future, self._place = future, 0
        self._again = [len(future)] * len(future)  # where the unit of each place is needed next
        seen: dict[int, int] = {}
        for place in range(len(future) - 1, -1, -1):
            self._again[place] = seen.get(future[place], len(future))
            seen[future[place]] = place
        self._next: dict[int, int] = {}  # of the units of this access

    def access(self, units: Sequence[int]) -> Fetch:
        places = range(self._place, self._place + len(units))
        if list(units) != list(self._future[places.start : places.stop]):
            raise ValueError(f"belady was told of another future: what is asked for from place {self._place} on is not in it")
        self._place = places.stop
        self._next = {unit: self._again[place] for unit, place in zip(units, places, strict=True)}
        return super().access(units)

    def _use(self, unit: int) -> None:
        self._rank(unit, -self._next[unit])

    _admit = _use


POLICIES: dict[str, type[Policy]] = {"lru": Lru, "clock": Clock, "lfu": Lfu, "belady": Belady}


def make_policy(name: str, capacity: int, future: Sequence[int] | None = None) -> Policy:
    """An empty cache of ``capacity`` units under the policy ``name``; ``future`` is for ``belady``, see there.

    Raises ConfigError for an unknown name, and for ``belady`` without a future.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} is unknown; use one of {', '.join(POLICIES)}")
    if name != "belady":
        return POLICIES[name](capacity)
    if future is None:
        raise ConfigError("policy 'belady' has to know the future, so it is there for recorded traces only; use lru, clock or lfu")
    return Belady(capacity, future)
