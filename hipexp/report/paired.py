"""Differences to dense attention, sample by sample, under one protocol; and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hipexp.report.gather import Gathered, groups_of
from hipexp.report.pairs import judged

# Of several dense runs of a sample the newest counts. Prompts of another length are other prompts.
PAIRS = """
WITH dense AS (
  SELECT * FROM samples WHERE dense AND value IS NOT NULL
  QUALIFY row_number() OVER (PARTITION BY pid, subtask, sample, length_tok, context_tok, depth ORDER BY changed DESC, run) = 1
)
SELECT ours.run, ours.subtask, ours.length_tok, ours.sample, ours.value AS score, dense.value AS dense_score, dense.run AS dense_run
FROM samples AS ours JOIN dense
  ON ours.pid = dense.pid AND ours.subtask = dense.subtask AND ours.sample = dense.sample
  AND ours.length_tok = dense.length_tok AND ours.context_tok = dense.context_tok AND ours.depth IS NOT DISTINCT FROM dense.depth
WHERE NOT ours.dense AND ours.value IS NOT NULL
ORDER BY ours.run, ours.subtask, ours.length_tok, ours.sample
"""


def pairs_of(gathered: Gathered) -> list[dict[str, Any]]:
    """Every sample of a run that is not dense, beside the dense one."""
    return gathered.query(PAIRS) if any(run.is_dense for run in gathered.counted) else []


def differences(pairs: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What :func:`hipexp.report.pairs.judged` says of our scores (B) beside the dense ones (A).

    By ``run`` or ``run, subtask, length_tok``, or whatever ``keys`` name.
    """
    groups = groups_of(pairs, lambda pair: tuple(pair[name] for name in keys))
    return {key: judged([(pair["dense_score"], pair["score"]) for pair in mine]) for key, mine in groups.items()}
