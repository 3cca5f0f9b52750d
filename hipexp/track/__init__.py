"""Who is told about a run besides its folder. ``local`` is always on; others join when ``track=`` chooses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from hipexp.config.schema import Track


class Tracker(Protocol):
    """Something that follows a run. All values are plain data; nothing a tracker does can change a result."""

    def start(self, folder: Path, config: dict[str, Any], card: dict[str, Any]) -> None:
        """The run begins, or goes on after a stop."""

    def log(self, row: dict[str, Any], means: dict[str, float]) -> None:
        """A sample is finished; ``means`` are the mean scores so far, per subtask."""

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """The run is complete, or stopped early if ``summary`` is None."""


def open_trackers(track: Track) -> list[Tracker]:
    """The trackers of a run: the local one, and the one ``track`` names."""
    from hipexp.track.local import LocalTracker

    if track.name == "local":
        return [LocalTracker()]
    from hipexp.track.wandb import WandbTracker

    return [LocalTracker(), WandbTracker(track)]
