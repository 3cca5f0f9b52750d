"""``task=latency`` with a geometry: attention alone, without a model; the pipeline against every dense kernel of the machine.

One layer of one sequence on structured random keys (:mod:`hipexp.attention.inputs`), under real refresh schedules, with the attention mass
that the selection holds. A measurement is a phase at a length in a round: all dense contestants, and the pipeline before or after them.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hipexp.config.check import CONTEXT_TOK, PHASES
from hipexp.config.schema import Experiment, Pipeline, Task, read_geometry
from hipexp.report.tables import text_table
from hipexp.run.job import Job
from hipexp.run.ledger import Ledger
from hipexp.run.strategy import describe_layers
from hipexp.suites.sample import ProtocolCard
from hipexp.track import Trackers

if TYPE_CHECKING:
    import torch

    from hipexp.attention.inputs import Inputs

DENSE_CALLS, SLOWER = 5, 1.5  # calls of each dense contestant in a round; what is so much slower than the fastest is called in one only
GPU_LAYERS = 8  # their selected keys together exceed the cache; on a CPU the keys of one layer do


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of ``samples.jsonl``."""

    context_tok: int
    phase: str
    repeat: int

    @property
    def subtask(self) -> str:
        return f"{self.phase}@{self.context_tok}"


def filled(task: Task) -> Task:
    """The task with everything that it leaves open said: two tasks that come out equal are the same task. Imports torch."""
    import torch

    dtype = ("bfloat16" if torch.cuda.is_available() else "float32") if task.dtype == "auto" else task.dtype
    assert task.geometry is not None
    geometry = "/".join(map(str, read_geometry(task.geometry)))
    contexts, phases = sorted(task.contexts_tok or [CONTEXT_TOK]), sorted(task.phases or PHASES)
    return dataclasses.replace(task, geometry=geometry, dtype=dtype, contexts_tok=contexts, phases=phases)


def measurements(task: Task) -> list[Measurement]:
    """Every measurement of the run: by length, then phase, then round."""
    assert task.contexts_tok is not None and task.phases is not None
    return [
        Measurement(context, phase, repeat)
        for context in sorted(task.contexts_tok)
        for phase in PHASES
        if phase in task.phases
        for repeat in range(task.repeats)
    ]


def job(experiment: Experiment) -> Job:
    """The run of an experiment whose task has a geometry."""
    experiment = dataclasses.replace(experiment, task=filled(experiment.task))
    task = experiment.task
    card = ProtocolCard(
        suite="latency",
        protocol="hipexp",
        edition=f"attention alone; decode: {task.decode_steps} steps or more, in whole refresh periods; prefill: the last "
        f"{task.queries_tok} queries; {task.repeats} round(s), median",
        template={},
        wording="",
        metric={},
        scorer="none",
        length_tok={},
        samples={},
        new_tok={},
        data=f"structured random keys and queries (drifting), seed {experiment.seed}",
        stops=[],
        model={"geometry": task.geometry, "dtype": task.dtype, "layer": task.layer, "n_layers": 1},
    ).to_dict()
    todo = [(one.subtask, one.repeat) for one in measurements(task)]
    return Job(todo, card | {"strategy": strategy_of(experiment.pipeline, task.layer)}, partial(measure, experiment))


def strategy_of(pipeline: Pipeline | None, layer: int | None) -> list[str]:
    """What attention does in a ``layer``, or in one without layer groups, in words."""
    if pipeline is None:
        return ["attention: dense, every token"]
    return [f"attention: {pipeline.name or 'unnamed'} ({pipeline.method}), one layer", *describe_layers([pipeline.plan_alone(layer)])]


def measure(experiment: Experiment, ledger: Ledger, trackers: Trackers) -> dict[str, Any]:
    """Measure everything that is not in the ledger yet; returns the result part of the summary."""
    import torch

    from hipexp.hf.memory import PeakMemory
    from hipexp.run.point import token_bar
    from hipexp.run.timing import memory_bandwidth

    task = experiment.task
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    todo = [one for one in measurements(task) if not ledger.has(one.subtask, one.repeat)]
    made: list[Inputs] = []
    with torch.inference_mode(), token_bar(sum(one.context_tok for one in todo)) as bar:
        for one in todo:
            bar.set_description(f"latency {one.subtask}")
            if not made or made[0].keys.shape[1] != one.context_tok:
                made.clear()  # before the next ones take as much memory
                gc.collect()  # what was compiled for a length holds its keys in cycles
                made += inputs(experiment, one.context_tok, device)
            memory = PeakMemory()
            memory.start()
            rows = measured(experiment, one, made, too_slow(one, ledger.rows))
            row = line_of(one, rows, memory.peak())
            ledger.append(row)
            trackers.log(row, {})
            bar.advance_to(one.context_tok)
        bandwidth = memory_bandwidth(device)
    made.clear()
    rows = summary_rows([row for line in ledger.rows for row in line["rows"]], bandwidth["read"])
    draw(ledger, rows)
    empty: dict[str, Any] = {"scores": {}, "average": None, "protocol": "hipexp", "note": "", "exact": False, "traffic": {}}
    recalls = {f"{row['context_tok']}": row["recall"] for row in rows if row.get("recall")}
    latency = {"rows": rows, "bandwidth_gb_s": {name: round(value, 1) for name, value in bandwidth.items()}}
    return empty | {"recall": recalls, "latency": latency, "memory": {"peak_bytes": max(line["peak_bytes"] for line in ledger.rows)}}


def inputs(experiment: Experiment, n_tok: int, device: torch.device) -> list[Inputs]:
    """Keys of a layer, or on a GPU of several."""
    import torch

    from hipexp.attention.inputs import Geometry, drifting

    assert experiment.task.geometry is not None
    geometry = Geometry(*read_geometry(experiment.task.geometry), getattr(torch, experiment.task.dtype))
    n_layers = GPU_LAYERS if device.type == "cuda" else 1
    return [drifting(geometry, n_tok, seed=experiment.seed * 1000 + number, device=device) for number in range(n_layers)]


def too_slow(one: Measurement, lines: list[dict[str, Any]]) -> list[str]:
    """Dense contestants that an earlier round of the same phase and length found ``SLOWER`` times as slow as the fastest."""
    found = [row for line in lines if line["subtask"] == one.subtask for row in line["rows"] if row["dense"] and "mean_ms" in row]
    best = min((row["mean_ms"] for row in found), default=0.0)
    return [row["impl"] for row in found if row["mean_ms"] > SLOWER * best]


def measured(experiment: Experiment, one: Measurement, layers: list[Inputs], skip: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of all contestants in one round but those to ``skip``: dense first in the first round, the pipeline in the next."""
    from hipexp.run import attention_latency as alone

    task, name = experiment.task, "" if experiment.pipeline is None else experiment.pipeline.name or experiment.pipeline.method
    attention = None
    if experiment.pipeline is not None:
        attention = alone.layer_attention(experiment.pipeline, layers[0].geometry, layers[0].keys.device, task.layer)
    if one.phase == "prefill":
        return alone.prefill_rows({} if attention is None else {name: attention}, layers[0], task.queries_tok, 1, skip)

    def pruned() -> list[dict[str, Any]]:
        if attention is None:
            return []
        periods = -(-task.decode_steps // alone.period_of(attention.plan))
        row = alone.decode_row(attention, layers, periods, name)
        row |= {"bytes": alone.decode_bytes(attention, layers[0])}
        return [row | (alone.recall_of(attention, layers) if one.repeat == 0 else {})]

    def dense() -> list[dict[str, Any]]:
        rows = alone.dense_decode_rows(layers, DENSE_CALLS, skip)
        return [row | {"bytes": layers[0].keys.nbytes + layers[0].values.nbytes} for row in rows]

    parts: list[Callable[[], list[dict[str, Any]]]] = [dense, pruned] if one.repeat % 2 == 0 else [pruned, dense]
    return [row for part in parts for row in part()]


def line_of(one: Measurement, rows: list[dict[str, Any]], peak_bytes: int) -> dict[str, Any]:
    """The line of ``samples.jsonl`` of a measurement; ``rows`` holds every contestant. ``peak_bytes``: of all, beside keys and values."""
    times = [row["mean_ms"] for row in rows if "mean_ms" in row]
    return {
        "subtask": one.subtask, "sample": one.repeat, "prediction": "", "references": [], "score": None, "context_tok": one.context_tok,
        "new_tok": 0, "removed_tok": 0, "prefill_ms": 0.0, "decode_ms": None, "status": "done", "length_tok": one.context_tok,
        "impl": one.phase, "steps_ms": times, "peak_bytes": peak_bytes, "traffic": {}, "rows": rows,
    }  # fmt: skip


TIMES = ("mean_ms", "p10_ms", "p90_ms", "cached_ms", "full_ms")
RECALL = ("fixed", "recall", "recall_p5", "oracle_ratio")


def summary_rows(rows: list[dict[str, Any]], bandwidth_gb_s: float) -> list[dict[str, Any]]:
    """One row per phase, length and contestant: medians over the rounds, the worst step of all; what did not run, with the reason.

    ``speedup`` is over the fastest dense contestant; ``of_limit``: the share of ``bandwidth_gb_s`` at which the counted ``bytes`` of a mean
    decode step pass.
    """
    from hipexp.run.attention_latency import with_speedup

    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    row: dict[str, Any]
    for row in rows:
        found.setdefault((row["phase"], row["context_tok"], row["impl"]), []).append(row)
    out = []
    for (phase, context, impl), mine in found.items():
        row = {"phase": phase, "context_tok": context, "impl": impl, "dense": mine[0]["dense"]}
        timed = [one for one in mine if "mean_ms" in one]
        if not timed:
            out.append(row | {"note": mine[0]["note"]})
            continue
        for name in TIMES:
            values = [one[name] for one in timed if one.get(name) is not None]
            row[name] = round(statistics.median(values), 4) if values else None
        row["worst_ms"] = max(one.get("worst_ms", one["p90_ms"]) for one in timed)
        row["bytes"] = timed[0].get("bytes")
        row["of_limit"] = round(row["bytes"] / (bandwidth_gb_s * row["mean_ms"] * 1e6), 3) if row["bytes"] else None
        recall = next(({name: round(one[name], 4) for name in RECALL} for one in timed if "recall" in one), None)
        out.append(row | ({"recall": recall} if recall else {}))
    for row in with_speedup(out):
        if row.get("speedup") is not None:
            row["speedup"] = round(row["speedup"], 3)
    return sorted(out, key=lambda row: (row["phase"], row["context_tok"], not row["dense"], row.get("mean_ms") or 1e9))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    header = ["phase", "keys", "attention", "mean ms", "p10", "p90", "cached", "full", "worst", "× dense", "MB/step", "of limit", "recall"]
    cells = []
    for row in rows:
        where = [row["phase"], row["context_tok"], row["impl"]]
        if "note" in row:
            continue
        times = [row[name] for name in ("mean_ms", "p10_ms", "p90_ms", "cached_ms", "full_ms", "worst_ms")]
        speedup = f"{row['speedup']:.2f}" if row.get("speedup") else None
        size = row["bytes"] / 1e6 if row["bytes"] else None
        limit = f"{100 * row['of_limit']:.0f} %" if row["of_limit"] else None
        recall = f"{row['recall']['recall']:.2f}" if row.get("recall") else None
        cells.append([*where, *times, speedup, size, limit, recall])
    notes = dict.fromkeys(f"{row['impl']} was left out: {row['note']}" for row in rows if "note" in row)
    recalled = any(row.get("recall") for row in rows)
    words = "recall: share of the attention outside sinks and window that is selected at a full refresh" if recalled else ""
    return "\n".join(filter(None, [text_table(header, cells, left=3), words, *notes]))


def draw(ledger: Ledger, rows: list[dict[str, Any]]) -> None:
    """The picture of the run: time by length, the fastest dense contestant and the pipeline. Left out where matplotlib is missing."""
    from importlib.util import find_spec

    from hipexp.report.figures import draw_lines

    if find_spec("matplotlib") is None:
        return
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row.get("mean_ms") is None:
            continue
        line = "dense, the fastest" if row["dense"] else row["impl"]
        points = panels.setdefault(row["phase"], {}).setdefault(line, [])
        if not row["dense"] or all(context != row["context_tok"] for context, _ in points):  # rows come fastest first
            points.append((row["context_tok"], row["mean_ms"]))
    draw_lines(ledger.folder / "latency.png", "Attention of one layer", panels, ("tokens", "ms"))
