"""What a run has to do, whoever does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hipexp.run.ledger import Ledger
from hipexp.track import Trackers


@dataclass(frozen=True)
class Job:
    """``points``: subtask and number of every line of ``samples.jsonl``. ``card``: the protocol, with the ``strategy`` in words.

    ``measure(ledger, trackers)`` does what is not in the ledger yet and returns the result part of the summary.
    """

    points: list[tuple[str, int]]
    card: dict[str, Any]
    measure: Callable[[Ledger, Trackers], dict[str, Any]]
