"""Traces: which units of keys and values a run reads, in which order, on disk.

A trace is JSON, a line at a time, in gzip:

* the header, ``{"format": "hipexp-trace", "version": 1, "layers": {"0": {"unit_tok", "lists", "unit_bytes"}, …}, "about": {…}}``
* reads, ``[phase, position, layer, by, [runs of a list], …]`` with ascending units told as skip, run, skip, run, …: ``[3, 2, 4, 1]`` are
  units 3, 4 and 9
* the end, ``{"reads": how many}``; without it, or where gzip's checksum does not hold, the trace is refused
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError

FORMAT, VERSION = "hipexp-trace", 1
PHASES = ("prefill", "decode")
ATTEND, REUSE = "attend", "reuse"


@dataclass(frozen=True)
class LayerUnits:
    """How keys and values of a layer are cut into units.

    Unit ``u`` holds the keys, and apart from them the values, of tokens ``u * unit_tok`` … (those of the last stage's chunk), for the
    heads of one of ``lists`` lists: 1 if all heads share a selection, else the number of key/value heads. ``unit_bytes``: of the keys of
    a unit; its values take as many.
    """

    unit_tok: int
    lists: int
    unit_bytes: int


@dataclass(frozen=True)
class Header:
    """What a trace is of; ``about`` is for people."""

    layers: dict[int, LayerUnits]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """What a query block (prefill) or a decode step reads at once in one layer; without sinks and window, which are always there.

    ``position``: of its first query. ``by``: the number of a stage, which reads the keys that it probes; ``attend``, which reads keys and
    values of a new selection; or ``reuse``, of the last one again. ``lists``: the units of each list, ascending.
    """

    phase: str
    position: int
    layer: int
    by: str
    lists: tuple[Sequence[int], ...]


class TraceWriter:
    """Writes a trace while it is made. Leaving the context by an error leaves a trace without an end, which nobody will replay."""

    def __init__(self, path: Path, header: Header):
        self.path, self.reads = path, 0
        self._file = gzip.open(path, "wt", encoding="utf-8", compresslevel=6)
        self._line({"format": FORMAT, "version": VERSION, **asdict(header)})

    def write(self, read: Read) -> None:
        """Append a read."""
        self._line([read.phase, read.position, read.layer, read.by, *map(runs_of, read.lists)])
        self.reads += 1

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._line({"reads": self.reads})
        self._file.close()

    def _line(self, data: Any) -> None:
        self._file.write(json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n")


class TraceReader:
    """Reads a trace: the ``header`` at once, the reads by iterating, which ends only if the whole trace was there.

    Raises ConfigError for what is no trace of this version, and where one is damaged or ends early.
    """

    def __init__(self, path: Path):
        self.path = path
        first = next(self._lines(), None)
        if not isinstance(first, dict) or first.get("format") != FORMAT:
            raise ConfigError(f"{path} is no trace; make one with `python -m hipexp replay record`")
        if first.get("version") != VERSION:
            raise ConfigError(f"{path} is a trace of version {first.get('version')!r}, and this hipexp reads {VERSION}; record it again")
        try:
            layers = {int(layer): LayerUnits(**units) for layer, units in first["layers"].items()}
            self.header = Header(layers, first["about"])
            whole = all(type(x) is int and x > 0 for units in layers.values() for x in asdict(units).values())
        except (KeyError, TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise self._damaged("its header is not complete")

    def __iter__(self) -> Iterator[Read]:
        count, ended = 0, False
        for number, line in enumerate(self._lines()):
            if ended:
                raise self._damaged(f"line {number + 1} is behind its end")
            if isinstance(line, dict) and number:
                ended = True
                if line != {"reads": count}:
                    raise self._damaged(f"its end tells of {line.get('reads')} reads, and {count} are there")
            elif number:
                yield self._read(line, number + 1)
                count += 1
        if not ended:
            raise self._damaged(f"it ends after {count} whole reads, without its last line: whoever wrote it was stopped")

    def _lines(self) -> Iterator[Any]:
        number = 0
        try:
            with gzip.open(self.path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    number += 1
                    yield json.loads(line)
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
            if not number and not isinstance(error, EOFError):
                raise ConfigError(f"{self.path} is no trace; make one with `python -m hipexp replay record`") from error
            raise self._damaged(f"after {max(0, number - 1)} whole reads it breaks off ({error})") from error
        except OSError as error:
            raise ConfigError(f"cannot read {self.path} ({error.strerror or error}); give the path of a trace") from error

    def _read(self, line: Any, number: int) -> Read:
        try:
            phase, position, layer, by, *lists = line
            known = phase in PHASES and type(position) is int and len(lists) == self.header.layers[layer].lists
            if known and (by in (ATTEND, REUSE) or by.isdecimal()):
                return Read(phase, position, layer, by, tuple(map(units_of, lists)))
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
        raise self._damaged(f"line {number} is no read")

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(f"the trace {self.path} is damaged: {what}; record it again")


def runs_of(units: Iterable[int]) -> list[int]:
    """Ascending units as skip, run, skip, run, … Raises ValueError for units that do not ascend."""
    runs: list[int] = []
    end = 0  # behind the last run
    for unit in units:
        if runs and unit == end:
            runs[-1] += 1
        elif unit >= end:
            runs += [unit - end, 1]
        else:
            raise ValueError(f"unit {unit} of a list must be at least {end}: units ascend, without repetition, from 0 on")
        end = unit + 1
    return runs


def units_of(runs: Sequence[int]) -> list[int]:
    """The units that :func:`runs_of` told so. Raises ValueError for what it cannot have told."""
    units: list[int] = []
    end = 0
    for skip, run in zip(runs[::2], runs[1::2], strict=True):
        if type(skip) is not int or type(run) is not int or run < 1 or skip < (1 if units else 0):
            raise ValueError(f"a run of {run!r} units after {skip!r} cannot be")
        units.extend(range(end + skip, end + skip + run))
        end += skip + run
    return units
