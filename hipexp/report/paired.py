"""Differences to dense attention, sample by sample, under one protocol; and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hipexp.report.gather import Gathered, groups_of
from hipexp.suites.scoring.statistics import mean_interval

# Of several dense runs of a sample the newest counts. Prompts of another length are other prompts.
PAIRS = """
WITH dense AS (
  SELECT * FROM samples WHERE dense AND value IS NOT NULL
  QUALIFY row_number() OVER (PARTITION BY pid, subtask, sample, length_tok, context_tok, depth ORDER BY updated DESC, run) = 1
)
SELECT ours.run, ours.subtask, ours.length_tok, ours.sample, ours.value AS score, dense.value AS dense_score, dense.run AS dense_run
FROM samples AS ours JOIN dense
  ON ours.pid = dense.pid AND ours.subtask = dense.subtask AND ours.sample = dense.sample
  AND ours.length_tok = dense.length_tok AND ours.context_tok = dense.context_tok AND ours.depth IS NOT DISTINCT FROM dense.depth
WHERE NOT ours.dense AND ours.value IS NOT NULL
ORDER BY ours.run, ours.subtask, ours.length_tok, ours.sample
"""


@dataclass(frozen=True)
class Difference:
    """Our scores less the dense ones over ``n`` pairs of samples; ``interval`` (95 %, bootstrap) is None for a single pair.

    ``better`` and ``worse`` count answers that flipped: a higher, or a lower, score than the dense answer to the same sample.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None
    dense_mean: float
    better: int
    worse: int
    dense_runs: tuple[int, ...]


def pairs_of(gathered: Gathered) -> list[dict[str, Any]]:
    """Every sample of a run that is not dense, beside the dense one."""
    return gathered.query(PAIRS) if any(run.is_dense for run in gathered.counted) else []


def differences(pairs: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], Difference]:
    """The differences by ``run`` or ``run, subtask, length_tok``, or whatever ``keys`` name."""
    return {key: compare(mine) for key, mine in groups_of(pairs, lambda pair: tuple(pair[name] for name in keys)).items()}


def compare(pairs: Sequence[dict[str, Any]]) -> Difference:
    """The difference over some pairs, of which there is at least one."""
    steps = [pair["score"] - pair["dense_score"] for pair in pairs]
    better, worse = sum(step > 0 for step in steps), sum(step < 0 for step in steps)
    dense_mean = sum(pair["dense_score"] for pair in pairs) / len(pairs)
    runs = tuple(sorted({pair["dense_run"] for pair in pairs}))
    return Difference(len(pairs), sum(steps) / len(steps), interval_of(steps), dense_mean, better, worse, runs)


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of a mean, as the rest of hipexp computes it; None for one value. It does not depend on their order."""
    return _interval(tuple(sorted(values)))


@cache  # most cells of a sweep hold the same few scores
def _interval(values: tuple[float, ...]) -> tuple[float, float] | None:
    found = mean_interval(values)
    return None if found is None else (found[0], found[1])
