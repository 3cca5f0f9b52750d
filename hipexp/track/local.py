"""The local tracker: one line of ``log.txt`` per finished sample. The run folder itself is the source of truth."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

LOG = logging.getLogger("hipexp")


class LocalTracker:
    """Follows a run in its ``log.txt``; see ``hipexp.track.Tracker``."""

    def start(self, folder: Path, config: dict[str, Any], card: dict[str, Any]) -> None:
        LOG.info("start %s", folder)

    def log(self, row: dict[str, Any], means: dict[str, float]) -> None:
        mean = means.get(row["subtask"])
        so_far = "" if mean is None else f", mean so far {mean:.1f}"
        took = f"request {row['request_ms']:.0f} ms" if row["prefill_ms"] is None else f"prefill {row['prefill_ms']:.0f} ms"
        LOG.info("%s %s: score %s, %s%s", row["subtask"], row["sample"], row["score"], took, so_far)

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        LOG.info("stopped early" if summary is None else f"done, average {summary['average']}, protocol {summary['protocol']}")
