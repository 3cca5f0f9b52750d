"""How the points of a ``tune`` run: here with the model loaded once, in several processes, or through one of Hydra's launchers."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hipexp.config import compose
from hipexp.config.schema import Experiment, Pipeline
from hipexp.run.ledger import classify, make_folder, read_json
from hipexp.run.point import Load, execute
from hipexp.run.several import Named, helpers
from hipexp.run.sharing import Shared, run_each

LOG = logging.getLogger("hipexp")


@dataclass(frozen=True)
class Prompts:
    """The prompts that pipelines are asked: those of ``experiment``, by its ``words``, but ``samples`` of each subtask and a ``seed``."""

    experiment: Experiment
    words: tuple[str, ...]
    samples: int
    seed: int

    @property
    def own(self) -> list[str]:
        """The words of these prompts."""
        return [*self.words, f"task.samples={self.samples}", f"seed={self.seed}"]

    def of(self, name: str, pipeline: Pipeline | None) -> Named:
        """The run of a pipeline, by the name of a preset or the path of a file: what ``+pipeline=<name>`` and the words would run.

        None is that of ``dense``.
        """
        stem, task = Path(name).stem, replace(self.experiment.task, samples=self.samples)
        own = replace(self.experiment, task=task, seed=self.seed, pipeline=pipeline and replace(pipeline, name=stem))
        return Named(f"{stem}, {self.samples} prompt(s) of each subtask", own)


@dataclass(frozen=True)
class Launch:
    """Where runs happen: ``hydra`` holds the words of a launcher, else ``jobs`` processes here; notes go into ``folder``."""

    hydra: Sequence[str]
    jobs: int
    folder: Path
    load: Load

    @property
    def at_once(self) -> int:
        """How many pipelines are run beside each other; 0: as many as there are."""
        return 0 if self.hydra else self.jobs

    def run(self, prompts: Prompts, pipelines: Mapping[str, Pipeline | None]) -> dict[str, Path | str]:
        """Ask pipelines, by the names of presets and paths of files, all of the prompts; returns the run folder of each, or why it failed.

        What is stored is not run again.
        """
        points = {name: Shared.of(prompts.of(name, pipeline)) for name, pipeline in pipelines.items()}
        left = list({point.key: point for point in points.values() if not point.done}.values())
        if left:
            with redirect_stdout(sys.stderr):
                if self.hydra:
                    self._launch(prompts, [name for name, point in points.items() if point in left])
                else:
                    with helpers(left, min(self.jobs, len(left)), self.folder, run_each):
                        run_each(left, load=self.load)
        return {name: point.folder if point.done else _why(point.folder) for name, point in points.items()}

    def _launch(self, prompts: Prompts, pipelines: Sequence[str]) -> None:
        """All at once through the launcher, which comes back when they are over."""
        names = ",".join(f"'{name}'" if name.endswith(".yaml") else name for name in pipelines)
        line = compose.read_line(["-m", *self.hydra, f"+pipeline={names}", *prompts.own])
        notes = self.folder / "launch"
        make_folder(notes)
        compose.run_sweep(line.overrides, attempt, notes.resolve())


def attempt(composed: Callable[[], Experiment], words: list[str], folder: Path) -> None:
    """Run a point in a process of a launcher; the run folder says what became of it."""
    try:
        execute(composed())
    except Exception as error:
        LOG.error("%s failed (%s): %s", shlex.join(words), classify(error), error)


def _why(folder: Path) -> str:
    told: dict[str, Any] = read_json(folder / "status.json")
    return f"{told.get('class', 'error')}: {told.get('message', 'its run did not begin')} (log: {folder / 'log.txt'})"
