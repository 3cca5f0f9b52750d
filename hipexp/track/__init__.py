"""Who is told about a run besides its folder. ``local`` is always on; others join when ``track=`` chooses them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Protocol

from hipexp.config.schema import Track

LOG = logging.getLogger("hipexp")


class Tracker(Protocol):
    """Something that follows a run. All values are plain data."""

    def start(self, folder: Path, config: dict[str, Any], card: dict[str, Any]) -> None:
        """The run begins, or goes on after a stop."""

    def log(self, row: dict[str, Any], means: dict[str, float]) -> None:
        """A sample is finished; ``means`` are the mean scores so far, per subtask."""

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """The run is complete, or stopped early if ``summary`` is None."""


class Trackers:
    """Several trackers as one. One that fails after its start is reported and left out: the run folder has everything anyway."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def start(self, folder: Path, config: dict[str, Any], card: dict[str, Any]) -> None:
        """Start all; an error leaves this call, since nothing is lost yet."""
        for tracker in self._trackers:
            tracker.start(folder, config, card)

    def log(self, row: dict[str, Any], means: dict[str, float]) -> None:
        """Tell all of a finished sample."""
        self._tell("log", row, means)

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """Tell all that the run is over."""
        self._tell("finish", summary, pictures)

    def _tell(self, what: str, *words: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*words)
            except Exception as error:
                text = f"{type(tracker).__name__} failed ({type(error).__name__}: {error}); the run goes on without it"
                LOG.warning(text)
                print(text, file=sys.stderr)
                self._trackers.remove(tracker)


def open_trackers(track: Track) -> Trackers:
    """The trackers of a run: the local one, and the one ``track`` names."""
    from hipexp.track.local import LocalTracker

    if track.name == "local":
        return Trackers([LocalTracker()])
    from hipexp.track.wandb import WandbTracker

    return Trackers([LocalTracker(), WandbTracker(track)])
