"""Scores of RULER's 13 tasks by the official rules (arXiv 2404.06654): how many of the references the output holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hipexp.config.schema import ConfigError

EDITIONS = ("2026-07",)  # the scorer of 2024 has the same rules; editions of the generator differ, and rows come from there
SCORER = "hipexp-1: rules of NVIDIA/RULER c3f5e3b"
DECIMALS = 2
NEEDLES = tuple(f"niah_{kind}" for kind in ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3"))
METRICS = {
    **dict.fromkeys((*NEEDLES, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"), "share_of_references"),
    **dict.fromkeys(("qa_1", "qa_2"), "any_reference"),
}


def score_ruler(subtask: str, prediction: str, references: Sequence[str]) -> float:
    """0 to 100: the share of ``references`` in the output, in any case of letters; for ``qa_1`` and ``qa_2`` all if there is one."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    hits = [reference.lower() in text for reference in references]
    return 100.0 * (any(hits) if METRICS[subtask] == "any_reference" else sum(hits) / len(hits))


def split_name(row: dict[str, Any]) -> tuple[str, int | None]:
    """Task and target length of a row, from ``task@length`` or from ``length``; None if it names no length."""
    task, at, length = row["subtask"].partition("@")
    if not at:
        return task, row.get("length")
    if not re.fullmatch("[1-9][0-9]*", length):
        raise ConfigError(f"subtask={row['subtask']!r} must be a task, or <task>@<length in tokens>")
    return task, int(length)


def check_row(row: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for a row that cannot be scored."""
    task, length = split_name(row)
    if task not in METRICS:
        raise ConfigError(f"subtask={task!r} is no task of RULER; use one of {', '.join(METRICS)}")
    if length is not None and (type(length) is not int or length < 1):
        raise ConfigError(f"length={length!r} must be the target length in tokens, a positive whole number")
    for reference in row["references"]:
        if not isinstance(reference, str) or not reference:
            raise ConfigError(f"references holds {reference!r}, but each must be a text that is not empty (it would be in every output)")


def score_row(row: dict[str, Any], edition: str) -> float:
    """The score of a row, 0 to 100."""
    return score_ruler(split_name(row)[0], row["prediction"], row["references"])


def grouped(row: dict[str, Any], score: float) -> dict[str, float]:
    """A row's score, under the name of its task and, where it has one, its target length."""
    task, length = split_name(row)
    return {task if length is None else f"{task}@{length}": score}


def metric_of(name: str) -> str:
    """The metric behind a score."""
    return METRICS[name.partition("@")[0]]


def averages(scores: dict[str, float]) -> dict[str, float]:
    """The mean over tasks at each length and, for several lengths with the same tasks, plain and weighted means over lengths.

    The name says how many tasks are in it: ``13_tasks``, or as in ``5_of_13_tasks``. Weights rise or fall by one per length.
    """
    tasks_at: dict[int, dict[str, float]] = {}
    for name, score in scores.items():
        task, _, length = name.partition("@")
        tasks_at.setdefault(int(length or 0), {})[task] = score
    lengths = sorted(tasks_at)
    means = [sum(tasks_at[length].values()) / len(tasks_at[length]) for length in lengths]
    found = {list_name(tasks_at[length]) + (f"@{length}" if length else ""): mean for length, mean in zip(lengths, means, strict=True)}
    if len(lengths) > 1 and 0 not in lengths and len({frozenset(tasks) for tasks in tasks_at.values()}) == 1:
        name, rising = list_name(tasks_at[lengths[0]]), list(range(1, len(lengths) + 1))
        found[name] = sum(means) / len(means)
        found[f"{name}_weights_rising"] = weighted(means, rising)
        found[f"{name}_weights_falling"] = weighted(means, rising[::-1])
    return found


def list_name(tasks: dict[str, float]) -> str:
    """How a mean over these tasks is called."""
    return f"{len(METRICS)}_tasks" if len(tasks) == len(METRICS) else f"{len(tasks)}_of_{len(METRICS)}_tasks"


def weighted(values: list[float], weights: list[int]) -> float:
    """The mean of ``values`` by ``weights``."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
