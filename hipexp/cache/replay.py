"""What a cache of some size under some policy would have done in a recorded run, without a model.

A layer's cache is one pool. Keys and values of a unit are two halves that come and go by themselves, since stages read keys alone.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hipexp.cache.policies import make_policy
from hipexp.cache.traces import ATTEND, REUSE, Header, LayerUnits, Read


@dataclass(frozen=True)
class Request:
    """The halves of units that are read at once; ``step`` is phase and position of the queries, ``by`` as in ``Read``."""

    step: tuple[str, int]
    by: str
    halves: array[int]


@dataclass
class LayerTrace:
    """All requests of a layer, in order."""

    units: LayerUnits
    requests: list[Request] = field(default_factory=list)

    @property
    def distinct(self) -> int:
        """How many halves are ever read."""
        return len({half for request in self.requests for half in request.halves})

    @property
    def least_tok(self) -> int:
        """The smallest cache: it holds what is attended to at once. In tokens, keys and values."""
        most = max((len(one.halves) for one in self.requests if one.by in (ATTEND, REUSE)), default=1)
        return -(-most // self._halves_per_unit) * self.units.unit_tok

    @property
    def whole_tok(self) -> int:
        """The smallest cache that never has to evict, in tokens."""
        return -(-self.distinct // self._halves_per_unit) * self.units.unit_tok

    def capacity(self, size_tok: int) -> int:
        """Halves in a cache of ``size_tok`` tokens."""
        return size_tok // self.units.unit_tok * self._halves_per_unit

    @property
    def _halves_per_unit(self) -> int:
        return 2 * self.units.lists


@dataclass
class Tally:
    """Counts of halves. ``first``: misses of what was never read before, which no cache avoids; ``missed``: all misses."""

    reads: int = 0
    missed: int = 0
    first: int = 0
    missed_bytes: int = 0
    first_bytes: int = 0

    @property
    def hit_ratio(self) -> float | None:
        """Hits in parts of all reads; None without reads."""
        return 1 - self.missed / self.reads if self.reads else None

    @property
    def best_ratio(self) -> float | None:
        """The hit ratio of a cache that never evicts."""
        return 1 - self.first / self.reads if self.reads else None

    def add(self, other: Tally) -> None:
        """Count what ``other`` counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Outcome:
    """What a policy did over all layers: ``tallies`` by phase and reader (``by`` of ``Read``), bytes fetched by step."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    step_bytes: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))

    def total(self, phase: str, by: str | None = None) -> Tally:
        """All of a phase, or one reader of it."""
        total = Tally()
        for (its_phase, its_by), tally in self.tallies.items():
            if its_phase == phase and by in (None, its_by):
                total.add(tally)
        return total

    def steps(self, phase: str) -> list[int]:
        """Bytes fetched by each decode step or query block, over all layers."""
        return [count for (its_phase, _), count in self.step_bytes.items() if its_phase == phase]


def by_layer(header: Header, reads: Iterable[Read]) -> dict[int, LayerTrace]:
    """The requests of every layer that reads something."""
    layers: dict[int, LayerTrace] = {}
    for read in reads:
        units = header.layers[read.layer]
        trace = layers.setdefault(read.layer, LayerTrace(units))
        halves = array("q")
        for number, listed in enumerate(read.lists):
            keys = [(unit * units.lists + number) * 2 for unit in listed]
            halves.extend(keys)
            if read.by in (ATTEND, REUSE):
                halves.extend(half + 1 for half in keys)
        trace.requests.append(Request((read.phase, read.position), read.by, halves))
    return layers


def replay(layers: dict[int, LayerTrace], policy: str, size_tok: int, progress: Callable[[int], None] = lambda reads: None) -> Outcome:
    """Every layer with a cache of its own, for ``size_tok`` tokens, at least the ``least_tok`` of each; ``progress`` is told of reads done.

    What stages read beyond that is read in parts. Raises ConfigError for an unknown policy, ValueError for a smaller cache.
    """
    outcome = Outcome()
    for trace in layers.values():
        if size_tok < trace.least_tok:
            raise ValueError(f"a cache of {size_tok} tokens does not hold the {trace.least_tok} that are attended to at once")
        future = [half for request in trace.requests for half in request.halves] if policy == "belady" else None
        cache, seen = make_policy(policy, trace.capacity(size_tok), future), set[int]()
        for request in trace.requests:
            tally = Tally(len(request.halves))
            for part in parts(request.halves, cache.capacity):
                missing = cache.access(part).missing
                tally.missed += len(missing)
                tally.first -= len(seen)
                seen.update(missing)
                tally.first += len(seen)
            tally.missed_bytes, tally.first_bytes = tally.missed * trace.units.unit_bytes, tally.first * trace.units.unit_bytes
            outcome.tallies[request.step[0], request.by].add(tally)
            outcome.step_bytes[request.step] += tally.missed_bytes
            progress(tally.reads)
    return outcome


def parts(halves: array[int], most: int) -> Iterator[array[int]]:
    """A list, cut into lists of at most ``most``."""
    for begin in range(0, len(halves), most):
        yield halves[begin : begin + most]
