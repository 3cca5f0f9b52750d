"""``python -m hipexp -m …``: the points of a command line through one of Hydra's launchers, in this process or elsewhere."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipexp.config import compose
from hipexp.config.overrides import is_hydra
from hipexp.config.schema import ConfigError, Experiment
from hipexp.output import DRY, JSON, QUIET, Flags, to_json
from hipexp.report.runs import Run
from hipexp.report.tables import text_table
from hipexp.run.ledger import classify, make_folder, read_json, runs_root
from hipexp.run.plan import checked_plan, show
from hipexp.run.point import check_point, folder_of, missing_folder, prepare, stored
from hipexp.suites.sample import DataMissing

DONE, FAILED, BAD_INPUT = 0, 1, 2
RunOne = Callable[[Experiment, list[str], Flags, bool], int]  # the last: whether it prints what --json and --quiet ask for
Explain = Callable[[Exception], int]


@dataclass(frozen=True)
class Point:
    """A point, its overrides, and ``name``: those that others have otherwise. ``refused``: why it cannot run; ``experiment`` is None where
    that is its configuration."""

    words: str
    name: str
    experiment: Experiment | None
    refused: Exception | None = None

    @property
    def folder(self) -> Path | None:
        """Its run folder; None for a configuration that is refused."""
        if self.experiment is None or isinstance(self.refused, ConfigError):
            return None
        return missing_folder(self.experiment) if self.refused else folder_of(self.experiment)

    def code(self) -> int:
        """The exit code that it has come to."""
        if self.refused:
            return BAD_INPUT
        return DONE if self.experiment is not None and stored(self.experiment) else FAILED

    def record(self) -> dict[str, Any]:
        """Its summary and folder, or why there is none, as plain data."""
        folder = self.folder
        if folder is not None and self.code() == DONE:
            return read_json(folder / "summary.json") | {"folder": str(folder)}
        status = {} if folder is None else read_json(folder / "status.json")
        told = {"status": status.get("state", "to do"), "class": status.get("class"), "message": status.get("message")}
        if self.refused:
            told = {"status": "refused", "class": classify(self.refused), "message": str(self.refused)}
        return {"overrides": self.words} | told | {"folder": folder and str(folder)}

    def cells(self) -> list[Any]:
        """Its line of the table."""
        told = self.record()
        if self.refused or self.folder is None:
            return [self.name, f"refused: {told['class']}", None, self.folder and self.folder.name]
        state = Run(self.folder).outcome if (self.folder / "status.json").exists() else "to do"
        return [self.name, state, told.get("average"), self.folder.name]


def run_sweep(overrides: list[str], flags: Flags, run_one: RunOne, explain: Explain) -> int:
    """Check all points, then run them through Hydra's launcher with ``run_one``: neither a refusal nor a failure stops the others.

    Returns the worst exit code. Raises ``ConfigError`` or ``DataMissing`` if every point is refused.
    """
    points = points_of(overrides, prepare)
    tell_refused(points)
    launcher, codes, same = launcher_of(overrides), list[int](), common(compose.sweep_points(overrides)) if points else set[str]()
    apart = launcher != "basic" and not launcher.startswith("submitit")  # several at once on one terminal

    def job(make: Callable[[], Experiment], words: list[str], folder: Path) -> None:
        name = name_of(words, same)
        with _log_of(name, folder / "job.log") if apart else nullcontext():
            try:
                codes.append(run_one(make(), words, flags, not points))
            except Exception as error:
                codes.append(explain(error))
        if apart:
            print(f"{name}: {'done' if codes[-1] == DONE else 'failed'}; log: {folder / 'job.log'}", file=sys.stderr, flush=True)

    with _launch_folder(launcher) as folder:
        compose.run_sweep(overrides, job, folder)
    if points:
        tell(points, flags)
    return max(codes or [point.code() for point in points])  # no codes: the launcher ran the points in other processes


def points_of(overrides: list[str], check: Callable[[Experiment], None] = check_point) -> list[Point]:
    """The points of a sweep, checked; none for a sweeper that chooses them as it goes. Raises what refuses all of them."""
    if chooses(overrides):
        compose.compose_point([word for word in overrides if is_hydra(word)])
        return []
    each = compose.sweep_points(overrides)
    same = common(each)
    points = [_point(words, name_of(words, same), check) for words in each]
    if all(point.refused for point in points):
        assert points[0].refused is not None
        raise points[0].refused
    return points


def _point(words: list[str], name: str, check: Callable[[Experiment], None]) -> Point:
    experiment = None
    try:
        experiment = compose.compose_point(words)
        check(experiment)
    except (ConfigError, DataMissing) as error:
        return Point(in_words(words), name, experiment, error)
    return Point(in_words(words), name, experiment)


def common(each: Sequence[list[str]]) -> set[str]:
    """The words that all points of a sweep have; none if there is one point."""
    return set.intersection(*map(set, each)) if len(each) > 1 else set()


def name_of(words: Sequence[str], same: set[str]) -> str:
    """What to call a point beside others that share the words ``same``."""
    return in_words([word for word in words if word not in same])


def in_words(words: Sequence[str]) -> str:
    """Overrides as they are told, without Hydra's own."""
    return " ".join(word.lstrip("+") for word in words if not is_hydra(word)) or "defaults"


def tell(points: Sequence[Point], flags: Flags) -> None:
    """Print what became of the points: a table, with ``--json`` a line for each, with ``--quiet`` the folders of those that are done."""
    if JSON in flags:
        print("\n".join(to_json(point.record()) for point in points), flush=True)
    elif QUIET in flags:
        print("\n".join(str(point.folder) for point in points if point.code() == DONE), flush=True)
    else:
        print(text_table(["point", "state", "average", "folder"], [point.cells() for point in points], left=2))
        print(f"{sum(point.code() == DONE for point in points)} of {len(points)} points are done; their folders are under {runs_root()}")


def launcher_of(overrides: list[str]) -> str:
    """The launcher that the command line chooses."""
    chosen = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("hydra/launcher=")]
    return (chosen or ["basic"])[-1]


@contextmanager
def _log_of(name: str, path: Path) -> Iterator[None]:
    """What is printed inside the block goes into a file; where that is, is told first."""
    make_folder(path.parent)
    print(f"{name}: begins", file=sys.stderr, flush=True)
    with open(path, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        yield


@contextmanager
def _launch_folder(launcher: str) -> Iterator[Path]:
    """Where a launcher keeps its notes: under the runs, which the machines of a cluster share, or, for Hydra's own, nowhere for long."""
    if launcher == "basic":
        with tempfile.TemporaryDirectory(prefix="hipexp-sweep-") as folder:
            yield Path(folder)
        return
    place = (runs_root() / "sweep" / f"launch_{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}").resolve()
    make_folder(place)
    print(f"notes and logs of the launcher {launcher}: {place}", file=sys.stderr)
    yield place


def show_plans(overrides: list[str], flags: Flags) -> int:
    """Print what the points of a sweep would do; 0, or 2 if some are refused. Raises what refuses all, or that nobody knows the points."""
    if chooses(overrides):
        raise ConfigError(f"{DRY} cannot tell the points of a hydra/sweeper that chooses them as it goes; leave one of them out")
    plans: dict[int, dict[str, Any]] = {}

    def look(experiment: Experiment) -> None:
        plans[id(experiment)] = checked_plan(experiment, flags)

    points = points_of(overrides, look)
    tell_refused(points)
    show([(point.words, plans[id(point.experiment)]) for point in points if not point.refused], flags)
    return BAD_INPUT if any(point.refused for point in points) else DONE


def chooses(overrides: list[str]) -> bool:
    """Whether a sweeper chooses the points as it goes."""
    return any(word.lstrip("+").startswith("hydra/sweeper=") for word in overrides)


def tell_refused(points: Sequence[Point]) -> None:
    """Say on stderr which points cannot run, and why."""
    for point in points:
        if point.refused:
            print(f"refused: {point.words}: {' '.join(str(point.refused).split())}", file=sys.stderr)
