"""Sections about times, recall and traffic, from the summaries of finished runs."""

from __future__ import annotations

import statistics
from typing import Any

from hipexp.report.accuracy import place
from hipexp.report.gather import Entry, Gathered, digest, family_id, groups_of
from hipexp.report.parts import Cell, Chart, Mark, Section, Table, fewer, section

MIB = 2**20
MOVED = """
SELECT run, length_tok, count(*) AS n, avg(h2d_bytes) AS h2d_bytes, avg(d2h_bytes) AS d2h_bytes, avg(stall_ms) AS stall_ms
FROM samples WHERE h2d_bytes IS NOT NULL GROUP BY run, length_tok ORDER BY run, length_tok
"""


def latency(gathered: Gathered) -> Section:
    """Times by length, a chart for each phase of what was measured on one machine in one way."""
    header = ["attention", "phase", "tokens", "mean ms", "p10", "p90", "no refresh", "worst", "× dense", "rounds", "mass kept %"]
    runs = [run for run in gathered.counted if _timed(run)]
    lines = [(run, row) for run in runs for row in _timed(run)]
    rows = [[*_times(run, row), run.model, *place(run)] for run, row in lines]
    table = Table("latency", "Times by length", [*header, "model", "device", "run"], rows, [run.tags for run, _ in lines])
    groups = groups_of(lines, lambda line: (_machine(line[0]), line[1]["phase"]))
    charts = [chart for (machine, phase), mine in groups.items() if (chart := _latency_chart(machine, phase, mine))]
    words = (
        "Means as the latency task defines them: decode over whole refresh periods, prefill the median over rounds. Dense is the "
        "fastest dense implementation of a run; where several runs timed it, the median of theirs is drawn. Different machines, or "
        "ways of measuring, never share a picture. Mass kept: share of the attention outside sinks and window that was selected, "
        "where the run measured it."
    )
    few = ("runs of task=latency", "python -m hipexp +pipeline=3stage task=latency 'task.lengths_tok=[16384,32768,65536]'")
    return section("latency", "Latency over length", words, charts, [table] if rows else [], few, bool(rows))


def _timed(run: Entry) -> list[dict[str, Any]]:
    """The rows of a latency run that hold a time."""
    return [row for row in (run.summary.get("latency") or {}).get("rows", []) if row.get("mean_ms") is not None]


def _dense(row: dict[str, Any]) -> bool:
    return bool(row.get("dense", row["impl"] == "dense"))


def _times(run: Entry, row: dict[str, Any]) -> list[Cell]:
    name = run.label if not _dense(row) else "dense" if row["impl"] == "dense" else f"dense: {row['impl']}"
    kept = (row.get("recall") or {}).get("recall")
    times = [row.get(key) for key in ("mean_ms", "p10_ms", "p90_ms", "cached_ms", "worst_ms", "speedup")]
    return [name, row["phase"], row["context_tok"], *times, run.config["task"].get("repeats"), None if kept is None else 100 * kept]


def _machine(run: Entry) -> str:
    """What times must share to be drawn together: model or geometry, machine, versions, and what is timed."""
    packages, card = run.environment.get("packages", {}), run.card
    versions = [packages.get(name) for name in ("torch", "triton", "transformers")]
    return digest([run.model, *run.machine, versions, card.get("edition"), card.get("data"), card.get("model")])


def _latency_chart(machine: str, phase: str, lines: list[tuple[Entry, dict[str, Any]]]) -> Chart | None:
    first = lines[0][0]
    points: dict[str, dict[int, list[tuple[float, Entry]]]] = {}
    for (_, length), mine in groups_of(lines, lambda line: (line[0].folder, line[1]["context_tok"])).items():
        for dense, same in groups_of(mine, lambda line: _dense(line[1])).items():
            run, row = min(same, key=lambda line: line[1]["mean_ms"])
            name = "dense" if dense else run.label
            points.setdefault(name, {}).setdefault(length, []).append((row["mean_ms"], run))
    if len({length for by_length in points.values() for length in by_length}) < 2:
        return None
    series: dict[str, list[Mark]] = {}
    rows: list[list[Cell]] = []
    for name, by_length in points.items():
        for length, found in sorted(by_length.items()):
            mean, rounds = statistics.median(ms for ms, _ in found), sum(run.config["task"].get("repeats", 1) for _, run in found)
            words = f"{rounds} round(s) of {len(found)} run(s)"
            series.setdefault(name, []).append(Mark(length, mean, words))
            rows.append([name, length, mean, rounds, len(found)])
    device, threads = first.machine
    title = f"{phase}, {first.model} ({device}, {threads} thread(s); {first.card.get('edition', '')})"
    table = Table(f"latency_{phase}_{machine}", title, ["attention", "tokens", "ms", "rounds", "runs"], rows)
    drawn, note = fewer(series)
    return Chart(table.name, title, "lines", ("context, tokens", "ms"), drawn, table, first.tags, scales=("log", "log"), note=note)


def recall(gathered: Gathered) -> Section:
    """The attention mass that is left after each stage, by text."""
    runs = [run for run in gathered.counted if run.task == "recall" and run.summary.get("recall")]
    header = [
        "attention",
        "text @ tokens / divisor",
        "stage",
        "mass %",
        "mass, p5 %",
        "of oracle %",
        "top 64 %",
        "sinks + window %",
        "blocks",
    ]
    lines = [(run, text, found) for run in runs for text, found in run.summary["recall"].items()]
    rows, tags = list[list[Cell]](), []
    for run, text, found in lines:
        for number, stage in enumerate(found["stages"]):
            values = [_percent(stage, *which) for which in (("mass", "mean"), ("mass", "p5"), ("oracle_ratio", "mean"), ("top", "mean"))]
            cells = [*values, _percent(found, "fixed", "mean"), _blocks(run, text)]
            rows.append([run.label, text, number, *cells, run.model, *place(run)])
            tags.append(run.tags)
    table = Table("recall", "Recall by stage", [*header, "model", "device", "run"], rows, tags)
    charts = []
    for (family, text), mine in groups_of(lines, lambda line: (family_id(line[0]), line[1])).items():
        series, small = dict[str, list[Mark]](), list[list[Cell]]()
        for run, _, found in sorted(mine, key=lambda line: -(_blocks(line[0], line[1]) or 0)):
            if run.label in series:
                continue
            marks = [Mark(i, 100 * stage["mass"]["mean"], f"{_blocks(run, text)} query blocks") for i, stage in enumerate(found["stages"])]
            series[run.label] = marks
            small += [[run.label, int(mark.x), mark.y, _blocks(run, text), run.folder.name] for mark in marks]
        first = mine[0][0]
        title = f"{text} ({first.model}, {first.card.get('edition', '')})"
        own = Table(f"recall_{family}_{digest(text)}", title, ["attention", "stage", "mass %", "blocks", "run"], small)
        drawn, note = fewer(series)
        axes, scales = ("stage", "attention mass kept, %"), ("linear", "linear")
        charts.append(Chart(own.name, title, "lines", axes, drawn, own, first.tags, scales=scales, top=100.0, note=note))
    words = (
        "Mass: share of the attention outside sinks and window that is still selected after the stage, mean over heads, layers and "
        "query blocks, and its 5th percentile; of oracle: in parts of what the heaviest tokens of each head hold, as many; top 64: "
        "share of the 64 heaviest."
    )
    few = ("runs of task=recall", "python -m hipexp +pipeline=3stage task=recall")
    return section("recall", "Recall by stage", words, charts, [table] if rows else [], few, bool(rows))


def _percent(found: dict[str, Any], name: str, part: str) -> float | None:
    """A share as percent; None where a run of an earlier version did not write it."""
    share = found.get(name, {}).get(part)
    return None if share is None else 100 * share


def _blocks(run: Entry, text: str) -> int | None:
    return (run.summary.get("scores") or {}).get(text, {}).get("n")


def traffic(gathered: Gathered) -> Section:
    """What offload moved: by phase and reader, and by length for a sample."""
    runs = [run for run in gathered.counted if (run.summary.get("traffic") or {}).get("by")]
    header = ["attention", "phase", "read by", "hit %", "MiB fetched", "MiB from disk", "MiB written", "stall ms", "samples"]
    lines = [(run, row) for run in runs for row in run.summary["traffic"]["by"]]
    rows = [[*_traffic_row(run, row), run.task, run.model, *place(run)] for run, row in lines]
    table = Table(
        "traffic", "Traffic by phase and reader", [*header, "task", "model", "device", "run"], rows, [run.tags for run, _ in lines]
    )
    charts = []
    moved = gathered.query(MOVED) if runs else []
    for (family, _), cells in groups_of(
        moved, lambda one: (family_id(gathered.runs[one["run"]]), gathered.runs[one["run"]].device)
    ).items():
        first, series, small = gathered.runs[cells[0]["run"]], dict[str, list[Mark]](), list[list[Cell]]()
        for (label, length), mine in sorted(groups_of(cells, lambda one: (gathered.runs[one["run"]].label, one["length_tok"])).items()):
            one = max(mine, key=lambda one: one["n"])
            series.setdefault(label, []).append(Mark(length, one["h2d_bytes"] / MIB, f"{one['n']} samples"))
            name = gathered.runs[one["run"]].folder.name
            small.append([label, length, one["h2d_bytes"] / MIB, one["d2h_bytes"] / MIB, one["stall_ms"], one["n"], name])
        title = f"{first.task}: fetched for a sample ({first.model}, {first.device})"
        head = ["attention", "tokens", "MiB fetched", "MiB written", "stall ms", "samples", "run"]
        own = Table(f"traffic_{family}_{digest(first.device)}", title, head, small)
        drawn, note = fewer(series)
        charts.append(Chart(own.name, title, "lines", ("context, tokens", "MiB fetched, mean"), drawn, own, first.tags, note=note))
    words = (
        "Keys and values that crossed the link, prefill and decode together in the pictures. Hit %: of the chunks asked for, those "
        "that were on the device. The table adds up all samples and layers of a run; stall: waiting for what was fetched."
    )
    few = ("runs with an offload", "python -m hipexp +pipeline=3stage offload=host task=passkey")
    return section("traffic", "Offload traffic", words, charts, [table] if rows else [], few, bool(rows))


def _traffic_row(run: Entry, row: dict[str, Any]) -> list[Cell]:
    hit = None if row["hit_ratio"] is None else 100 * row["hit_ratio"]
    reader = f"stage {row['by']}" if str(row["by"]).isdecimal() else row["by"]
    sizes = [row.get(name, 0) / MIB for name in ("h2d_bytes", "disk_read_bytes", "d2h_bytes")]
    return [run.label, row["phase"], reader, hit, *sizes, row["stall_ms"], run.n_samples]
