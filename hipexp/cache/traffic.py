"""What offload costs, counted: hits and misses, bytes over the link and to the disk, time spent waiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

WRITE = "write"  # who moves what is new to the host


@dataclass
class Traffic:
    """Counts that add up. Units of transfer are the keys, or the values, of a chunk of the last stage.

    ``hits`` and ``misses``: units asked for that were on the device, and that had to be fetched. ``h2d_bytes`` and ``d2h_bytes``: over the link,
    in the format of the host, ``disk_read_bytes`` of the first of them straight from the disk tier; ``disk_write_bytes``: written to it.
    ``stall_ms``: time that whoever asked had to wait for what was missing. ``split``: requests that the device could not hold at once, so
    that they were read in parts.
    """

    hits: int = 0
    misses: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    stall_ms: float = 0.0
    split: int = 0

    def add(self, other: Traffic) -> None:
        """Count what another one counted."""
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def hit_ratio(self) -> float | None:
        """Hits in parts of all units asked for; None if there were none."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


NAMES = tuple(item.name for item in fields(Traffic))


@dataclass
class TrafficLog:
    """Traffic of one layer by ``(phase, by)``: phase ``prefill`` or ``decode``; by the number of a stage, ``attend``, ``summarize`` or ``write``."""

    counts: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def of(self, phase: str, by: str) -> Traffic:
        """What one reader of a phase caused so far, to be counted on."""
        return self.counts.setdefault((phase, by), Traffic())

    def rows(self, layer: int) -> Iterator[dict[str, Any]]:
        """Tidy rows, as they stand in ``samples.jsonl`` and ``summary.json``: ``layer``, ``phase``, ``by``, and the fields of :class:`Traffic`."""
        for (phase, by), traffic in self.counts.items():
            yield {"layer": layer, "phase": phase, "by": by, **asdict(traffic)}


def summed(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], Traffic]:
    """Rows added up by some of ``layer``, ``phase`` and ``by``; without keys, all of them under ``()``."""
    sums: dict[tuple[Any, ...], Traffic] = {}
    for row in rows:
        sums.setdefault(tuple(row[key] for key in keys), Traffic()).add(Traffic(**{name: row[name] for name in NAMES}))
    return sums
