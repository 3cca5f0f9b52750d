"""Whether what is measured lies in the order that the paper says: judged by samples, by medians with a margin, or by counts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hipexp.repro.data import Cells, Claim, Published, Size
from hipexp.repro.points import Cell
from hipexp.repro.values import Key, Sample, Value, inputs
from hipexp.suites.scoring.statistics import mean_interval

HOLDS, OPEN, FAILS, NOT_RUN, ELSEWHERE = "holds", "not decided", "does not hold", "not run", "not at this size"
CHANCE, SHUFFLES, SEED = 0.05, 10_000, 0


@dataclass(frozen=True)
class Verdict:
    """One of the words above, and what it rests on."""

    claim: Claim
    model: str
    word: str
    because: str


def judge_all(table: Published, size: Size, values: Mapping[Key, Value], found: Sequence[Cell]) -> list[Verdict]:
    """Every ordering of a table, for each model that is run itself and that it is about; ``found``: the cells of the size, run or not."""
    models = list(dict.fromkeys(cell.line[0] for cell in found)) or [""]
    verdicts = []
    for claim in table.orderings:
        for model in models:
            about = model or size.beside
            if claim.models and about not in claim.models:
                if not model:
                    told = f"this size has one model beside all published ones; this is told of {', '.join(claim.models)} only"
                    verdicts.append(Verdict(claim, model, ELSEWHERE, told))
                continue
            planned = [behind(table, cells, model, found) for cells in (claim.more, claim.less)]
            if not all(planned):
                verdicts.append(Verdict(claim, model, ELSEWHERE, "this size does not run one of its sides"))
                continue
            verdict = judge(claim, model, values)
            points = {id(cell.point): cell for side in planned for cell in side}
            there = sum((cell.line, cell.run, cell.column) in values for cell in points.values())
            if verdict.word != NOT_RUN and there < len(points):
                verdict = replace(verdict, because=f"{verdict.because}; {there} of its {len(points)} runs are there")
            verdicts.append(verdict)
    return verdicts


def behind(table: Published, side: Cells, model: str, found: Sequence[Cell]) -> list[Cell]:
    """The cells that a side of an ordering rests on; none where the size lacks one that it cannot do without."""
    own = [cell for cell in found if cell.line[:2] == (model, side.row) and (not side.metric or cell.line[2] == side.metric)]
    there = {cell.column for cell in own}
    named = side.over or side.columns or sorted(there)
    ways = [[column] if column in there else inputs(table, column) for column in named]
    whole = [way for way in ways if there.issuperset(way)]
    if side.over and len(whole) < len(named):
        return []
    return [cell for cell in own if any(cell.column in way for way in whole)]


def judge(claim: Claim, model: str, values: Mapping[Key, Value]) -> Verdict:
    """One ordering for one model."""
    more, less = (chosen(cells, model, values) for cells in (claim.more, claim.less))
    if not more or not less:
        return Verdict(claim, model, NOT_RUN, "no run of one side is finished")
    if claim.kind == "scores":
        return Verdict(claim, model, *by_samples(more, less))
    same = [key for key in more if key in less] or None
    pairs = [(more[key].number, less[key].number) for key in same] if same else [(first(more), first(less))]
    return Verdict(claim, model, *(by_factor(pairs, claim.factor) if claim.kind == "times" else by_count(pairs)))


def chosen(cells: Cells, model: str, values: Mapping[Key, Value]) -> dict[tuple[str, str], Value]:
    """What is there of the cells that a side of an ordering names, by run and column; of ``over`` the quotients, by run."""
    found = {
        (run, column): value
        for (line, run, column), value in values.items()
        if line[:2] == (model, cells.row)
        and (not cells.metric or line[2] == cells.metric)
        and column in (cells.over or cells.columns or [column])
    }
    if not cells.over:
        return found
    below, above = cells.over
    runs = dict.fromkeys(run for run, _ in found)
    return {
        (run, "over"): Value(found[run, above].number / found[run, below].number)
        for run in runs
        if (run, above) in found and (run, below) in found
    }


def first(values: Mapping[tuple[str, str], Value]) -> float:
    """The number of a side that has one cell."""
    return next(iter(values.values())).number


def by_samples(more: Mapping[tuple[str, str], Value], less: Mapping[tuple[str, str], Value]) -> tuple[str, str]:
    """Paired where both sides have the same run and column, whose prompts are the same; else where they have one text, cut to two lengths.

    Without either: two groups of samples.
    """
    if shared := [(more[key], less[key]) for key in more if key in less]:
        return by_pairs([d for ours, theirs in shared for d in paired(ours, theirs, 3).items()])
    across = [d for ours in more.values() for theirs in less.values() for d in paired(ours, theirs, 4).items()]
    return by_pairs(across) if across else by_groups(scores_of(more), scores_of(less))


def paired(ours: Value, theirs: Value, parts: int) -> dict[tuple[Sample, Sample], float]:
    """Differences of samples that agree in subtask and number (``parts`` 3), and in their text (4)."""
    known = {sample[1:parts]: sample for sample in theirs.samples}
    pairs = ((sample, known.get(sample[1:parts])) for sample in ours.samples if parts == 3 or sample[3])
    return {(sample, other): ours.samples[sample] - theirs.samples[other] for sample, other in pairs if other is not None}


def scores_of(values: Mapping[tuple[str, str], Value]) -> list[float]:
    """The scores of the single samples behind cells, each once."""
    return list({name: score for value in values.values() for name, score in value.samples.items()}.values())


def by_pairs(found: list[tuple[tuple[Sample, Sample], float]]) -> tuple[str, str]:
    """The sign test over independent pairs: each once, also if its runs stand in several columns, and of one text the mean.

    Pairs without a difference say nothing, and of the others so many lie on one side by chance once in twenty times.
    """
    texts: dict[tuple[Any, ...], list[float]] = {}
    for (sample, _), difference in dict(found).items():
        texts.setdefault(text_of(sample), []).append(difference)
    differences = [statistics.fmean(of_text) for of_text in texts.values()]
    if not differences:
        return NOT_RUN, "no sample is in both runs"
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    interval = mean_interval(differences, least=-100.0)
    around = f" ({interval[0]:+.0f} to {interval[1]:+.0f})" if interval else ""
    told = f"{better} better, {worse} worse of {len(differences)} pairs; mean {statistics.fmean(differences):+.1f}{around}"
    if tail(better, better + worse) <= CHANCE:
        return HOLDS, told
    return (FAILS if tail(worse, better + worse) <= CHANCE else OPEN), told


def text_of(sample: Sample) -> tuple[Any, ...]:
    """What samples of one text have in common, which may be cut to several lengths: subtask, number, and the text."""
    return sample[1:] if sample[3] else sample


def tail(hits: int, of: int) -> float:
    """The chance of so many heads or more in ``of`` throws of a coin."""
    return sum(math.comb(of, k) for k in range(hits, of + 1)) / 2**of


def by_groups(more: list[float], less: list[float]) -> tuple[str, str]:
    """A permutation test of the difference of two means (seeded; the same for every order).

    The order that is seen counts as one that was drawn.
    """
    import numpy as np

    if not more or not less:
        return NOT_RUN, "no samples on one side"
    pool, n = np.concatenate([np.sort(more), np.sort(less)]), len(more)
    rng = np.random.default_rng(SEED)
    seen = statistics.fmean(more) - statistics.fmean(less)
    drawn = np.array([mixed[:n].mean() - mixed[n:].mean() for mixed in (rng.permutation(pool) for _ in range(SHUFFLES))])
    told = f"means {statistics.fmean(more):.1f} of {n} samples and {statistics.fmean(less):.1f} of {len(less)}"
    above, below = ((1 + hits.sum()) / (1 + SHUFFLES) for hits in (drawn >= seen - 1e-9, drawn <= seen + 1e-9))
    return (HOLDS if above <= CHANCE else FAILS if below <= CHANCE else OPEN), told


def by_factor(pairs: list[tuple[float, float]], factor: float) -> tuple[str, str]:
    """Medians: all quotients at least ``factor``, or all at most its reverse."""
    ratios = [a / b if b else math.inf for a, b in pairs]
    told = f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} times (at least {factor:g} is asked for)"
    if min(ratios) >= factor:
        return HOLDS, told
    return (FAILS if max(ratios) <= 1 / factor else OPEN), told


def by_count(pairs: list[tuple[float, float]]) -> tuple[str, str]:
    """Counted numbers, which no noise is in."""
    told = "; ".join(f"{a:.4g} and {b:.4g}" for a, b in pairs)
    return (HOLDS if all(a > b for a, b in pairs) else FAILS), told
