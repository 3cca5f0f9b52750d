"""From a published table to the runs beside it: one cell for each number that has one, many of them of the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hipexp.config.compose import compose
from hipexp.config.model import read_facts
from hipexp.config.schema import ConfigError, Experiment
from hipexp.repro.data import FULL, Method, Published, Row, Size
from hipexp.run.ledger import runs_root
from hipexp.run.several import Named, compose_named, resident

TIMES = {"{half}": 0.5, "{x1}": 1, "{x2}": 2, "{x4}": 4}  # multiples of the trained length, in words
Line = tuple[str, str, str]  # model (empty: one model stands beside all), name, metric


@dataclass(frozen=True)
class Cell:
    """A number of ours: of ``line``, under ``run``, beside ``column``; ``reads`` of ``point``, of dense attention there if ``dense``."""

    line: Line
    run: str
    column: str
    reads: tuple[str, ...]
    dense: bool
    point: Named


def size_of(table: Published, name: str) -> Size:
    """A size by its name. Raises ``ConfigError`` for one that the table does not have."""
    if name not in table.sizes:
        there = ", ".join(table.sizes) or "none: nothing of it is run"
        raise ConfigError(f"repro {table.id}: size={name} is not there; its sizes are {there}")
    return table.sizes[name]


def by_model(table: Published, size: Size) -> bool:
    """Whether each published model is run itself; otherwise one model stands beside all of them."""
    return bool(table.models) and not any(word.startswith("model=") for word in size.words)


def line_of(row: Row, split: bool) -> Line:
    """Where a row stands in a table of ours."""
    return (row.model if split else "", row.name, row.metric)


def lines(table: Published, size: Size) -> dict[Line, list[Row]]:
    """The lines of ours with the published rows beside each."""
    found: dict[Line, list[Row]] = {}
    for row in table.rows:
        found.setdefault(line_of(row, by_model(table, size)), []).append(row)
    return found


def reads_of(size: Size, row: Row, column: str) -> tuple[str, ...]:
    """What is read for a published number; empty where it is quoted only."""
    if row.method is None or (size.columns and column not in size.columns):
        return ()
    reads = next((size.reads[key] for key in (column, row.metric, "all") if key in size.reads), [])
    return tuple(reads)


def is_blank(rows: Sequence[Row], number: int) -> bool:
    """Whether published rows that have numbers have none in a column: mostly because it did not fit."""
    return all(row.published[number] is None for row in rows) and any(value is not None for row in rows for value in row.published)


def cells(table: Published, name: str, overrides: Sequence[str]) -> list[Cell]:
    """Every cell of ours at a size, in the order of the table. Raises ``ConfigError``, also for what cannot be composed."""
    size, found = size_of(table, name), list[tuple[Line, str, str, tuple[str, ...], Method, tuple[str, ...]]]()
    known, names = dict[tuple[str, ...], Named](), dict[tuple[str, ...], dict[str, None]]()
    chosen = any(word.lstrip("+-").startswith("model=") for word in overrides)
    seeds = [word for word in overrides if word.lstrip("+~-").startswith("seed")]
    for line, rows in lines(table, size).items():
        row = next((row for row in rows if row.method is not None), rows[0])
        for run, more in size.runs.items():
            for column in table.columns:
                reads = reads_of(size, row, column)
                blank = name == FULL and is_blank(rows, table.columns.index(column))
                if not reads or row.method is None or blank:
                    continue
                own = [*([f"model={table.models[row.model]}"] if line[0] else []), *size.words]
                own = [word for word in own if not (chosen and word.startswith("model="))]
                own += [*table.methods[row.method].words, *size.methods.get(row.method, []), *more, *size.columns.get(column, [])]
                own += row.words if line[0] else []
                if seeds and (seed := next((word for word in own if word.startswith("seed=")), None)):
                    raise ConfigError(
                        f"repro {table.id}: {seeds[-1]} cannot be said here, where a run has {seed} by what the table is; leave it out"
                    )
                words = tuple(own)
                if words not in known:
                    known[words] = compose_named("", placed(words, overrides), overrides)
                names.setdefault(words, {})[row.method] = None
                found.append((line, run, column, reads, table.methods[row.method], words))
    points = dict[tuple[str, ...], Named]()
    for line, run, column, _, _, words in found:  # a run is named after all methods that read it
        told = ", ".join(filter(None, (line[0], " and ".join(names[words]), run, column if size.columns else "")))
        points.setdefault(words, Named(told, known[words].experiment))
    return [Cell(line, run, column, reads, method.dense, points[words]) for line, run, column, reads, method, words in found]


def placed(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Words with lengths and folders in the place of ``{x2}``, ``{stand_ins}`` and so on. Of equal keys the last one counts."""
    by_key = {word.lstrip("+").split("=")[0]: word for word in words}
    words = list(by_key.values())
    if any(mark in word for word in words for mark in TIMES):
        model = (word for word in (*words, *resident(overrides)) if word.lstrip("+-").startswith("model"))
        trained_tok = trained_length(tuple(model))
        for mark, times in TIMES.items():
            words = [word.replace(mark, str(int(times * trained_tok))) for word in words]
    return [word.replace("{stand_ins}", str(stand_ins())) for word in words]


@lru_cache
def trained_length(words: tuple[str, ...]) -> int:
    """The trained length of the model that words choose, also of one on a hub whose file in ``conf/model`` says it.

    Raises ``ConfigError`` where nothing says it.
    """
    model = compose(words).model
    if model.trained_tok is not None:
        return model.trained_tok
    facts = read_facts(model)
    if facts is None:
        raise ConfigError(f"model.path={model.path} is on a hub; set model.trained_tok, of which lengths here are multiples")
    return facts.trained_tok


def stand_ins() -> Path:
    """Where the stand-ins for RULER's texts are, of tables that read them."""
    return (runs_root() / "stand-ins").resolve()


def points_of(found: Sequence[Cell]) -> list[Named]:
    """The runs behind cells, each once, shortest prompts first."""
    points = list({id(cell.point): cell.point for cell in found}.values())
    return sorted(points, key=lambda point: longest(point.experiment))


def longest(experiment: Experiment) -> int:
    """The longest text of a run, as far as its configuration says; 0: the task decides."""
    task = experiment.task
    return max([task.length_tok or 0, task.truncate_tok or 0, *(task.lengths_tok or []), *(task.contexts_tok or [])])
