"""Several points in one process: the model is loaded once, and only if something is left to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.check import OFFLOADING
from hipexp.config.compose import compose
from hipexp.config.model import read_facts
from hipexp.config.schema import ConfigError, Experiment, Model
from hipexp.run.identity import model_revision
from hipexp.run.ledger import is_held, make_folder, read_json, read_rows, stoppable
from hipexp.run.point import check_point, execute, folder_of, load_model, stored

if TYPE_CHECKING:
    from hipexp.hf import Loaded
    from hipexp.run.point import Load


FREE_GROUPS = ("model", "seed", "track", "offload")


@dataclass(frozen=True)
class Named:
    """An experiment point and what to call it in progress lines and tables."""

    name: str
    experiment: Experiment

    def rows(self) -> list[dict[str, Any]]:
        """Its finished samples."""
        return read_rows(folder_of(self.experiment))

    def machine(self) -> str | None:
        """What it ran on; None while nothing has begun."""
        found = read_json(folder_of(self.experiment) / "env.json")
        return f"{found['device']}, {found['threads']} thread(s), torch {found['packages']['torch']}" if found else None

    def summary(self) -> dict[str, Any]:
        """Its ``summary.json``; empty while it is not done."""
        return read_json(folder_of(self.experiment) / "summary.json") if stored(self.experiment) else {}


def told(runs: Iterable[Named], **files: Path) -> dict[str, Any]:
    """What ``--json`` says of a table: its files, and the runs behind it, each with its summary (None while it is not done)."""
    each = [{"name": run.name, "folder": str(folder_of(run.experiment)), "summary": run.summary() or None} for run in runs]
    return {name: str(path) for name, path in files.items()} | {"runs": each}


def refuse_own(command: str, overrides: Sequence[str], free: Sequence[str] = ()) -> None:
    """Refuse overrides of what ``command`` varies itself, so that no table says one thing and shows another.

    Left to the user are model, seed, tracking, the offload of points with a pipeline, and the keys in ``free``. Raises ``ConfigError``.
    """
    for word in overrides:
        key = word.lstrip("+~-").split("=")[0]
        if key not in free and key.split(".")[0] in ("task", "pipeline"):
            allowed = ", ".join((*FREE_GROUPS, *free))
            raise ConfigError(
                f"{word} cannot be changed in `{command}`, which chooses tasks and pipelines itself; left to you are {allowed}"
            )


def compose_named(name: str, words: Sequence[str], overrides: Sequence[str]) -> Named:
    """The point of a command's own ``words`` and the user's ``overrides``; what cannot be offloaded is resident, whatever the offload."""
    experiment = compose([*words, *resident(overrides)])
    if experiment.pipeline is not None and experiment.pipeline.method in OFFLOADING:
        experiment = compose([*words, *overrides])
    return Named(name, experiment)


def resident(overrides: Sequence[str]) -> list[str]:
    """The overrides without those of an offload, which dense attention does not go with."""
    return [word for word in overrides if not word.lstrip("+~-").startswith(("offload=", "offload."))]


def model_line(model: Model) -> str:
    """Which model a table is of."""
    return f"model: {model.name or model.path}, revision {model_revision(model)}"


def trained_length(model: Model) -> int:
    """The trained length of a model on this machine; ``ConfigError`` for one that is still on a hub."""
    facts = read_facts(model)
    if facts is None:
        raise ConfigError(f"model.path={model.path} is on a hub; this command needs a model in a folder")
    return facts.trained_tok


def load_once() -> Load:
    """A ``load`` that keeps the last model, for as long as its files stay the same."""
    kept: dict[str, Any] = {}

    def load(model: Model) -> Loaded:
        asked = (model, model_revision(model))
        if kept.get("of") != asked:
            kept.update(of=asked, loaded=load_model(model))
        return kept["loaded"]

    return load


def run_all(points: Sequence[Named], load: Load | None = None, after: Callable[[], object] = lambda: None) -> None:
    """Run what is not done yet, in order, telling what comes next, and ``after`` each of them.

    Raises what a run raises; finished points are kept. What another process is running comes last: processes with the same points
    share them. All are checked before the first one runs.
    """
    left = [point for point in points if not stored(point.experiment)]
    for point in left:
        check_point(point.experiment)
    load, total = load or load_once(), len(left)
    while left:
        point = next((point for point in left if not is_held(folder_of(point.experiment))), left[0])
        print(f"[{total - len(left) + 1}/{total}] {point.name}", flush=True)
        execute(point.experiment, load)
        after()
        left = [other for other in left if other is not point and not stored(other.experiment)]


def split_jobs(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number of processes that ``jobs=`` asks for, 1 without it, and the other words.

    Raises ``ConfigError`` for no such number, and for two.
    """
    asked = [word.removeprefix("jobs=") for word in words if word.startswith("jobs=")]
    if len(asked) > 1:
        raise ConfigError(f"jobs= is said {len(asked)} times ({', '.join(asked)}); say it once")
    (jobs,) = asked or ["1"]
    if not jobs.isascii() or not jobs.isdecimal() or int(jobs) < 1:
        raise ConfigError(f"jobs={jobs} must be a whole number from 1, of processes that share the runs; try jobs={os.cpu_count()}")
    return int(jobs), [word for word in words if not word.startswith("jobs=")]


@contextmanager
def helpers(points: Sequence[Any], jobs: int, folder: Path, work: Callable[[Sequence[Any]], object] = run_all) -> Iterator[None]:
    """``jobs - 1`` more processes at the same ``points`` while the block lasts, which runs them too; ``work`` is what they do with them.

    Every process has its part of the threads. What they print goes to ``job-2.log`` and so on in
    ``folder``. One that fails leaves its points to the others; all end with the block, also where this process is asked to stop (SIGTERM).
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    logs = [folder / f"job-{number}.log" for number in range(2, jobs + 1) if points]
    if logs:
        make_folder(folder)
    make = get_context("spawn").Process
    started = [make(target=_help, args=(work, list(points), torch.get_num_threads(), log), daemon=True) for log in logs]
    with stoppable():
        try:
            for process in started:
                process.start()
            yield
            for process, log in zip(started, logs, strict=True):
                process.join()
                if process.exitcode:
                    print(f"a process failed, the others did its work; why: {log}")
        finally:
            for process in started:
                if process.is_alive():
                    process.terminate()
                    process.join()
            torch.set_num_threads(before)


def _help(work: Callable[[Sequence[Any]], object], points: Sequence[Any], threads: int, log: Path) -> None:
    """What such a process does."""
    import torch

    torch.set_num_threads(threads)
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            work(points)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            sys.exit(1)
