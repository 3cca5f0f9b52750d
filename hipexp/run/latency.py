"""``task=latency``: time of a whole-prompt prefill and of decode steps, dense and pipeline alternating in one run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import Experiment, Offload, Pipeline
from hipexp.report.tables import text_table
from hipexp.run.ledger import Ledger
from hipexp.run.room import on_disk_tier
from hipexp.run.strategy import refresh_pattern
from hipexp.suites import infbench, lengths_of
from hipexp.suites.sample import Encode, LineEncoder, ProtocolCard, Sample
from hipexp.track import Trackers

if TYPE_CHECKING:
    from hipexp.hf import Generation, Loaded

Progress = Callable[[int], None]
WARM_TOK = 2048


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: ``impl`` is ``dense`` or ``pruned``, for the pipeline whatever its name; ``repeat`` numbers the rounds."""

    length_tok: int
    impl: str
    repeat: int

    @property
    def subtask(self) -> str:
        return f"{self.impl}@{self.length_tok}"


def check_lengths(experiment: Experiment, encode: Encode, trained_tok: int) -> None:
    """Refuse lengths that hold no frame beside the decode steps. Raises ``ConfigError``."""
    for key, length_tok in lengths_of(experiment.task, trained_tok).items():
        infbench.check_length("passkey", length_tok, encode, key=key, more_tok=experiment.task.decode_steps)


def points(experiment: Experiment, trained_tok: int) -> list[Point]:
    """Every measurement of the run: by length, then round by round, dense before the pipeline in each round."""
    limit = experiment.task.dense_max_tok
    impls = ["dense"] if experiment.pipeline is None else ["dense", "pruned"]
    return [
        Point(length, impl, repeat)
        for length in sorted(lengths_of(experiment.task, trained_tok).values())
        for repeat in range(experiment.task.repeats)
        for impl in impls
        if impl != "dense" or limit is None or length <= limit
    ]


def card(experiment: Experiment, n_layers: int) -> ProtocolCard:
    """The protocol of a latency run: what is timed, on what text."""
    task, warm = experiment.task, warm_steps(experiment, "pruned", n_layers)
    behind = f" (of the pipeline behind {warm} in which CUDA graphs are made)" * bool(warm)
    limit = "at every length" if task.dense_max_tok is None else f"up to {task.dense_max_tok} tokens only"
    return ProtocolCard(
        suite="latency",
        protocol="hipexp",
        edition=f"whole-prompt prefill, then {task.decode_steps} decode steps{behind}; {task.repeats} round(s), median; dense {limit}",
        template={"passkey": infbench.template_id("passkey", "default")},
        wording="default",
        metric={},
        scorer="none",
        length_tok={},
        samples={},
        new_tok={"passkey": task.decode_steps + 1},
        data=f"generated pass-key text, seed {experiment.seed}",
        stops=[],
    )


def measure(experiment: Experiment, loaded: Loaded, ledger: Ledger, trackers: Trackers) -> dict[str, Any]:
    """Measure every point that is not in the ledger yet; returns the result part of the summary."""
    from hipexp.run.point import token_bar

    task = experiment.task
    encode = LineEncoder(loaded.tokenizer)
    todo = [p for p in points(experiment, loaded.trained_tok) if not ledger.has(p.subtask, p.repeat)]
    with token_bar(sum(point.length_tok for point in todo)) as bar:
        for impl in dict.fromkeys(point.impl for point in todo):
            timed(experiment, loaded, impl, prompt(encode, WARM_TOK, 2, experiment.seed), 2)
        for point in todo:
            bar.set_description(f"latency {point.subtask}")
            warm = warm_steps(experiment, point.impl, loaded.n_layers)
            sample = prompt(encode, point.length_tok, warm + task.decode_steps, experiment.seed)
            made = timed(experiment, loaded, point.impl, sample, warm + task.decode_steps, bar.update)
            row = row_of(point, sample, dataclasses.replace(made, decode_ms=made.decode_ms[warm:]))
            ledger.append(row)
            trackers.log(row, {})
            bar.advance_to(point.length_tok)
    from hipexp.cache.traffic import summarize

    rows = latency_rows(ledger.rows, experiment.pipeline, loaded.n_layers)
    draw_traffic(ledger, rows)
    memory = {"peak_bytes": max(row["peak_bytes"] for row in ledger.rows)}
    exact = all(row["exact"] for row in ledger.rows)
    empty: dict[str, Any] = {"scores": {}, "average": None, "protocol": "hipexp", "note": "", "exact": exact, "recall": {}}
    return empty | {"latency": {"rows": rows}, "memory": memory, "traffic": summarize(row["traffic"] for row in ledger.rows)}


def prompt(encode: LineEncoder, length_tok: int, decode_steps: int, seed: int) -> Sample:
    """A pass-key text that fills ``length_tok`` together with the decode steps."""
    rng = infbench.seeded("latency", seed, length_tok)
    return infbench.digits_sample("passkey", 0, 0.5, length_tok - decode_steps, encode, rng)


def warm_steps(experiment: Experiment, impl: str, n_layers: int) -> int:
    """Decode steps before those that are timed: on a GPU, until every pattern of refreshes has its CUDA graph, where it may get one."""
    import torch

    pipeline = experiment.pipeline
    if impl == "dense" or pipeline is None or not experiment.model.cuda_graphs or experiment.offload.on or not torch.cuda.is_available():
        return 0
    from hipexp.attention.methods import make_method
    from hipexp.hf.graphs import steps_until_recorded

    return steps_until_recorded(refresh_pattern(pipeline, n_layers)[0]) if make_method(pipeline.plan_alone(None)).captures else 0


def timed(
    experiment: Experiment, loaded: Loaded, impl: str, sample: Sample, decode_steps: int, progress: Progress | None = None
) -> Generation:
    """One prefill and ``decode_steps`` decode steps that nothing stops early, with the attention that ``impl`` names."""
    from hipexp import hf

    pipeline, offload = (None, Offload()) if impl == "dense" else (experiment.pipeline, experiment.offload)
    with on_disk_tier(), hf.install(loaded.model, pipeline, loaded.trained_tok, offload=offload) as installed:
        (made,) = hf.generate(
            loaded,
            [sample.tokens],
            max_new_tok=decode_steps + 1,
            prefill_chunk_tok=experiment.model.prefill_chunk_tok,
            graphs=experiment.model.cuda_graphs,
            stop_ids=set(),
            progress=progress,
            installed=installed,
        )
    return made


def row_of(point: Point, sample: Sample, made: Generation) -> dict[str, Any]:
    """The line of ``samples.jsonl`` of a measurement; ``steps_ms`` holds every decode step."""
    return {
        "subtask": point.subtask,
        "sample": point.repeat,
        "prediction": "",
        "references": [],
        "score": None,
        "context_tok": len(sample.tokens),
        "new_tok": len(made.tokens),
        "removed_tok": 0,
        "prefill_ms": round(made.prefill_ms, 3),
        "decode_ms": round(statistics.fmean(made.decode_ms), 3),
        "status": "done",
        "length_tok": point.length_tok,
        "impl": point.impl,
        "steps_ms": [round(ms, 3) for ms in made.decode_ms],
        "peak_bytes": made.peak_bytes,
        "exact": made.exact,
        "traffic": made.traffic and made.traffic | {"steps": len(made.decode_ms)},
    }


def quantile(values: list[float], share: float) -> float:
    """The ``share`` quantile of ``values``, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def latency_rows(rows: list[dict[str, Any]], pipeline: Pipeline | None, n_layers: int) -> list[dict[str, Any]]:
    """One row per phase, length and implementation; ``impl`` is ``dense`` or the pipeline's name.

    ``mean_ms``: prefill, the median over rounds; decode, the mean over as many steps as make whole refresh periods (all, if
    there are fewer), first full refresh included, then the median over rounds. ``cached_ms``: median of the decode steps in which no
    stage is due for a refresh; ``worst_ms``: the slowest. ``speedup``: dense ``mean_ms`` / ``mean_ms``; None without dense.
    Where keys and values are off the device also ``h2d_bytes``, ``d2h_bytes``, ``hit_ratio`` and ``stall_ms``, of a prefill, or of
    a step as the mean over all of them.
    """
    table = []
    for name in dict.fromkeys(row["subtask"] for row in rows):
        mine = [row for row in rows if row["subtask"] == name]
        period, shortest = refresh_pattern(None if mine[0]["impl"] == "dense" else pipeline, n_layers)
        shown = "dense" if pipeline is None or mine[0]["impl"] == "dense" else pipeline.name or pipeline.method
        common = {"context_tok": mine[0]["length_tok"], "impl": shown}
        memory = {"bytes": max(row["peak_bytes"] for row in mine)}
        prefill, decode = traffic_per_phase(mine)
        table.append({"phase": "prefill", **common, **prefill_times([row["prefill_ms"] for row in mine]), **memory, **prefill})
        table.append({"phase": "decode", **common, **decode_times([row["steps_ms"] for row in mine], period, shortest), **memory, **decode})
    dense = {(row["phase"], row["context_tok"]): row["mean_ms"] for row in table if row["impl"] == "dense"}
    for row in table:
        base = dense.get((row["phase"], row["context_tok"]))
        row["speedup"] = None if base is None else round(base / row["mean_ms"], 3)
    return sorted(table, key=lambda row: (row["phase"] != "prefill", row["context_tok"], row["impl"] != "dense"))


def prefill_times(times: list[float]) -> dict[str, float | None]:
    """The times of one prompt's prefill over the rounds."""
    spread = {"p10_ms": quantile(times, 0.1), "p90_ms": quantile(times, 0.9)}
    return {"mean_ms": statistics.median(times), **spread, "cached_ms": None, "worst_ms": max(times)}


def decode_times(rounds: list[list[float]], period: int, shortest: int) -> dict[str, float | None]:
    """The times of decode steps over the rounds; see ``latency_rows``."""
    whole = [steps[: len(steps) // period * period] or steps for steps in rounds]
    every = [ms for steps in whole for ms in steps]
    cached = [ms for steps in whole for i, ms in enumerate(steps) if i % shortest]
    return {
        "mean_ms": round(statistics.median(statistics.fmean(steps) for steps in whole), 3),
        "p10_ms": round(quantile(every, 0.1), 3),
        "p90_ms": round(quantile(every, 0.9), 3),
        "cached_ms": round(statistics.median(cached), 3) if cached else None,
        "worst_ms": max(every),
    }


def traffic_per_phase(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a prefill and what a decode step moved, as the mean over the measurements ``rows``; empty where nothing leaves the device."""
    from hipexp.cache.traffic import summarize

    told = summarize(row["traffic"] for row in rows)
    if not told:
        return {}, {}

    def mean(phase: str, of: int) -> dict[str, Any]:
        moved = {name: round(told[phase][name] / of) for name in ("h2d_bytes", "d2h_bytes")}
        return moved | {"hit_ratio": told[phase]["hit_ratio"], "stall_ms": round(told[phase]["stall_ms"] / of, 3)}

    return mean("prefill", len(rows)), mean("decode", told["decode"]["steps"])


def draw_traffic(ledger: Ledger, rows: list[dict[str, Any]]) -> None:
    """The picture of what crosses the link, by length. Left out where nothing does, or matplotlib is missing."""
    from hipexp.report.figures import draw_lines

    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if "h2d_bytes" in row:
            lines = panels.setdefault("a prefill" if row["phase"] == "prefill" else "a decode step, on average", {})
            for line, name in (("fetched", "h2d_bytes"), ("written", "d2h_bytes")):
                lines.setdefault(line, []).append((row["context_tok"], row[name] / 2**20))
    if panels and find_spec("matplotlib"):
        heading = f"Keys and values over the link, {rows[-1]['impl']}"
        draw_lines(ledger.folder / "traffic.png", heading, panels, ("tokens", "MiB"), scale="linear")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, and a word on lengths at which dense was not measured."""
    header = ["phase", "context", "attention", "mean ms", "p10", "p90", "no refresh", "worst", "× dense", "MiB"]
    names = ["phase", "context_tok", "impl", "mean_ms", "p10_ms", "p90_ms", "cached_ms", "worst_ms"]
    moved = any("h2d_bytes" in row for row in rows)
    header += ["hit %", "MiB fetched", "MiB written", "stall ms"] if moved else []
    cells = []
    for row in rows:
        speedup = None if row["speedup"] is None else f"{row['speedup']:.2f}"
        cells.append([*(row[name] for name in names), speedup, row["bytes"] / 2**20, *(traffic_cells(row) if moved else [])])
    text = text_table(header, cells, left=1)
    alone = sorted({row["context_tok"] for row in rows if row["speedup"] is None})
    if alone:
        text += f"\ndense was not measured at {', '.join(map(str, alone))} tokens (task.dense_max_tok)"
    return text


def traffic_cells(row: dict[str, Any]) -> list[float | None]:
    """Percent of hits, MiB fetched and written, and milliseconds of waiting; None for a row of dense attention."""
    if "h2d_bytes" not in row:
        return [None] * 4
    hit = None if row["hit_ratio"] is None else 100 * row["hit_ratio"]
    return [hit, row["h2d_bytes"] / 2**20, row["d2h_bytes"] / 2**20, row["stall_ms"]]


def too_few_steps(experiment: Experiment, n_layers: int) -> str:
    """A word on a decode mean that does not span a refresh period; empty if it does."""
    period, steps = refresh_pattern(experiment.pipeline, n_layers)[0], experiment.task.decode_steps
    if steps >= period:
        return ""
    return f"{steps} decode steps hold a larger share of refreshes than a long answer: for a whole period task.decode_steps={period}"
