"""Stored runs as objects: ``hipexp.load_runs()``, and which run a word on the command line means. Imports no torch."""

from __future__ import annotations

import html
from collections import UserList
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ConfigError
from hipexp.run.ledger import LOG, is_done, is_held, read_json, read_rows, runs_root

if TYPE_CHECKING:
    import pyarrow as pa

STATES = ("done", "running", "failed", "stopped", "damaged")
SHOWN = ("task", "model", "pipeline", "state", "finished", "average", "protocol")
CARD_PARTS = ("template", "metric", "length_tok", "samples", "new_tok", "truncation", "model")  # each by subtask, or by field
NESTED = ("references", "traffic", "layers", "rows", "steps_ms")  # fields of lines that are no cell of a table


@dataclass(eq=False)
class Run:
    """A run folder. Every property is read when it is first asked for, and kept; :meth:`samples` reads anew each time."""

    folder: Path

    @property
    def name(self) -> str:
        """``<task>/<model>_<pipeline>_<key>``, the last two parts of the folder's path."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @cached_property
    def status(self) -> dict[str, Any]:
        """``status.json``: ``state``, ``run_key``, ``updated``, ``finished``, of a failure also ``class`` and ``message``."""
        return read_json(self.folder / "status.json")

    @cached_property
    def state(self) -> str:
        """One of ``STATES``: ``stopped`` says running but no process holds it; ``damaged`` files are missing or torn."""
        match self.status.get("state"):
            case "running":
                return "running" if is_held(self.folder) else "stopped"
            case "failed":
                return "failed"
            case "done" if is_done(self.folder, self.status.get("run_key", "")):
                return "done"
        return "damaged"

    @property
    def failure(self) -> str | None:
        """The class of a failure, see ``hipexp.run.ledger.FAILURES``; None for every other state."""
        return self.status.get("class", "error") if self.state == "failed" else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty where there is none, or, with a word in the log, where it is damaged."""
        import yaml

        path = self.folder / "config.yaml"
        try:
            found = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # in C: a tenth of the time
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            found = None
        if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in ("model", "task")):
            LOG.warning("%s is damaged and counts as missing", path)
            return {}
        return found

    @cached_property
    def card(self) -> dict[str, Any]:
        """The protocol card; empty before the run came so far, or, with a word in the log, where it is damaged."""
        card = read_json(self.folder / "card.json")
        if any(not isinstance(card.get(name) or {}, dict) for name in CARD_PARTS):
            LOG.warning("%s is damaged and counts as missing", self.folder / "card.json")
            return {}
        return card

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json`` of a run that is done; empty for every other, whose numbers are not those of the whole run."""
        return read_json(self.folder / "summary.json") if self.state == "done" else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """``env.json``: device, threads, versions."""
        return read_json(self.folder / "env.json")

    @property
    def outcome(self) -> str:
        """What became of the run in words: its state, of a failure with its class."""
        return self.state if self.failure is None else f"failed: {self.failure}"

    @cached_property
    def changed(self) -> float:
        """When its status was written, in seconds since 1970; 0 where that is not known."""
        try:
            return datetime.strptime(str(self.status.get("updated")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except ValueError:
            return 0.0

    @property
    def task(self) -> str:
        """The suite that was run."""
        return str((self.config.get("task") or {}).get("name") or self.folder.parent.name)

    @property
    def model(self) -> str | None:
        """The model's name; of a run without one the geometry."""
        model, task = self.config.get("model") or {}, self.config.get("task") or {}
        return task.get("geometry") or model.get("name") or model.get("path")

    @property
    def pipeline(self) -> str:
        """Preset or method of the pipeline; ``dense`` without one."""
        pipeline = self.config.get("pipeline") or {}
        return str(pipeline.get("name") or pipeline.get("method") or "dense")

    def samples(self) -> list[dict[str, Any]]:
        """The finished samples, also of a run that is not done."""
        return read_rows(self.folder)

    def frame(self) -> Any:
        """One row per finished sample; as :meth:`Runs.frame`."""
        return table_of([{name: value for name, value in row.items() if name not in NESTED} for row in self.samples()])

    @property
    def facts(self) -> dict[str, Any]:
        """One row about the run: what it is, its state, how many samples are finished, its average (None unless it is done)."""
        return {
            "task": self.task,
            "model": self.model,
            "pipeline": self.pipeline,
            "state": self.state,
            "class": self.failure,
            "finished": len(self.samples()),
            "average": self.summary.get("average"),
            "protocol": self.summary.get("protocol"),
            "seed": self.config.get("seed"),
            "updated": str(self.status.get("updated", "")),
            "folder": str(self.folder),
        }

    def __repr__(self) -> str:
        return f"<Run {self.name}: {self.state}>"


class Runs(UserList[Run]):
    """A list of runs that a notebook shows as a table."""

    def frame(self) -> Any:
        """One row per run, see :attr:`Run.facts`: a pandas ``DataFrame``, or a pyarrow ``Table`` where pandas is not installed."""
        return table_of([run.facts for run in self])

    def samples(self) -> Any:
        """One row per finished sample of all runs, with the run's ``task``, ``model``, ``pipeline`` and ``folder``; as :meth:`frame`."""
        rows = []
        for run in self:
            same = {name: value for name, value in run.facts.items() if name in ("task", "model", "pipeline", "state", "folder")}
            rows += [same | {name: value for name, value in row.items() if name not in NESTED} for row in run.samples()]
        return table_of(rows)

    def to_pandas(self) -> Any:
        """The runs as a pandas ``DataFrame``. Raises ``ConfigError`` where pandas is not installed."""
        if find_spec("pandas") is None:
            raise ConfigError("to_pandas needs pandas, which is not installed: pip install pandas, or use frame(), a pyarrow table then")
        return self.frame()

    def _repr_html_(self) -> str:
        header = "".join(f"<th>{name}</th>" for name in SHOWN)
        body = "".join(
            "<tr>" + "".join(f"<td>{'–' if facts[name] is None else html.escape(str(facts[name]))}</td>" for name in SHOWN) + "</tr>"
            for facts in (run.facts for run in self)
        )
        return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def table_of(rows: list[dict[str, Any]]) -> Any:
    """Rows as a pandas ``DataFrame``, or as a pyarrow ``Table`` where pandas is not installed; absent fields are null."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    if find_spec("pandas") is not None:
        import pandas

        return pandas.DataFrame(columns)
    return _arrow(columns)


def _arrow(columns: dict[str, list[Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: _plain(values) for name, values in columns.items()})


def _plain(values: list[Any]) -> list[Any]:
    """Values of one type, as a column of Arrow must be: whole numbers beside fractions become fractions, any other mixture text."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) < 2:
        return values
    kind = float if kinds == {int, float} else str
    return [None if value is None else kind(value) for value in values]


def run_folders(root: Path) -> list[Path]:
    """The run folders under ``root``, sorted: ``<task>/<run>`` with a status, or with samples."""
    return sorted({path.parent for name in ("status.json", "samples.jsonl") for path in root.glob(f"*/*/{name}")})


def load_runs(folder: str | Path | None = None, **filters: Any) -> Runs:
    """The stored runs, oldest first: those under ``folder``, by default under ``$HIPEXP_RUNS`` or ``runs``.

    ``filters`` keep the runs that have these values: a name of :attr:`Run.facts` (``task="infbench"``, ``state="done"``,
    ``pipeline="3stage"``), where a list means any of its values. Raises ``ConfigError`` for another name or an unknown state.
    """
    known = ("task", "model", "pipeline", "state", "class", "protocol", "seed")
    for name in filters:
        if name not in known:
            raise ConfigError(f"{name}={filters[name]} is no filter of runs; use {', '.join(known)}")
    wanted = {name: value if isinstance(value, list | tuple | set) else [value] for name, value in filters.items()}
    for state in wanted.get("state", ()):
        if state not in STATES:
            raise ConfigError(f"state={state} must be one of {', '.join(STATES)}")
    runs = map(Run, run_folders(runs_root() if folder is None else Path(folder).expanduser()))
    kept = [run for run in runs if not wanted or all(run.facts[name] in values for name, values in wanted.items())]
    return Runs(sorted(kept, key=lambda run: (run.changed, run.name)))


def find_run(word: str, runs: Iterable[Run] | None = None) -> Run:
    """The run that ``word`` means: a folder, or a beginning that only one run has of its name, of ``task/name``, or of its key.

    Raises ``ConfigError`` if there is none, or if there are several.
    """
    folder = Path(word).expanduser()
    if any((folder / name).is_file() for name in ("status.json", "samples.jsonl")):
        return Run(folder.resolve())
    runs = load_runs() if runs is None else list(runs)
    word = word.rstrip("/")
    found = [run for run in runs if any(name.startswith(word) for name in (run.name, run.folder.name, run.folder.name.rsplit("_", 1)[-1]))]
    exact = [run for run in found if word in (run.name, run.folder.name)]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if not found:
        raise ConfigError(f"{word} is no run folder, and no run under {runs_root()} begins so; `python -m hipexp ls` lists them")
    names = ", ".join(run.name for run in found[:5]) + (", …" if len(found) > 5 else "")
    raise ConfigError(f"{word} begins the names of {len(found)} runs: {names}; give more of the name")
