"""What ``tune`` hands over: its best points as pipeline files that run, a table, a picture, and the same as JSON.

They were chosen by their scores on some prompts, so those are too good. In the end they and the baseline answer others: both are told.
"""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hipexp.report.figures import draw_front
from hipexp.report.tables import score_text, text_table
from hipexp.run.allocation import yaml_of
from hipexp.run.ledger import make_folder, write_text
from hipexp.suites.scoring.statistics import mean_interval, paired_difference
from hipexp.tune.final import Result
from hipexp.tune.objectives import dominates
from hipexp.tune.search import Aim
from hipexp.tune.study import KINDS, Point

KIND_WORDS = {
    "measured": "measured",
    "invalid": "refused by the checks",
    "bytes": "read too much",
    "repeated": "drawn before",
    "recall": "hopeless by recall",
    "failed": "failed",
    "waiting": "waiting for the model",
}


def shape(point: Point) -> str:
    """Chunks and budgets of a pipeline, stage by stage; of one without stages its method."""
    if point.pipeline is None or not point.pipeline.stages:
        return "dense" if point.pipeline is None else point.pipeline.method
    return " ".join(f"{stage.chunk_tok}→{stage.keep_tok} {stage.representative.value}" for stage in point.pipeline.stages)


def flat(point: Point) -> list[float]:
    """Scores of all prompts, in an order that is the same for all points."""
    return [score for rung in sorted(point.scores) for score in point.scores[rung]]


def difference(ours: Point | None, theirs: Point | None) -> str | None:
    """Of scores on the same prompts, with its 95 % interval."""
    if ours is None or theirs is None or len(flat(ours)) != len(flat(theirs)) or not flat(ours):
        return None
    told = paired_difference(flat(ours), flat(theirs))
    return f"{told['mean']:+.1f}" + (f" ({told['interval'][0]:+.0f} to {told['interval'][1]:+.0f})" if told["interval"] else "")


def score_of(point: Point | None) -> str | None:
    """The mean score with its 95 % interval."""
    scores = [] if point is None else flat(point)
    return score_text(statistics.fmean(scores), mean_interval(scores)) if scores else None


def table(aim: Aim, results: Sequence[Result]) -> str:
    """The baseline and what is handed over, a line each."""
    base = results[0]
    scored = any(one.name == "score" for one in aim.objectives)
    header = ["point", *(["score, search", "score, held out", "difference"] if scored else [])]
    others = [one for one in aim.objectives if one.name != "score"]
    header += [x for one in others for x in ([one.header] if one.needs != "count" else [one.header, "× baseline"])]
    rows = []
    for result in results:
        row: list[Any] = [result.name]
        if scored:
            row += [
                score_of(result.searched),
                score_of(result.checked),
                None if result is base else difference(result.checked, base.checked),
            ]
        for one in others:
            value, theirs = result.known(one), base.known(one)
            row.append(one.show(value))
            if one.needs == "count":
                row.append(None if value is None or not theirs else f"{value / theirs:.2f}")
        rows.append([*row, shape(result.searched)])
    return text_table([*header, "chunks→kept"], rows, left=1)


def verdicts(aim: Aim, results: Sequence[Result]) -> list[str]:
    """Which points beat the baseline in everything, by the prompts that did not choose them; and of which the check failed."""
    base, compared, lines = results[0], 0, []
    for result in results[1:]:
        ours = [value for one in aim.objectives if (value := result.known(one)) is not None]
        theirs = [value for one in aim.objectives if (value := base.known(one)) is not None]
        if min(len(ours), len(theirs)) < len(aim.objectives):
            continue
        compared += 1
        if dominates(ours, theirs, aim.objectives):
            apart = difference(result.checked, base.checked)
            paired = {"score": f" (paired: {apart})"} if apart else {}
            told = [
                f"{one.header} {one.show(a)} to {one.show(b)}{paired.get(one.name, '')}"
                for one, a, b in zip(aim.objectives, ours, theirs, strict=True)
            ]
            asked = f" on {len(flat(result.checked))} held-out prompts" if result.checked is not None and flat(result.checked) else ""
            lines.append(f"{result.name} dominates {base.name}{asked}, by means: {', '.join(told)}")
    none = f"no point dominates {base.name} on the prompts that did not choose it"
    told = lines or [none if compared else f"no point was compared with {base.name} on prompts that did not choose it"]
    return [*told, *(f"{result.name}: the last check failed: {result.why}" for result in results if result.why)]


def kinds(points: Sequence[Point]) -> Counter[str]:
    """How many points there are of each kind; of those that are not decided some wait for the model."""
    return Counter(point.kind or ("waiting" if point.asked else "not finished") for point in points)


def counts(points: Sequence[Point]) -> str:
    """How many points were drawn, and what became of them."""
    found = kinds(points)
    parts = [f"{found[kind]} {KIND_WORDS.get(kind, kind)}" for kind in (*KINDS, "waiting", "not finished") if found[kind]]
    return f"{len(points)} points drawn{': ' * bool(parts)}{', '.join(parts)}"


def reasons(points: Sequence[Point], kind: str = "invalid", most: int = 3) -> list[str]:
    """The commonest reasons for points of a kind, without their numbers."""
    found = Counter(point.why.split("=")[0] for point in points if point.kind == kind)
    return [f"  {count} × {what}" for what, count in found.most_common(most)]


def write_pipelines(folder: Path, name: str, results: Sequence[Result], words: Sequence[str], command: str) -> list[Result]:
    """The points as files under ``pipelines/``, which run as they are; those of an earlier call that are not among them go."""
    place, written = folder / "pipelines", []
    make_folder(place)
    for result in results[1:]:
        point = result.searched
        assert point.pipeline is not None
        path = place / f"{name}_t{point.number:04d}.yaml"
        run = shlex.join(["python", "-m", "hipexp", f"+pipeline={path}", *words])
        lines = [run, f"found by: {command} (point {point.number})", *measured_lines(result, results[0])]
        write_text(path, yaml_of(point.pipeline, lines))
        written.append(replace(result, file=path))
    for path in place.glob(f"{name}_t*.yaml"):
        if path not in {result.file for result in written}:
            path.unlink()
    return written


def measured_lines(result: Result, base: Result) -> list[str]:
    """What was measured of a point, in words."""
    lines = [f"a decode step reads {result.searched.bytes / 1e6:.3f} MB ({base.name}: {base.searched.bytes / 1e6:.3f} MB)"]
    for what, ours, theirs in (("search", result.searched, base.searched), ("held out", result.checked, base.checked)):
        if (score := score_of(ours)) is not None:
            lines.append(
                f"score, {what}: {score} of {len(flat(ours)) if ours else 0} prompts; {base.name}: {score_of(theirs) or 'not asked'}"
            )
    if result.searched.recall:
        lines.append(f"recall of recorded attention: {statistics.fmean(result.searched.recall):.3f}")
    if result.why:
        lines.append(f"the check on held-out prompts failed: {' '.join(result.why.split())}")
    return lines


def picture(path: Path, aim: Aim, points: Sequence[Point], results: Sequence[Result]) -> bool:
    """Every measured point in the first two objectives, what is handed over and the baseline; False where there is one objective."""
    if len(aim.objectives) < 2:
        return False
    upright, across = sorted(aim.objectives[:2], key=lambda one: not one.more)
    base = results[0]

    def at(point: Point) -> tuple[float, float] | None:
        x, y = point.value(across.name), point.value(upright.name)
        scale = 1e-6 if across.unit == "MB" else 1.0
        return None if x is None or y is None else (x * scale, y * (1e-6 if upright.unit == "MB" else 1.0))

    checked = [result.checked for result in results[1:] if result.checked]
    series = {
        "measured": [point for point in points if point.kind == "measured"],
        "handed over, search": [result.searched for result in results[1:]],
        "handed over, held out": checked,
        f"{base.name}, search": [base.searched],
        f"{base.name}, held out": [base.checked] if base.checked else [],
    }
    placed = {name: [place for point in found if (place := at(point))] for name, found in series.items()}
    heading = f"{aim.experiment.task.name}, {aim.n_tok} tokens: what {counts(points).partition(':')[0]} found"
    draw_front(path, heading, placed, (across.header, upright.header))
    return True


def as_data(aim: Aim, points: Sequence[Point], results: Sequence[Result], folder: Path) -> dict[str, Any]:
    """The result for scripts."""

    def values(point: Point | None) -> dict[str, Any]:
        return {} if point is None else {one.name: point.value(one.name) for one in aim.objectives} | {"scores": point.scores}

    return {
        "folder": str(folder),
        "objectives": [one.name for one in aim.objectives],
        "points": dict(kinds(points)),
        "baseline": {"name": results[0].name, "search": values(results[0].searched), "held_out": values(results[0].checked)},
        "best": [
            {"point": r.searched.number, "file": str(r.file), "search": values(r.searched), "held_out": values(r.checked)}
            | ({"failed": r.why} if r.why else {})
            for r in results[1:]
        ],
    }
