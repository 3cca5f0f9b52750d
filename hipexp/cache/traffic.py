"""What offload costs, counted: hits and misses, bytes over the link and to the disk, time spent waiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

WRITE, SUMMARIZE, AHEAD = "write", "summarize", "ahead"  # what is new, to the host; keys for their landmarks; units read in advance
PHASES = ("prefill", "decode")


@dataclass
class Traffic:
    """Counts that add up. Units of transfer are the keys, or the values, of a chunk of the last stage.

    ``hits`` and ``misses``: units asked for that were on the device, and that had to be fetched. ``h2d_bytes`` and ``d2h_bytes``: over the
    link, in the format of the host, ``disk_read_bytes`` of the first straight from the disk tier; ``disk_write_bytes``: written to it.
    ``stall_ms``: time that whoever asked had to wait for what was missing. ``uncached``: requests that the device could not hold at
    once; what was missing was read token by token, and not kept.
    """

    hits: int = 0
    misses: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    stall_ms: float = 0.0
    uncached: int = 0

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
    """Traffic of one layer by ``(phase, by)``: phase ``prefill`` or ``decode``; by the number of a stage, ``attend``, ``summarize``,
    ``ahead`` or ``write``.
    """

    counts: dict[tuple[str, str], Traffic] = field(default_factory=dict)

    def of(self, phase: str, by: str) -> Traffic:
        """What one reader of a phase caused so far, to be counted on."""
        return self.counts.setdefault((phase, by), Traffic())

    def rows(self, layer: int) -> Iterator[dict[str, Any]]:
        """Tidy rows, as in ``samples.jsonl`` and ``summary.json``: ``layer``, ``phase``, ``by``, and the fields of :class:`Traffic`."""
        for (phase, by), traffic in self.counts.items():
            yield {"layer": layer, "phase": phase, "by": by, **asdict(traffic)}


def summed(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], Traffic]:
    """Rows added up by some of ``layer``, ``phase`` and ``by``; without keys, all of them under ``()``."""
    sums: dict[tuple[Any, ...], Traffic] = {}
    for row in rows:
        sums.setdefault(tuple(row[key] for key in keys), Traffic()).add(Traffic(**{name: row[name] for name in NAMES}))
    return sums


def summarize(samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The traffic of several samples, each ``{}`` (resident) or with its tidy ``rows`` and the number of its decode ``steps``.

    ``{}`` if all were resident, else ``rows``, the samples added up by layer, phase and reader; ``by``, all layers as well; and for each
    phase the total over readers too, in ``decode`` with ``steps``, ``h2d_bytes_per_step`` and ``d2h_bytes_per_step``. Rows of ``by`` and
    totals have a ``hit_ratio``, None where nothing was asked for. ``host_bytes`` and ``disk_bytes``: the most that a sample took there.
    """
    told = [sample for sample in samples if sample]
    if not told:
        return {}
    rows = [row for sample in told for row in sample["rows"]]
    layers, readers, phases = summed(rows, "layer", "phase", "by"), summed(rows, "phase", "by"), summed(rows, "phase")
    steps = sum(sample["steps"] for sample in told)
    totals = {phase: _with_ratio(phases.get((phase,), Traffic())) for phase in PHASES}
    totals["decode"]["steps"] = steps
    for name in ("h2d_bytes", "d2h_bytes"):
        totals["decode"][f"{name}_per_step"] = round(totals["decode"][name] / steps) if steps else None
    return {
        "rows": [{"layer": layer, "phase": phase, "by": by, **asdict(traffic)} for (layer, phase, by), traffic in layers.items()],
        "by": [{"phase": phase, "by": by, **_with_ratio(readers[phase, by])} for phase, by in sorted(readers, key=_in_order)],
        **totals,
        **{name: max(sample.get(name, 0) for sample in told) for name in ("host_bytes", "disk_bytes")},
    }


def _in_order(reader: tuple[str, str]) -> tuple[int, bool, int, str]:
    """Prefill before decode; stages by their numbers, then the others."""
    phase, by = reader
    return PHASES.index(phase), not by.isdecimal(), int(by) if by.isdecimal() else 0, by


def _with_ratio(traffic: Traffic) -> dict[str, Any]:
    return asdict(traffic) | {"hit_ratio": traffic.hit_ratio}
