"""Numbers of finished runs, as a published table has them: scores with their samples, times, bytes; and columns that are computed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.repro.data import Published
from hipexp.repro.points import Cell, Line
from hipexp.run.point import folder_of, grouped
from hipexp.suites.scoring.statistics import mean_interval

Key = tuple[Line, str, str]  # line, run, column
Sample = tuple[str, str, int, str]
# Of a row of times, by name: its phase, and the number. `bytes` is counted, of a mean decode step, or of a model the peak memory.
TIMED: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "prefill_ms": ("prefill", lambda row: row["mean_ms"]),
    "decode_ms": ("decode", lambda row: row["mean_ms"]),
    "decode_us": ("decode", lambda row: 1000 * row["mean_ms"]),
    "refresh_us": ("decode", lambda row: 1000 * row["full_ms"] if row.get("full_ms") else None),
    "tokens_s": ("decode", lambda row: 1000 / row["mean_ms"]),
    "read_mb": ("decode", lambda row: row["bytes"] / 1e6),
    "peak_gb": ("prefill", lambda row: row["bytes"] / 1e9),
    "link_mb": ("decode", lambda row: row["h2d_bytes"] / 1e6 if "h2d_bytes" in row else None),
    "hit_percent": ("decode", lambda row: 100 * row["hit_ratio"] if row.get("hit_ratio") is not None else None),
}


@dataclass(frozen=True)
class Value:
    """A number of ours; scores also with their 95 % interval, and the scores of single samples behind them.

    These are by the folder of their run, subtask, number, and the text: what was to be answered, and how long it was before it was cut.
    """

    number: float
    interval: tuple[float, float] | None = None
    samples: dict[Sample, float] = field(default_factory=dict)


def values_of(table: Published, found: Sequence[Cell]) -> dict[Key, Value]:
    """What is there of the cells, and of the columns that are computed of them."""
    values = {(cell.line, cell.run, cell.column): value for cell in found if (value := read(cell)) is not None}
    for run in dict.fromkeys(cell.run for cell in found):
        numbers: dict[Line, dict[str, float]] = {}
        for (line, of, column), value in values.items():
            if of == run:
                numbers.setdefault(line, {})[column] = value.number
        for line, columns in derived(table, numbers).items():
            for column, number in columns.items():
                behind = [values[line, run, of].samples for of in inputs(table, column) if (line, run, of) in values]
                values.setdefault((line, run, column), Value(number, None, {key: score for own in behind for key, score in own.items()}))
    return values


def read(cell: Cell) -> Value | None:
    """The number of a cell; None while its run is not done, or where the run has no such number. Raises ``ConfigError``."""
    summary = cell.point.summary()
    if not summary:
        return None
    what = cell.reads[0]
    if what in TIMED:
        phase, number = TIMED[what]
        rows = [row for row in summary["latency"]["rows"] if row["phase"] == phase and row.get("mean_ms")]
        rows = [row for row in rows if row.get("dense", row["impl"] == "dense") == cell.dense]  # of dense ones the fastest is first
        measured = number(rows[0]) if rows else None
        return None if measured is None else Value(measured)
    rows = cell.point.rows()
    if what.startswith("depth "):
        low, high = map(float, what.removeprefix("depth ").split("-"))
        rows = [row for row in rows if low <= row["depth"] < high]
    by_name = grouped(summary, rows)
    names = list(by_name) if what == "mean" or what.startswith("depth ") else list(cell.reads)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ConfigError(f"{cell.line[1]}, {cell.column}: its run scores {', '.join(by_name)}, not {', '.join(missing)}; mend `reads`")
    folder = folder_of(cell.point.experiment).name
    length = cell.point.experiment.task.length_tok  # texts of other lengths are other texts, also where they ask for the same
    answers = {(row["subtask"], row["sample"]): " | ".join(map(str, row["references"])) for row in rows}
    texts = {key: f"{answer} in {length} tokens" if answer and length else answer for key, answer in answers.items()}
    samples = {(folder, *key, texts[key]): score for name in names for key, score in by_name[name].items()}
    if cell.point.experiment.task.name == "recall":
        samples = by_text(samples)
    if not samples:
        return None
    scores = list(samples.values())
    bounds = mean_interval(scores)
    return Value(statistics.fmean(scores), None if bounds is None else (bounds[0], bounds[1]), samples)


def by_text(samples: Mapping[Sample, float]) -> dict[Sample, float]:
    """Of ``task=recall`` the mean of each text: its samples are blocks of one text, under one or several budgets, and not independent."""
    texts: dict[Sample, list[float]] = {}
    for (folder, subtask, _, of), score in samples.items():
        texts.setdefault((folder, subtask.rpartition("/")[0], 0, of), []).append(score)
    return {text: statistics.fmean(scores) for text, scores in texts.items()}


def derived(table: Published, numbers: Mapping[Line, Mapping[str, float]]) -> dict[Line, dict[str, float]]:
    """The computed columns of rows of ``numbers``, where all that they need is there.

    ``mean: [columns]``; ``relative: [[columns], …]``: the mean over groups of a row's mean by the best one of the same model, in percent;
    ``below: [row, column]``: how much that row has more in that column.
    """
    found: dict[Line, dict[str, float]] = {line: {} for line in numbers}
    for name, how in table.derived.items():
        ((kind, of),) = how.items()
        for line, given in numbers.items():
            own = {**given, **found[line]}  # also of columns that were computed before
            if kind == "mean" and all(column in own for column in of):
                found[line][name] = statistics.fmean(own[column] for column in of)
            if kind == "relative" and all(column in own for group in of for column in group):
                found[line][name] = _relative(line, numbers, of)
            if kind == "below":
                other = numbers.get((line[0], of[0], line[2]), {})
                if line[1] != of[0] and of[1] in own and of[1] in other:
                    found[line][name] = other[of[1]] - own[of[1]]
    return found


def inputs(table: Published, column: str) -> list[str]:
    """The columns that a mean is over, also of means; of another column itself."""
    of = table.derived.get(column, {}).get("mean")
    return [column] if of is None else [name for part in of for name in inputs(table, part)]


def _relative(line: Line, numbers: Mapping[Line, Mapping[str, float]], groups: Sequence[Sequence[str]]) -> float:
    shares = []
    for group in groups:
        rivals = [own for other, own in numbers.items() if other[0] == line[0] and all(column in own for column in group)]
        best = max(statistics.fmean(own[column] for column in group) for own in rivals)
        shares.append(statistics.fmean(numbers[line][column] for column in group) / best if best else 0.0)
    return 100 * statistics.fmean(shares)
