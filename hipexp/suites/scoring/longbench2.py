"""Scores of LongBench v2 by the official rule (arXiv 2412.15204): the letter that the output names as the correct answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hipexp.config.schema import ConfigError

EDITIONS = ("2025-01",)
SCORER = "hipexp-1: rules of THUDM/LongBench 2e00731"
DECIMALS = 1
SUBTASK = "longbench2"
DIFFICULTIES, LENGTHS = ("easy", "hard"), ("short", "medium", "long")
ANSWERS = (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])")
ORDER = ("overall", *DIFFICULTIES, *LENGTHS)
GUESS = 25.0  # what the compensated scores give for a missing answer: one of four options


def answer_of(prediction: str) -> str | None:
    """The letter that the output names, asterisks left out; None if it names none."""
    text = prediction.replace("*", "")
    found = [match for match in (re.search(pattern, text) for pattern in ANSWERS) if match]
    return found[0][1] if found else None


def score_longbench2(prediction: str, references: Sequence[str]) -> float:
    """100 if the output names the letter in ``references``, else 0."""
    return 100.0 * (answer_of(prediction) == references[0])


def check_row(row: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for a row that cannot be scored."""
    if row["subtask"] != SUBTASK:
        raise ConfigError(f"subtask={row['subtask']!r} must be {SUBTASK!r}: LongBench v2 has one task")
    if row["references"] not in (["A"], ["B"], ["C"], ["D"]):
        raise ConfigError(f"references={row['references']!r} must be one letter, as in ['A'] to ['D']")
    for key, known in (("difficulty", DIFFICULTIES), ("length", LENGTHS)):
        if row.get(key) not in known:
            raise ConfigError(f"{key}={row.get(key)!r} must be one of {', '.join(known)}")


def score_row(row: dict[str, Any], edition: str) -> float:
    """The score of a row, 0 to 100."""
    return score_longbench2(row["prediction"], row["references"])


def grouped(row: dict[str, Any], score: float) -> dict[str, float]:
    """A row's score in each of the groups that it belongs to, as it is and with a missing answer counted as a guess."""
    compensated = GUESS if answer_of(row["prediction"]) is None else score
    groups = ("overall", row["difficulty"], row["length"])
    return dict.fromkeys(groups, score) | {f"{group}_compensated": compensated for group in groups}


def metric_of(name: str) -> str:
    """The metric behind a score."""
    return "accuracy_compensated" if name.endswith("_compensated") else "accuracy"


def averages(scores: dict[str, float]) -> dict[str, float]:
    """None: every number of LongBench v2 is a mean over rows."""
    return {}
