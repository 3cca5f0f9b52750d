"""Two runs sample by sample: which samples pair, by how much scores differ, which answers flipped, which times compare."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hipexp.report.runs import Run
from hipexp.run.ledger import parse_rows
from hipexp.suites.scoring import scores_behind
from hipexp.suites.scoring.statistics import paired_difference

Row = dict[str, Any]


@dataclass
class Pairs:
    """Lines of the same sample in both runs, in the order of the first; ``left_out`` counts the other lines by reason."""

    lines: list[tuple[Row, Row]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def pair(a: Run, b: Run, same_protocol: bool) -> Pairs:
    """Pair the scored samples of two runs. A line without a partner, or without a score, pairs with nothing.

    ``same_protocol``: the cards agree, so that lines of the same subtask and number must also be of the same prompt: the same references,
    length, depth and number of tokens. Otherwise the references decide.
    """
    found = Pairs()
    mine, theirs = (scored_rows(run, side, found.left_out) for run, side in ((a, "A"), (b, "B")))
    identity = ("references", "length_tok", "depth", "context_tok") if same_protocol else ("references",)
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in theirs:
            found.left_out[f"only in A: {key[0]}"] += 1
        elif key not in mine:
            found.left_out[f"only in B: {key[0]}"] += 1
        elif any(mine[key].get(name) != theirs[key].get(name) for name in identity):
            found.left_out[f"another sample under the same number: {key[0]}"] += 1
        else:
            found.lines.append((mine[key], theirs[key]))
    return found


def scored_rows(run: Run, side: str, left_out: Counter[str]) -> dict[tuple[str, int], Row]:
    """The lines of a run that have a score, by subtask and number; the others are counted in ``left_out``."""
    try:
        rows, damaged = parse_rows((run.folder / "samples.jsonl").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        rows, damaged = [], 0
    if damaged:
        left_out[f"damaged, repeated, or without a finite score in {side}"] += damaged
    timed = sum(row["score"] is None for row in rows)
    if timed:
        left_out[f"no score in {side}"] += timed
    return {(row["subtask"], row["sample"]): row for row in rows if row["score"] is not None}


def score_rows_of(a: Run, b: Run, pairs: Pairs) -> list[Row]:
    """One row per score of the summaries (a subtask, or a group of an official scorer), and one for all pairs.

    ``a`` and ``b`` are the scores that the summaries report, with their intervals, None for a run that is not done; in the row of all
    they are means over the pairs, as every sample counts once there. The rest is of the pairs alone: their number ``n``, their means, the
    mean ``difference`` B less A with its 95 % interval, and how many became better and worse.
    """
    cells = [run.summary.get("scores", {}) for run in (a, b)]
    by_name: dict[str, list[tuple[float, float]]] = {}
    for ours, theirs in pairs.lines:
        left, right = (scores_in(run, row) for run, row in ((a, ours), (b, theirs)))
        for name in left.keys() & right.keys():
            by_name.setdefault(name, []).append((left[name], right[name]))
    rows = []
    for name in dict.fromkeys([*cells[0], *cells[1], *by_name]):
        told = [found.get(name, {}) for found in cells]
        reported = {side: told[i].get("score") for i, side in enumerate("ab")}
        reported |= {f"{side}_interval": told[i].get("interval") for i, side in enumerate("ab")}
        metric = told[0].get("metric") or told[1].get("metric")
        rows.append({"name": name, "metric": metric, **reported, **judged(by_name.get(name, []))})
    if len(rows) > 1:
        found = judged([(ours["score"], theirs["score"]) for ours, theirs in pairs.lines])
        means = {"a": found["a_mean"], "b": found["b_mean"], "a_interval": None, "b_interval": None}
        rows.append({"name": "all", "metric": None, **means, **found})
    return rows


def scores_in(run: Run, row: Row) -> dict[str, float]:
    """The score of a line under each name that the run's summary has for it."""
    return scores_behind(run.card["protocol"], run.card["suite"], row)


def judged(scores: list[tuple[float, float]]) -> Row:
    """What pairs of scores say: ``n``, means, ``difference`` with ``interval`` (None for one pair), ``better``, ``worse``."""
    empty = dict.fromkeys(("a_mean", "b_mean", "difference", "interval"))
    if not scores:
        return {"n": 0, **empty, "better": 0, "worse": 0}
    told = paired_difference([b for _, b in scores], [a for a, _ in scores])
    means = {f"{side}_mean": statistics.fmean(pair[i] for pair in scores) for i, side in enumerate("ab")}
    changed = {"better": sum(b > a for a, b in scores), "worse": sum(b < a for a, b in scores)}
    return {"n": told["n"], **means, "difference": told["mean"], "interval": told["interval"], **changed}


def flipped(pairs: Pairs) -> list[Row]:
    """The answers whose score differs, those that became worse most first."""
    found = [
        {
            "subtask": ours["subtask"],
            "sample": ours["sample"],
            "references": ours["references"],
            **{f"{side}_score": row["score"] for side, row in (("a", ours), ("b", theirs))},
            **{f"{side}_prediction": row["prediction"] for side, row in (("a", ours), ("b", theirs))},
        }
        for ours, theirs in pairs.lines
        if ours["score"] != theirs["score"] and ours["references"]
    ]
    return sorted(found, key=lambda row: row["b_score"] - row["a_score"])


def times(a: Run, b: Run) -> tuple[list[Row], list[str]]:
    """Rows of the latency of both runs at the same phase and length, and words on what only one of them measured.

    The measured attention of one run is set beside that of the other whatever their names, of a dense run its fastest; and dense beside
    dense. ``ratio``: A's mean milliseconds over B's, above 1 where B is faster.
    """
    mine, theirs = (_timed(run) for run in (a, b))
    rows, alone = [], []
    for key in dict.fromkeys([*mine, *theirs]):
        if key not in mine or key not in theirs:
            alone.append(f"only in {'A' if key in mine else 'B'}: {key[0]} at {key[1]} tokens, {key[2] or 'pipeline'}")
            continue
        left, right = mine[key], theirs[key]
        row = {"phase": key[0], "context_tok": key[1], "a_impl": left["impl"], "b_impl": right["impl"]}
        for name in ("mean_ms", "p10_ms", "p90_ms", "bytes"):
            row |= {f"a_{name}": left.get(name), f"b_{name}": right.get(name)}
        rows.append(row | {"ratio": left["mean_ms"] / right["mean_ms"]})
    return rows, alone


def _timed(run: Run) -> dict[tuple[str, int, str], Row]:
    """Rows with a time, by phase, length and name of the dense implementation; the name of what the run measured is empty."""
    found: dict[tuple[str, int, str], Row] = {}
    for row in run.summary.get("latency", {}).get("rows", []):
        if not row.get("mean_ms"):
            continue
        dense = row.get("dense", row["impl"] == "dense")
        found[row["phase"], row["context_tok"], row["impl"] if dense else ""] = row
        own = row["phase"], row["context_tok"], ""
        if dense and run.pipeline == "dense" and (own not in found or row["mean_ms"] < found[own]["mean_ms"]):
            found[own] = row
    return found
