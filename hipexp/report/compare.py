"""``python -m hipexp compare A B``: scores, intervals and flipped answers of two runs side by side, or their times.

Numbers are compared only where they mean the same: runs whose protocol cards differ, that are not done, or whose times are of different
machines, are refused with the reasons; ``--anyway`` compares them and shows the reasons above the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.output import answer, split_flags
from hipexp.report.differences import (
    Difference,
    brief,
    card_differences,
    config_differences,
    environment_differences,
    machine_differences,
)
from hipexp.report.pairs import flipped, pair, score_rows_of, times
from hipexp.report.runs import Run, find_run
from hipexp.report.tables import text_table

USAGE = "python -m hipexp compare A B [all=true] [--anyway] [--json] [--quiet], where A and B are run folders or beginnings of their names"
ANYWAY = "--anyway"
SHOWN, WIDTH = 10, 120  # flipped answers without all=true; characters of an answer


def main(words: list[str]) -> int:
    """Compare two runs. Raises ``ConfigError`` for words it does not know, and for runs that may not be compared."""
    flags, words = split_flags(words)
    named = [word for word in words if word not in (ANYWAY, "all=true", "all=false")]
    if len(named) != 2 or any(word.startswith("-") or word.startswith("all=") for word in named):
        raise ConfigError(f"compare takes two runs, not {' '.join(named) or 'none'}: {USAGE}")
    a, b = map(find_run, named)
    told = compare(a, b)
    if told["refused"] and ANYWAY not in words:
        reasons = "\n  ".join(told["refused"])
        raise ConfigError(f"{a.name} and {b.name} may not be compared (--anyway compares them all the same):\n  {reasons}")
    answer(flags, text(told, "all=true" in words), told, score_table(told["scores"]) or time_table(told["times"]))
    return 0


def compare(a: Run, b: Run) -> dict[str, Any]:
    """What two runs say of each other, as plain data; ``refused`` holds the reasons why they may not be compared, empty if they may.

    ``scores``: see ``hipexp.report.pairs.score_rows_of``; ``flipped``: answers whose score differs; ``left_out``: lines that pair
    with none, counted by reason; ``times``: see ``hipexp.report.pairs.times``; ``protocol``, ``machine``, ``config`` and ``environment``:
    what differs. Raises ``ConfigError`` for a run that has no protocol card, and for one with scores beside one with times.
    """
    for run in (a, b):
        if not {"protocol", "suite"} <= run.card.keys():
            raise ConfigError(f"{run.name} has no protocol card (card.json), so nobody knows what its numbers mean; run it again")
    timed = [run.card.get("suite") == "latency" for run in (a, b)]
    if timed[0] != timed[1]:
        raise ConfigError(f"{a.name} and {b.name} have nothing in common: one has scores and the other times; choose two runs of one task")
    protocol, machine = card_differences(a, b), machine_differences(a, b)
    pairs = pair(a, b, not protocol)
    rows, alone = times(a, b)
    if timed[0]:
        pairs.left_out.clear()  # what its lines hold are the times
    refused = [unfinished(run) for run in (a, b) if run.state != "done"]
    protocol = [one for one in protocol if one.key == "suite"] or protocol  # the rest follows from that
    refused += [f"{one.key} differs ({brief(one.a)} and {brief(one.b)}): {one.why}" for one in [*protocol, *(machine if timed[0] else [])]]
    return {
        "a": described(a),
        "b": described(b),
        "refused": refused,
        "scores": score_rows_of(a, b, pairs),
        "flipped": flipped(pairs),
        "left_out": dict(pairs.left_out) | dict.fromkeys(alone, 1),
        "times": rows,
        "protocol": plain(protocol),
        "machine": plain(machine),
        "config": plain(config_differences(a, b)),
        "environment": plain(environment_differences(a, b)),
    }


def unfinished(run: Run) -> str:
    """Why a run that is not done may not be compared."""
    state = run.state if run.failure is None else f"failed ({run.failure})"
    return f"{run.name} is {state} after {len(run.samples())} sample(s), which are not the whole (`python -m hipexp retry` goes on)"


def described(run: Run) -> dict[str, Any]:
    """Which run a column is."""
    facts = run.facts
    return {name: facts[name] for name in ("folder", "task", "model", "pipeline", "state", "finished", "average")}


def plain(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """Differences as JSON has them."""
    return [{name: value for name, value in one._asdict().items() if value or name != "why"} for one in differences]


def text(told: dict[str, Any], every: bool = False) -> str:
    """A comparison for a terminal, with ``every`` flipped answer or the first ``SHOWN``."""
    sides = [f"{side.upper()}: {run_line(told[side])}" for side in "ab"]
    warned = ["not comparable, shown all the same:", *(f"  {reason}" for reason in told["refused"])] if told["refused"] else []
    parts = ["\n".join(sides), "\n".join(warned), score_table(told["scores"]), time_table(told["times"])]
    left_out = [f"  {count} × {reason}" for reason, count in told["left_out"].items()]
    parts.append("\n".join(["left out:", *left_out]) if left_out else "")
    parts.append(flips(told["flipped"], every))
    for key, title in (("config", "what differs in the configuration:"), ("environment", "and around the runs:")):
        rows = [[one["key"], brief(one["a"]), brief(one["b"])] for one in told[key]]
        parts.append(f"{title}\n{text_table(['key', 'A', 'B'], rows, left=3)}" if rows else "")
    return "\n\n".join(filter(None, parts))


def run_line(run: dict[str, Any]) -> str:
    """Which run, in a line."""
    average = "" if run["average"] is None else f", average {run['average']:.1f}"
    return f"{run['folder']} ({run['model']}, {run['pipeline']}, {run['state']}{average})"


def score_table(rows: list[dict[str, Any]]) -> str:
    """Scores of both runs, and the paired difference; empty without any."""
    if not rows:
        return ""
    header = ["subtask", "metric", "A", "95 %", "B", "95 %", "pairs", "B − A", "95 %", "better/worse"]
    cells = [
        [
            *(row["name"], row["metric"], row["a"], span(row["a_interval"]), row["b"], span(row["b_interval"]), row["n"]),
            *(signed(row["difference"]), span(row["interval"], "+.1f"), f"+{row['better']}/−{row['worse']}"),
        ]
        for row in rows
    ]
    words = "A, B: as their summaries report them, all: the mean over the pairs; B − A: mean difference over the pairs"
    return text_table(header, cells, left=2) + "\n" + words


def time_table(rows: list[dict[str, Any]]) -> str:
    """Times of both runs at the same phase and length; empty without any."""
    if not rows:
        return ""
    header = ["phase", "tokens", "A", "B", "A mean ms", "p10–p90", "B mean ms", "p10–p90", "A / B"]
    cells = []
    for row in rows:
        measured = [[row[f"{side}_mean_ms"], span([row[f"{side}_p10_ms"], row[f"{side}_p90_ms"]], ".1f")] for side in "ab"]
        cells.append([row["phase"], row["context_tok"], row["a_impl"], row["b_impl"], *measured[0], *measured[1], f"{row['ratio']:.2f}"])
    return text_table(header, cells, left=1) + "\nA / B: above 1 where B is faster"


def flips(rows: list[dict[str, Any]], every: bool) -> str:
    """Flipped answers with what was to be said; the first ``SHOWN``, or ``every`` one."""
    if not rows:
        return ""
    lines = [f"{len(rows)} answer(s) with another score, those that became worse first:"]
    for row in rows if every else rows[:SHOWN]:
        lines.append(f"  {row['subtask']} {row['sample']}: {row['a_score']:g} → {row['b_score']:g}")
        lines.append(f"    right: {shortened(' | '.join(map(str, row['references'])))}")
        lines += [f"    {side.upper()}:     {shortened(row[f'{side}_prediction'])}" for side in "ab"]
    if not every and len(rows) > SHOWN:
        lines.append(f"  … and {len(rows) - SHOWN} more: all=true")
    return "\n".join(lines)


def shortened(text: str) -> str:
    """An answer in one line."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def span(bounds: Sequence[float | None] | None, digits: str = ".0f") -> str | None:
    """An interval as text."""
    if bounds is None or None in bounds:
        return None
    return " to ".join(format(bound, digits) for bound in bounds)


def signed(value: float | None) -> str | None:
    """A difference as text."""
    return None if value is None else f"{value:+.1f}"
