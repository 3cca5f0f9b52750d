"""Sections about scores: leaderboard, subtasks, accuracy over length and against time, depth against length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hipexp.report.gather import Entry, Gathered, digest, family_id, groups_of, seed_of
from hipexp.report.naming import command_of
from hipexp.report.paired import differences, pairs_of
from hipexp.report.parts import Cell, Chart, HeatChart, Link, Mark, Section, Table, fewer, section
from hipexp.suites.scoring.statistics import mean_interval

CELLS = """
SELECT run, subtask, length_tok, count(*) AS n, avg(value) AS score, list(value ORDER BY sample) AS scores, any_value(pid) AS pid,
  median(prefill_ms) AS prefill_ms, median(decode_ms) AS decode_ms, max(peak_bytes) AS peak_bytes,
  count_if(removed_tok > 0) AS cut, sum(removed_tok)::BIGINT AS removed_tok
FROM samples WHERE value IS NOT NULL AND suite NOT IN ('recall', 'latency')
GROUP BY run, subtask, length_tok ORDER BY run, subtask, length_tok
"""
WHOLE = CELLS.replace("SELECT run, subtask, length_tok,", "SELECT run,").replace("run, subtask, length_tok", "run")
DEPTHS = """
SELECT run, length_tok, depth, count(*) AS n, avg(value) AS score FROM samples
WHERE value IS NOT NULL AND depth IS NOT NULL AND suite NOT IN ('recall', 'latency')
GROUP BY run, length_tok, depth ORDER BY run, length_tok, depth
"""
PAIRED = ("difference", "from (95 %)", "to (95 %)", "pairs", "flipped: better", "flipped: worse", "dense, same samples")
BINS = 5


@dataclass(frozen=True)
class Scores:
    """Everything the sections of scores need: ``cells`` by run, subtask and length, ``whole`` by run, and the differences of both."""

    gathered: Gathered
    cells: list[dict[str, Any]]
    whole: list[dict[str, Any]]
    by_cell: dict[tuple[Any, ...], dict[str, Any]]
    by_run: dict[tuple[Any, ...], dict[str, Any]]


def scores_of(gathered: Gathered) -> Scores:
    """Add the samples up."""
    if not gathered.counted:
        return Scores(gathered, [], [], {}, {})
    pairs = pairs_of(gathered)
    by_cell, by_run = differences(pairs, "run", "subtask", "length_tok"), differences(pairs, "run")
    return Scores(gathered, gathered.query(CELLS), gathered.query(WHOLE), by_cell, by_run)


def paired_cells(run: Entry, found: dict[str, Any] | None) -> list[Cell]:
    """The cells under ``PAIRED``: for dense itself dashes, for a run without pairs the reason."""
    if found is None:
        return ["is dense" if run.is_dense else "no dense", None, None, 0, None, None, None]
    low, high = found["interval"] or (None, None)
    return [found["difference"], low, high, *(found[name] for name in ("n", "better", "worse", "a_mean"))]


def leaderboard(scores: Scores) -> Section:
    """A row for every finished run with scores."""
    runs, rows = scores.gathered.runs, []
    header = [
        "attention",
        "tokens",
        "score",
        "samples",
        *PAIRED,
        "cut samples",
        "tokens cut off",
        "task",
        "model",
        "protocol",
        "card",
        "seed",
    ]
    header += ["subtask average", "prefill s", "decode ms/step", "peak MiB", "device", "run"]
    lengths = groups_of(scores.cells, lambda cell: cell["run"])
    spans = {number: {one["length_tok"] for one in mine} for number, mine in lengths.items()}
    order = sorted(scores.whole, key=lambda cell: (*runs[cell["run"]].tags.values(), max(spans[cell["run"]]), -cell["score"]))
    for cell in order:
        run = runs[cell["run"]]
        paired = paired_cells(run, scores.by_run.get((cell["run"],)))
        mine = [_span(spans[cell["run"]]), cell["score"], cell["n"], *paired, cell["cut"], cell["removed_tok"]]
        where = [run.task, run.model, run.protocol, card_id(run), seed_of(run)]
        rows.append([run.label, *mine, *where, run.summary.get("average"), *costs(cell), *place(run)])
    table = Table("leaderboard", "Finished runs with scores", header, rows, [runs[cell["run"]].tags for cell in order], folded=False)
    words = (
        "Scores from 0 to 100, the mean over samples; times are medians over samples, memory the largest, above the loaded model. A "
        "difference is paired: score less the dense score of the same samples under the same protocol (same card, data and seed), "
        "with the 95 % bootstrap interval of its mean over that many pairs; flipped answers are those that scored higher (better) or "
        "lower (worse) than the dense one. Cut samples lost tokens to truncation before they were answered; names of such runs say "
        "so. Runs that failed or are not finished are not here but in their own section."
    )
    return Section("leaderboard", "Leaderboard", words, tables=[table], missing=missing_dense(scores))


def missing_dense(scores: Scores) -> list[tuple[str, str]]:
    """Every dense run that would pair with runs which have none, or not all."""
    found: dict[str, list[str]] = {}
    for cell in scores.whole:
        run, difference = scores.gathered.runs[cell["run"]], scores.by_run.get((cell["run"],))
        if run.is_dense or run.attention == "served" or (difference and difference["n"] == cell["n"]):
            continue
        command = command_of(run.config, dense=True) or f"the command of {run.folder.name}, without +pipeline= and offload="
        found.setdefault(command, []).append(run.label)
    return [(f"a dense run for {_some(names)}", command) for command, names in found.items()]


def _some(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(names))
    return "; ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _span(lengths: set[int]) -> Cell:
    return min(lengths) if len(lengths) == 1 else f"{min(lengths):,}–{max(lengths):,}"


def card_id(run: Entry) -> str:
    """The name of a run's protocol card in the report."""
    return digest({name: value for name, value in run.card.items() if name != "strategy"})


def costs(cell: dict[str, Any]) -> list[Cell]:
    """Median prefill seconds, median decode milliseconds, largest peak in MiB; None for what is not known."""
    prefill, peak = cell["prefill_ms"], cell["peak_bytes"]
    return [None if prefill is None else prefill / 1000, cell["decode_ms"], None if peak is None else peak / 2**20]


def place(run: Entry) -> list[Cell]:
    """Device, and the run folder as a link."""
    return [run.device, Link(run.folder.name, str(run.folder.resolve()))]


def subtasks(scores: Scores) -> Table:
    """A row for every subtask and length of a run."""
    runs = scores.gathered.runs
    header = [
        "attention",
        "subtask",
        "tokens",
        "score",
        "score from (95 %)",
        "score to (95 %)",
        "samples",
        *PAIRED,
        "task",
        "model",
        "protocol",
    ]
    header += ["prefill s", "decode ms/step", "cut samples", "tokens cut off", "run"]
    rows = []
    for cell in scores.cells:
        run = runs[cell["run"]]
        found = scores.by_cell.get((cell["run"], cell["subtask"], cell["length_tok"]))
        interval = mean_interval(cell["scores"]) or (None, None)
        mine = [run.label, cell["subtask"], cell["length_tok"], cell["score"], *interval, cell["n"], *paired_cells(run, found)]
        cut = [cell["cut"], cell["removed_tok"]]
        rows.append([*mine, run.task, run.model, run.protocol, *costs(cell)[:2], *cut, run.folder.name])
    return Table("subtasks", "Scores by subtask and length", header, rows, [runs[cell["run"]].tags for cell in scores.cells])


def over_length(scores: Scores) -> Section:
    """Mean scores by length, a chart for every family of runs."""
    runs, charts = scores.gathered.runs, []
    for family, cells in groups_of(scores.cells, lambda cell: family_id(runs[cell["run"]])).items():
        first = runs[cells[0]["run"]]
        series: dict[str, list[Mark]] = {}
        rows: list[list[Cell]] = []
        for (label, length), mine in sorted(groups_of(cells, lambda cell: (runs[cell["run"]].label, cell["length_tok"])).items()):
            best = max(groups_of(mine, lambda cell: cell["run"]).values(), key=lambda of_run: sum(cell["n"] for cell in of_run))
            values = [value for cell in best for value in cell["scores"]]
            bounds, n = mean_interval(values), len(values)
            interval = None if bounds is None else (bounds[0], bounds[1])
            mean = sum(values) / n
            series.setdefault(label, []).append(Mark(length, mean, f"{n} samples", interval))
            rows.append([label, length, mean, *(interval or (None, None)), n, runs[best[0]["run"]].folder.name])
        if len({length for _, length, *_ in rows}) < 2:
            continue
        title = f"{first.task}: {_listed(cells)} ({first.model}, protocol {first.protocol})"
        table = Table(
            f"accuracy_length_{family}", title, ["attention", "tokens", "score", "from (95 %)", "to (95 %)", "samples", "run"], rows
        )
        drawn, note = fewer(series)
        axes = ("context, tokens", "score, mean over samples")
        charts.append(Chart(table.name, title, "lines", axes, drawn, table, first.tags, top=100.0, note=note))
    words = (
        "Bars: 95 % bootstrap intervals over samples, where all are alike how far others not met could move the mean; marks at one "
        "length stand a little beside each other, to be seen. Of several "
        "runs of one configuration the one with most samples is drawn. Families of runs at a single length have no curve; they are in "
        "the table below."
    )
    few = ("curves over two lengths or more", "python -m hipexp -m +pipeline=dense,3stage task.length_tok=6144,12288,24576")
    return section("length", "Accuracy over length", words, charts, [subtasks(scores)], few, bool(charts))


def _listed(cells: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(cell["subtask"].partition("@")[0] for cell in cells))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def against_time(scores: Scores) -> Section:
    """Scores against prefill and decode times of the same samples on the same device, with the Pareto front."""
    runs, charts = scores.gathered.runs, []
    cells = groups_of(scores.cells, lambda cell: (cell["run"], cell["length_tok"]))
    same = groups_of(
        cells, lambda key: (key[1], *runs[key[0]].machine, frozenset((c["pid"], c["n"]) for c in cells[key]))
    )
    medians = {(row["run"], row["length_tok"]): row for row in scores.gathered.query(TIMES)} if cells else {}
    for (length, device, threads, samples), keys in same.items():
        first = runs[keys[0][0]]
        for name, unit in (("decode", "decode ms per step"), ("prefill", "prefill ms")):
            told = [(key, medians[key][f"{name}_ms"], medians[key]) for key in keys if medians[key][f"{name}_ms"]]
            if len(told) < 2:
                continue
            series: dict[str, list[Mark]] = {}
            rows: list[list[Cell]] = []
            for key, time_ms, one in told:
                run = runs[key[0]]
                series.setdefault(run.label, []).append(Mark(time_ms, one["score"], f"{one['n']} samples"))
                rows.append([run.label, time_ms, one["score"], one["n"], run.folder.name])
            title = f"{first.task}: {_listed(cells[keys[0]])}, {length:,} tokens, {name} ({first.model}, {device}, {threads} thread(s))"
            at = digest([length, device, threads, sorted(samples), first.model])
            table = Table(f"accuracy_{name}_{at}", title, ["attention", unit, "score", "samples", "run"], rows)
            axes, words = (f"{unit}, median over samples", "score, mean over samples"), f"{len(told)} runs"
            charts.append(Chart(table.name, title, "scatter", axes, series, table, first.tags, top=100.0, note=words))
    charts.sort(key=lambda chart: -len(chart.table.rows))
    words = (
        "Both from the same forward passes. Only runs of the same samples on the same device share a picture; the dashed line joins "
        "those that no other run beats in both (Pareto front)."
    )
    few = ("two runs or more of the same samples", "python -m hipexp -m +pipeline=dense,3stage task=infbench")
    return section("pareto", "Accuracy against latency", words, charts, [], few, bool(charts))


TIMES = """
SELECT run, length_tok, count(*) AS n, avg(value) AS score, median(decode_ms) AS decode_ms, median(prefill_ms) AS prefill_ms
FROM samples WHERE value IS NOT NULL GROUP BY run, length_tok
"""


def depths(scores: Scores) -> Section:
    """Heat maps of mean scores by depth and length."""
    runs, charts = scores.gathered.runs, []
    found = scores.gathered.query(DEPTHS) if scores.cells else []
    for family, cells in groups_of(found, lambda cell: family_id(runs[cell["run"]])).items():
        first = runs[cells[0]["run"]]
        at_length = groups_of(cells, lambda cell: cell["length_tok"]).values()
        name_of = _depth if len({frozenset(cell["depth"] for cell in mine) for mine in at_length}) == 1 else _bin
        rows: list[list[Cell]] = []
        maps: dict[str, dict[tuple[str, str], tuple[float, int]]] = {}
        for (label, length), mine in sorted(groups_of(cells, lambda cell: (runs[cell["run"]].label, cell["length_tok"])).items()):
            of_run = max(groups_of(mine, lambda cell: cell["run"]).values(), key=lambda one: sum(cell["n"] for cell in one))
            for depth, at in sorted(
                groups_of(of_run, lambda cell, name_of=name_of: name_of(cell["depth"])).items(), key=lambda item: item[1][0]["depth"]
            ):
                n = sum(cell["n"] for cell in at)
                mean = sum(cell["score"] * cell["n"] for cell in at) / n
                maps.setdefault(label, {})[depth, f"{length:,}"] = (mean, n)
                rows.append([label, depth, length, mean, n, runs[of_run[0]["run"]].folder.name])
        names = list(dict.fromkeys(name_of(cell["depth"]) for cell in sorted(cells, key=lambda cell: cell["depth"])))
        if len(names) < 2:
            continue
        title = f"{first.task} ({first.model}, protocol {first.protocol})"
        table = Table(f"depth_{family}", title, ["attention", "depth", "tokens", "score", "samples", "run"], rows)
        kept = sorted(maps, key=lambda label: (label != "dense", -sum(score for score, _ in maps[label].values()), label))[:MOST_MAPS]
        more = f"{len(maps) - len(kept)} more in the table, not drawn" if len(maps) > len(kept) else ""
        columns = [f"{length:,}" for length in sorted({cell["length_tok"] for cell in cells})]
        charts.append(HeatChart(table.name, title, names, columns, {name: maps[name] for name in kept}, table, first.tags, more))
    words = "Mean score of the samples whose answer stands at that depth of the context; under each score its number of samples."
    few = (
        "runs that record depths",
        "python -m hipexp +pipeline=3stage task=passkey 'task.depths=[0,0.5,1]' 'task.lengths_tok=[6144,24576]'",
    )
    return section("depth", "Depth × length", words, charts, [], few, bool(charts))


MOST_MAPS = 6


def _depth(depth: float) -> str:
    return f"{100 * depth:.3g} %"


def _bin(depth: float) -> str:
    place = min(int(depth * BINS), BINS - 1)
    return f"{100 * place // BINS}–{100 * (place + 1) // BINS} %"
