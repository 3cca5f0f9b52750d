"""``python -m hipexp sweep <file>``: a wandb sweep file without wandb. Resumable; processes with the same points share them."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, Experiment
from hipexp.output import DRY, answer, aside, split_flags
from hipexp.report.runs import Run
from hipexp.report.tables import markdown_table, text_table
from hipexp.run.ledger import classify, file_name, make_folder, read_json, runs_root, write_text
from hipexp.run.point import check_point, prepare
from hipexp.run.several import Named, helpers, split_jobs
from hipexp.run.sharing import Shared, run_each
from hipexp.run.sweep_file import Choice, SweepFile, read_sweep
from hipexp.suites.sample import DataMissing
from hipexp.track.metrics import metrics_of

USAGE = "sweep conf/sweep/budget.yaml [key=value …] [jobs=2] [count=20] [sweep_seed=0] [--dry-run] [--json|--quiet]"
BAD_INPUT, FAILED = 2, 1


@dataclass(frozen=True)
class Row:
    """A point of the sweep and its run; ``run`` is None where it cannot begin: ``refused`` says why, in a class and in words."""

    choice: Choice
    run: Shared | None
    refused: tuple[str, str] = "", ""

    def summary(self) -> dict[str, Any]:
        """Its ``summary.json``; empty while it is not done."""
        return read_json(self.run.folder / "summary.json") if self.run is not None and self.run.done else {}

    def state(self) -> str:
        """What became of it."""
        if self.run is None:
            return f"refused: {self.refused[0]}"
        return Run(self.run.folder).outcome if (self.run.folder / "status.json").exists() else "to do"

    def message(self) -> str | None:
        """Why it cannot begin, or failed; None for every other."""
        if self.run is None:
            return self.refused[1]
        return read_json(self.run.folder / "status.json").get("message")


def varying(choices: Sequence[Choice]) -> list[str]:
    """The parameters that have more than one value in these points."""
    return [name for name in choices[0].values if len({str(choice.values[name]) for choice in choices}) > 1]


def rows_of(sweep: SweepFile, choices: Sequence[Choice], check: Callable[[Experiment], object] = prepare) -> list[Row]:
    """The points, checked; of several that are the same run, the first. Raises ``ConfigError`` if all configurations are refused."""
    rows: dict[str, Row] = {}
    names = varying(choices)
    for choice in choices:
        named = shlex.join(f"{name}={choice.values[name]}" for name in names) or sweep.name
        try:
            experiment = compose(choice.words)
            check(experiment)
            shared = Shared.of(Named(named, experiment))
        except (ConfigError, DataMissing) as error:
            rows[shlex.join(choice.words)] = Row(choice, None, (classify(error), " ".join(str(error).split())))
        else:
            rows.setdefault(shared.key, Row(choice, shared))
    if all(row.refused[0] == "bad_config" for row in rows.values()):
        raise ConfigError(next(row.refused[1] for row in rows.values()))
    return list(rows.values())


def table(sweep: SweepFile, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Header and lines: the parameters that vary, the metric with its protocol, times, what became of a point, its folder; best first."""
    names = varying([row.choice for row in rows])
    ordered = sorted(rows, key=lambda row: _rank(sweep, row))
    lines = [[*(row.choice.values[name] for name in names), *_found(sweep, row)] for row in ordered]
    header = [*names, sweep.metric, "protocol", "prefill s", "decode ms", "state", "folder"]
    return header, [[_text(cell) for cell in line] for line in lines]


def _text(cell: Any) -> Any:
    """A cell as it is shown: a parameter's empty text as quotes, and truth values and lists as text."""
    return cell if cell is None or (type(cell) in (str, int, float) and cell != "") else repr(cell)


def _found(sweep: SweepFile, row: Row) -> list[Any]:
    summary = row.summary()
    folder = row.run.folder.name if row.run is not None else None
    if not summary:
        return [None, None, None, None, row.state(), folder]
    prefill, decode = (summary["latency"].get(name) for name in ("prefill_ms", "decode_ms"))
    return [metrics_of(summary).get(sweep.metric), summary["protocol"], prefill and prefill / 1e3, decode, row.state(), folder]


def _rank(sweep: SweepFile, row: Row) -> tuple[bool, float]:
    """Where a line stands: the best value of the metric first, what has none last."""
    value = metrics_of(summary).get(sweep.metric) if (summary := row.summary()) else None
    return (True, 0.0) if value is None else (False, -value if sweep.goal == "maximize" else value)


def folder_of_sweep(sweep: SweepFile, rows: Sequence[Row]) -> Path:
    """Where the table of these points is; other points of the same file have another one."""
    keys = "\n".join(sorted(" ".join(row.choice.words) for row in rows))
    return runs_root() / "sweep" / f"{file_name(sweep.path.stem)}_{hashlib.sha256(keys.encode()).hexdigest()[:10]}"


def write_table(sweep: SweepFile, rows: Sequence[Row]) -> Path:
    """Write ``table.md`` from what is done so far; returns its path."""
    path = folder_of_sweep(sweep, rows) / "table.md"
    make_folder(path.parent)
    header, lines = table(sweep, rows)
    done = sum(bool(row.summary()) for row in rows)
    said = f"# Sweep {sweep.name}\n\n{done} of {len(rows)} points are done; sorted by {sweep.metric} ({sweep.goal})."
    write_text(path, f"{said}\n\n{markdown_table(header, lines)}\n")
    return path


def unknown_metric(sweep: SweepFile, rows: Sequence[Row]) -> str | None:
    """What is wrong with a metric that no finished point has; None while nobody can know."""
    names = {name for row in rows if (summary := row.summary()) for name in metrics_of(summary)}
    if not names or sweep.metric in names:
        return None
    return (
        f"{sweep.path}: metric.name={sweep.metric} is measured by no point of this sweep that is done; there are {', '.join(sorted(names))}"
    )


def read_arguments(words: Sequence[str]) -> tuple[Path, dict[str, int], list[str]]:
    """The file, ``count`` and ``sweep_seed``, and the overrides of a command line without ``jobs=``. Raises ``ConfigError``."""
    files = [word for word in words if "=" not in word and not word.startswith(("-", "~"))]
    if len(files) != 1:
        raise ConfigError(f"sweep takes one file, and there are {len(files)}; write it as in {USAGE}")
    numbers, overrides = {}, []
    for word in words:
        key, _, value = word.partition("=")
        if key in ("count", "sweep_seed"):
            least = 1 if key == "count" else 0
            if not value.isascii() or not value.isdecimal() or int(value) < least:
                raise ConfigError(f"{word} must be a whole number from {least}; try {key}=20")
            numbers[key] = int(value)
        elif word != files[0]:
            overrides.append(word)
    return Path(files[0]), numbers, overrides


def record(sweep: SweepFile, row: Row) -> dict[str, Any]:
    """A point as plain data."""
    value, protocol, prefill_s, decode_ms, state, _ = _found(sweep, row)
    return {
        **{"words": row.choice.words, "values": row.choice.values, "metric": value, "protocol": protocol, "prefill_s": prefill_s},
        **{"decode_ms": decode_ms, "state": state, "message": row.message(), "folder": None if row.run is None else str(row.run.folder)},
    }


def main(argv: list[str]) -> int:
    """Run every point of a sweep file that is not done yet, and print the table of all; ``--dry-run`` only lists them.

    ``jobs=``: so many processes share the points, as does the same command elsewhere. Returns 0 if all are done, 2 if points were
    refused, 1 if runs failed. Raises ``ConfigError`` for a file that needs wandb.
    """
    flags, words = split_flags(argv)
    jobs, words = split_jobs(words)
    path, numbers, overrides = read_arguments(words)
    sweep, dry = read_sweep(path), DRY in flags
    choices = sweep.choices(overrides, numbers.get("count"), numbers.get("sweep_seed", 0))
    with aside(flags):
        rows = rows_of(sweep, choices, check_point if dry else prepare)
        for row in rows:
            if row.run is None:
                print(f"refused: {shlex.join(row.choice.words)}: {row.refused[1]}", file=sys.stderr)
        if not dry:
            run_rows(sweep, rows, jobs)
    place = None if dry else write_table(sweep, rows)
    points = [record(sweep, row) for row in sorted(rows, key=partial(_rank, sweep))]
    data = {"sweep": sweep.name, "metric": sweep.metric, "goal": sweep.goal, "table": place and str(place), "points": points}
    folders = "\n".join(str(row.run.folder) for row in rows if row.run is not None)
    answer(flags, text(sweep, rows, place), data, str(place) if place else folders)
    if problem := unknown_metric(sweep, rows):
        raise ConfigError(problem)
    left = [row for row in rows if row.run is not None and not row.summary()]
    if left and not dry:
        return FAILED
    return BAD_INPUT if any(row.run is None for row in rows) else 0


def run_rows(sweep: SweepFile, rows: Sequence[Row], jobs: int) -> None:
    """Run the points that are not done."""
    if sweep.stops:
        print("early_terminate is for wandb's server: here every point runs to its end")
    points = [row.run for row in rows if row.run is not None]

    warned: list[str] = []

    def after() -> None:
        write_table(sweep, rows)
        if not warned and (problem := unknown_metric(sweep, rows)):  # another point may have it, as traffic where there is an offload
            warned.append(problem)
            print(f"warning: {problem}", file=sys.stderr, flush=True)

    with helpers(points, jobs, folder_of_sweep(sweep, rows), run_each):
        run_each(points, after)


def text(sweep: SweepFile, rows: Sequence[Row], place: Path | None) -> str:
    """The table of a sweep for a terminal, or, where nothing was run, its points and their states."""
    if place is None:
        lines = text_table(["point", "state"], [[shlex.join(row.choice.words), row.state()] for row in rows], left=2)
        return f"{lines}\n{len(rows)} points, {sum(bool(row.summary()) for row in rows)} of them done"
    header, cells = table(sweep, rows)
    return f"{text_table(header, cells, left=len(header))}\nsorted by {sweep.metric} ({sweep.goal})\ntable: {place}"
