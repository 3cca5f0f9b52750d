"""The points of a ``tune`` and what became of them: an Optuna study in a journal file, which processes share and a kill leaves whole.

Every point is drawn by a sampler with a seed of its own, so that a study that was stopped draws the same points as one that was not
(unless it was killed in the middle of drawing one: what was left of that is drawn anew).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from hipexp.config.convert import to_plain, to_schema
from hipexp.config.schema import ConfigError, Pipeline
from hipexp.run.ledger import is_held, locked, make_folder, on_disk
from hipexp.tune.objectives import Objective

# What a point may be beside measured: refused by the checks, too many bytes, the same as another, hopeless by its recall, failed.
KINDS = ("measured", "invalid", "bytes", "repeated", "recall", "failed")
FOUND = ("bytes", "attended_bytes", "recall", "scores", "decode_ms", "prefill_ms")  # what is found out of a point
SAMPLERS = ("tpe", "random")
RANDOM_FIRST = 20  # points before the sampler has something to go by
MOVE = "move the folder away, or give another name=: what the model answered lies in run folders and is found again"
NEEDS = "tune needs the package optuna, which is not installed here: python -m pip install 'hipexp[tune]'"


def optuna() -> Any:
    """Optuna, silent. Raises ``ConfigError`` where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(NEEDS) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@dataclass
class Point:
    """A drawn pipeline and what is known of it.

    ``scores``, ``decode_ms`` and ``prefill_ms`` are those of single prompts, by rung; ``kind`` None: it is not decided yet;
    ``asked``: it is the model's turn. A point whose run failed is of the kind "failed" until another call asks it again.
    """

    number: int
    pipeline: Pipeline | None = None
    rules: str = ""
    bytes: float = 0.0  # 0: not counted
    attended_bytes: float = 0.0
    recall: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    decode_ms: dict[str, list[float]] = field(default_factory=dict)
    prefill_ms: dict[str, list[float]] = field(default_factory=dict)
    kind: str | None = None
    why: str = ""
    asked: bool = False

    def value(self, name: str) -> float | None:
        """Of an objective: the mean over all prompts; None while it is not known."""
        found = getattr(self, name if name != "score" else "scores")
        if isinstance(found, dict):
            found = [x for rung in found.values() for x in rung]
        if isinstance(found, list):
            return sum(found) / len(found) if found else None
        return found or None  # every pipeline reads something

    def values(self, objectives: Sequence[Objective]) -> list[float]:
        """Of all objectives of a point that was measured."""
        found = [value for one in objectives if (value := self.value(one.name)) is not None]
        assert len(found) == len(objectives), f"point {self.number} is not measured"
        return found

    def is_known(self, objectives: Sequence[Objective]) -> bool:
        """Whether there is a value for every objective."""
        return all(self.value(one.name) is not None for one in objectives)


@dataclass
class Study:
    """A study in ``folder``, held by this process as ``owner``."""

    folder: Path
    objectives: Sequence[Objective]
    sampler: str
    seed: int
    owner: str
    inner: Any  # optuna.Study
    _read: dict[int, Point] = field(default_factory=dict)  # finished ones

    def points(self) -> list[Point]:
        """All points so far, in order; those that are finished are the same objects every time."""
        found = []
        for trial in self.inner.get_trials(deepcopy=False):
            point = self._read.get(trial.number) or _point(trial)
            if trial.state.is_finished():
                self._read[trial.number] = point
            found.append(point)
        return found

    def next(self, limit: int) -> Any | None:
        """An Optuna trial to work on: one that its process has left, else a new one, or None if there are ``limit`` already."""
        import optuna

        with locked(self.folder / ".next"):
            trials = self.inner.get_trials(deepcopy=False)
            left = next((trial for trial in trials if self._is_left(trial)), None)
            if left is None and len(trials) >= limit:
                return None
            self.inner.sampler = self._sampler(len(trials) if left is None else left.number)
            trial = self.inner.ask() if left is None else optuna.trial.Trial(self.inner, left._trial_id)
            trial.set_user_attr("owner", self.owner)
            return trial

    def begun(self, trial: Any) -> Point:
        """What is known of a trial that is not finished; one that failed is asked again."""
        return replace(_point(trial), kind=None, why="")

    def leave(self, trial: Any) -> None:
        """Leave a trial as it is to whoever has the time for it."""
        trial.set_user_attr("owner", None)

    def in_work(self) -> int:
        """How many points are being worked on, by whomever, or were left; those that failed and have their process are neither."""
        trials = [trial for trial in self.inner.get_trials(deepcopy=False) if not trial.state.is_finished()]
        return sum(_point(trial).kind is None or self._is_left(trial) for trial in trials)

    def _is_left(self, trial: Any) -> bool:
        if trial.state.is_finished():
            return False
        owner = trial.user_attrs.get("owner")
        return owner is None or not is_held(self.folder / "owners" / owner)

    def _sampler(self, number: int) -> Any:
        import optuna

        seed = (self.seed * 1_000_003 + number) % 2**32
        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # groups are for stages that there may not be
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=RANDOM_FIRST)

    def note(self, trial: Any, point: Point) -> None:
        """Write down what is known of a point."""
        trial.set_user_attr("point", to_plain(point))

    def tell(self, trial: Any, point: Point) -> None:
        """Write down what is known of a point, which is decided, and let the sampler know.

        One that failed is not finished by that: it is this process's, and when that is gone it is there to be asked again.
        """
        from optuna.trial import TrialState

        self.note(trial, point)
        if point.kind == "failed":
            return
        if point.kind in ("measured", "repeated") and point.is_known(self.objectives):
            self.inner.tell(trial, point.values(self.objectives))
        else:
            self.inner.tell(trial, state=TrialState.PRUNED)


def _point(trial: Any) -> Point:
    told = trial.user_attrs.get("point", {"number": trial.number})
    return Point(**told | {"pipeline": told.get("pipeline") and to_schema(told["pipeline"], Pipeline)})


def picker(trial: Any) -> Any:
    """How the parameters of a space are drawn in a trial: numbers by their place in the list, so that neighbours are alike."""

    def pick(name: str, options: Sequence[Any]) -> Any:
        if len(options) == 1:
            return options[0]
        if all(type(option) is int for option in options):
            return options[trial.suggest_int(name, 0, len(options) - 1)]
        return trial.suggest_categorical(name, options)

    return pick


@contextmanager
def open_study(folder: Path, objectives: Sequence[Objective], sampler: str, seed: int) -> Iterator[Study]:
    """The study in ``folder``, new or as it was left. Raises ``ConfigError`` without Optuna, and for a journal that is damaged."""
    module = optuna()
    from optuna.storages.journal import JournalFileBackend

    owner = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    make_folder(folder / "owners" / owner)
    try:
        with locked(folder / "owners" / owner / ".lock"):
            path = folder / "journal.log"
            lock = _Lock(folder / ".journal", path)
            lock.acquire()
            lock.release()
            directions = [one.direction for one in objectives]
            try:
                storage = module.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=cast(Any, lock)))
                inner = module.create_study(storage=storage, study_name="tune", directions=directions, load_if_exists=True)
            except (ValueError, KeyError) as error:
                raise ConfigError(f"{path} is damaged ({error}); {MOVE}") from error
            yield Study(folder, objectives, sampler, seed, owner, inner)
    finally:
        shutil.rmtree(folder / "owners" / owner, ignore_errors=True)


def mend(path: Path) -> None:
    """Cut off a last line that is not whole: a process was killed while it wrote it."""
    with on_disk(path):
        if not path.exists() or not (size := path.stat().st_size):
            return
        with open(path, "rb") as file:
            file.seek(size - 1)
            if file.read() == b"\n":
                return
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


class _Lock:
    """A lock of a journal that ends with its process; Optuna's own are files that a killed process leaves.

    Who has it finds a journal of whole lines, whatever became of the process that had it before.
    """

    def __init__(self, path: Path, journal: Path):
        self._path, self._journal, self._file = path, journal, -1

    def acquire(self) -> bool:
        """Wait for it."""
        with on_disk(self._path):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        mend(self._journal)
        return True

    def release(self) -> None:
        """Give it up."""
        os.close(self._file)
