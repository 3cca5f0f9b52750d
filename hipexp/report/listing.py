"""``python -m hipexp ls``: every run and what became of it."""

from __future__ import annotations

import time
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.output import answer, split_flags
from hipexp.report.runs import Run, Runs, load_runs
from hipexp.report.tables import duration, text_table
from hipexp.run.ledger import FAILURES, runs_root

FILTERS = ("task", "model", "pipeline", "state", "class", "protocol")
UNFINISHED = ("failed", "stopped", "damaged")
USAGE = f"python -m hipexp ls [{'=… '.join(FILTERS)}=…] [--json|--quiet]"
REASON = 150  # characters of a reason


def list_runs(runs: Runs) -> list[dict[str, Any]]:
    """One record per run, in the order of ``runs``; see :func:`record`."""
    return [record(run) for run in runs]


def record(run: Run) -> dict[str, Any]:
    """What ``ls`` tells of a run.

    ``samples`` are finished, of ``of`` (None where nobody knows yet); ``average`` is None unless the run is done: part of the samples
    make no score; ``age_s``: seconds since its status was written.
    """
    status, failed = run.status, run.state == "failed"
    of = status.get("of", status.get("finished") if run.state == "done" else None)
    return {
        "task": run.folder.parent.name,
        "run": run.folder.name,
        "state": run.outcome,
        "samples": len(run.samples()),
        "of": of,
        "average": run.summary.get("average"),
        "protocol": run.summary.get("protocol") or run.card.get("protocol"),
        "class": run.failure,
        "message": status.get("message") if failed else None,
        "updated": str(status.get("updated", "")),
        "age_s": max(0, round(time.time() - run.changed)) if run.changed else None,
        "folder": str(run.folder),
    }


def main(argv: list[str]) -> int:
    """List the runs that pass the filters, with ``--quiet`` their folders only. Raises ``ConfigError`` for other words."""
    flags, words = split_flags(argv)
    filters = read_filters(words)
    runs = list_runs(load_runs(None, **filters))
    none = f"no runs {'like that ' if filters else ''}under {runs_root()}{'' if filters else ' yet'}"
    answer(flags, text(runs) if runs else none, runs, "\n".join(run["folder"] for run in runs))
    return 0


def read_filters(words: list[str]) -> dict[str, list[str]]:
    """Filters ``name=value,value``. Raises ``ConfigError`` for what is none, and for a class that there is not."""
    filters: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in FILTERS or not equals:
            raise ConfigError(f"ls takes no argument {word!r}: {USAGE}")
        filters[name] = value.split(",")
    for one in filters.get("class", ()):
        if one not in FAILURES:
            raise ConfigError(f"class={one} must be one of {', '.join(FAILURES)}")
    return filters


def text(runs: list[dict[str, Any]]) -> str:
    """Records as a table, why runs failed, and how to go on with those that are not done."""
    columns = ["task", "run", "state", "samples", "average", "protocol", "age"]
    rows = []
    for run in runs:
        progress = str(run["samples"]) if run["of"] is None else f"{run['samples']}/{run['of']}"
        shown = {"samples": progress, "age": None if run["age_s"] is None else duration(run["age_s"])}
        rows.append([(run | shown)[column] for column in columns])
    lines = [text_table(columns, rows, left=3)]
    for run in runs:
        if run["message"]:
            reason = " ".join(str(run["message"]).split())
            lines.append(f"{run['task']}/{run['run']}: {reason if len(reason) <= REASON else reason[: REASON - 1] + '…'}")
    left = sum(run["state"].split(":")[0] in UNFINISHED for run in runs)
    if left:
        lines.append(f"{left} not done: `python -m hipexp retry` goes on with them, finished samples are kept (retry --dry-run lists them)")
    return "\n".join(lines)
