"""Official scores of predictions that are already there: nothing is run, and what cannot be scored gets no number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites import OWN
from hipexp.suites.scoring.statistics import describe

SUITES = ("infbench", "longbench", "longbench2", "ruler")
# Fields of rows that name sources of their text, and what these are instead of the published data.
UNOFFICIAL = {"stand_ins": "made by hipexp", "own_data": "not known to be the published data"}


def score_rows(
    suite: str, rows: Sequence[Mapping[str, Any]], edition: str | None = None, drop_first_number: bool = False
) -> dict[str, Any]:
    """Scores (0 to 100) of all subtasks in ``rows``, and the averages whose tasks are all there.

    A row holds ``subtask``, ``prediction`` and ``references``, and what its metric needs besides: ``all_classes`` and ``length``
    (LongBench), ``difficulty`` and ``length`` (LongBench v2), ``options`` (∞Bench), ``length`` as the target length (RULER);
    ``file`` and ``line`` say where it comes from; ``stand_ins`` (RULER) names sources of its text that the project made itself,
    ``own_data`` those that are not known to be the published ones: the result then says, under that key, that it is no official score.
    ``interval`` is the 95 % interval of the mean over samples, None for one sample.
    ``drop_first_number``: see ``hipexp.suites.scoring.infbench.score_infbench``.
    Raises ``ConfigError`` for the first row that is wrong: then nothing is scored.
    """
    rules = open_rules(suite)
    by_name = sample_scores(suite, rows, edition, drop_first_number)
    by_name = dict(sorted(by_name.items(), key=lambda item: place_of(rules, item[0])))
    scores = {name: {"metric": rules.metric_of(name)} | rounded(describe(values), rules.DECIMALS) for name, values in by_name.items()}
    averages = rules.averages({name: entry["score"] for name, entry in scores.items()})
    sources = {key: sorted({name for row in rows for name in row.get(key, ())}) for key in UNOFFICIAL}
    return {
        "suite": suite,
        "edition": checked_edition(rules, suite, edition),
        "scorer": rules.SCORER + (", first number of math_calc dropped" if drop_first_number else ""),
        "scores": scores,
        "averages": {name: round(value, rules.DECIMALS) for name, value in averages.items()},
        **{
            key: f"no official score: the text of some rows comes from {', '.join(names)}, {UNOFFICIAL[key]}"
            for key, names in sources.items()
            if names
        },
    }


def sample_scores(
    suite: str, rows: Sequence[Mapping[str, Any]], edition: str | None = None, drop_first_number: bool = False
) -> dict[str, list[float]]:
    """The scores of single samples by subtask, in the order of ``rows``: what a paired difference needs. Raises as :func:`score_rows`."""
    rules = open_rules(suite)
    edition = checked_edition(rules, suite, edition)
    if drop_first_number and suite != "infbench":
        raise ConfigError(f"drop_first_number is a rule of infbench (math_calc), not of {suite}; leave it out")
    check_rows(rules, rows)
    flags = {"drop_first_number": True} if drop_first_number else {}
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, score in rules.grouped(row, rules.score_row(row, edition, **flags)).items():
            found.setdefault(name, []).append(score)
    return found


def scores_behind(protocol: str, suite: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The score of a row under every name that a summary has for it: its subtask, or the groups of an official scorer.

    ``row`` holds its ``score``. Raises ``ConfigError`` for a suite without rules.
    """
    return {row["subtask"]: row["score"]} if protocol == OWN else open_rules(suite).grouped(row, row["score"])


def place_of(rules: ModuleType, name: str) -> int:
    """Where a score stands among the others, where its suite has an order of its own."""
    order = [*getattr(rules, "ORDER", ()), *(f"{group}_compensated" for group in getattr(rules, "ORDER", ()))]
    return order.index(name) if name in order else 0


def open_rules(suite: str) -> ModuleType:
    """The module with the rules of a suite. Raises ``ConfigError`` for an unknown one."""
    if suite not in SUITES:
        raise ConfigError(f"suite={suite!r} has no scorer; use one of {', '.join(SUITES)}")
    return import_module(f"hipexp.suites.scoring.{suite}")


def checked_edition(rules: ModuleType, suite: str, edition: str | None) -> str:
    """The edition of the scorer, the first if none is named. Raises ``ConfigError`` for an unknown one."""
    if edition is None:
        return str(rules.EDITIONS[0])
    if edition not in rules.EDITIONS:
        raise ConfigError(f"edition={edition!r} is no edition of the scorer of {suite}; use {' or '.join(rules.EDITIONS)}")
    return edition


def check_rows(rules: ModuleType, rows: Iterable[Any]) -> None:
    """Raise ``ConfigError``, naming file and line, for the first row that cannot be scored or is there twice, and if there are none."""
    places: dict[Any, str] = {}
    for number, row in enumerate(rows, 1):
        place = f"{row.get('file', 'rows')}, line {row.get('line', number)}" if isinstance(row, Mapping) else f"rows, line {number}"
        try:
            check_fields(row)
            rules.check_row(row)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        sample = row.get("sample", number)
        name = (row["subtask"], str(row.get("length")), str(sample)) if "sample" in row else number
        if name in places:
            raise ConfigError(f"{place}: sample {sample} of {row['subtask']} is there already, in {places[name]}; leave one of them out")
        places[name] = place
    if not places:
        raise ConfigError("there are no rows to score; give at least one with subtask, prediction and references")


def check_fields(row: Any) -> None:
    """Raise ``ConfigError`` unless a row has the fields that all suites need, of the right types, and names its sources as texts."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"a row must be an object with subtask, prediction and references, not {type(row).__name__}")
    for key, kind, what in (("subtask", str, "a text"), ("prediction", str, "a text"), ("references", list, "a list")):
        if key not in row:
            raise ConfigError(f"the row has no {key}, which must be {what}")
        if not isinstance(row[key], kind):
            raise ConfigError(f"{key} must be {what}, not {row[key]!r}")
    if not row["references"]:
        raise ConfigError("references is empty, but a score needs at least one")
    for key in UNOFFICIAL:
        named = row.get(key, [])
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise ConfigError(f"{key} must be a list of texts, not {named!r}; leave it out where there is nothing to name")


def rounded(entry: dict[str, Any], decimals: int) -> dict[str, Any]:
    """``entry`` with its score and interval rounded."""
    interval = entry["interval"] and [round(bound, decimals) for bound in entry["interval"]]
    return entry | {"score": round(entry["score"], decimals), "interval": interval}
