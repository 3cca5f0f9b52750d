"""Latency of attention alone, without any model: one layer of a pipeline against the fastest dense attention of the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.inputs import Geometry, Inputs, drifting
from hipexp.attention.recall import attention_mass, chosen_tokens, fixed_tokens, logits_at_one_distance, logits_in_place
from hipexp.attention.rope import RopeTables
from hipexp.config.schema import LayerPlan, Pipeline, PruneRope
from hipexp.run.contestants import decode_contestants, prefill_contestants
from hipexp.run.latency import quantile
from hipexp.run.timing import HEAD_START_CYCLES, Contestant, fastest, runnable, time_alternating

ROPE_BASE, TRAINED_TOK = 500_000.0, 131_072  # of Llama 3.1, without its frequency scaling


def layer_attention(pipeline: Pipeline, geometry: Geometry, device: torch.device, layer: int | None = None) -> LayerAttention:
    """The attention of a ``layer`` of a model of 32 or more; of one to which no layer group applies, if it is None."""
    plan = pipeline.plan_alone(layer)
    inverse = ROPE_BASE ** (-torch.arange(0, geometry.head_dim, 2, device=device) / geometry.head_dim)

    def cos_sin(positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions.to(device)[:, None] * inverse
        return angle.cos(), angle.sin()

    return LayerAttention(plan, RopeTables(cos_sin, TRAINED_TOK), geometry.scale)


def period_of(plan: LayerPlan) -> int:
    """Steps after which the refreshes of all decode stages repeat."""
    return math.lcm(*(stage.refresh_steps for stage in plan.decode)) if plan.decode else 1


def dues(plan: LayerPlan, n_steps: int) -> list[int]:
    """The first stage that each decode step runs again, where something is remembered; the number of stages for a cached step."""
    remembering = Memory(lists={len(plan.decode): (torch.empty(0), torch.empty(0))})
    found = []
    for remembering.step in range(n_steps):
        found.append(remembering.first_stage_due(plan.decode, plan.shift_steps))
    return found


@dataclass
class DecodeRun:
    """Decode steps of several layers with keys of their own, the last of ``T`` tokens each; one CUDA graph for each kind of step
    on a GPU, where the method can be captured.

    ``queries`` ``[steps, layers, H, 1, D]``.
    """

    attention: LayerAttention
    layers: list[Inputs]
    queries: Tensor

    def __post_init__(self) -> None:
        self.last = self.layers[0].keys.shape[1] - 1
        self.n_steps, self.device = len(self.queries), self.queries.device
        self.memories = [Memory() for _ in self.layers]
        self.states = [self.attention.method.new_state() for _ in self.layers]
        self.now = torch.empty_like(self.queries[0])
        self.step = self.attention.step_at(self.last, self.device)

    def times_ms(self) -> list[float]:
        """Milliseconds of one layer in each step, in order."""
        schedule = dues(self.attention.plan, self.n_steps)
        self._set(0)
        self._all_layers(0)  # compiles what is needed, and fills every list
        captures = self.device.type == "cuda" and self.attention.method.captures
        return self._timed_gpu(schedule, self._captured(schedule)) if captures else self._timed_call_by_call(schedule)

    def _set(self, step: int) -> None:
        self.now.copy_(self.queries[step])
        self.step.numbers.copy_(self.attention.step_at(self.last - self.n_steps + 1 + step, self.device).numbers)

    def _all_layers(self, step: int) -> None:
        for layer, memory, state, q in zip(self.layers, self.memories, self.states, self.now, strict=True):
            memory.step = step
            self.attention(q, layer.keys, layer.values, self.last, memory, self.step, state)

    def _captured(self, schedule: list[int]) -> dict[int, Callable[[], None]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._all_layers(0)
        torch.cuda.current_stream().wait_stream(side)
        calls = {}
        for due in sorted(set(schedule)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._all_layers(schedule.index(due))
            calls[due] = graph.replay
        return calls

    def _timed_gpu(self, schedule: list[int], calls: dict[int, Callable[[], None]]) -> list[float]:
        marks = []
        for step, due in enumerate(schedule):
            self._set(step)
            torch.cuda.synchronize()
            torch.cuda._sleep(HEAD_START_CYCLES)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            calls[due]()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / len(self.layers) for begin, end in marks]

    def _timed_call_by_call(self, schedule: list[int]) -> list[float]:
        times, wait = [], torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        for step in range(len(schedule)):
            self._set(step)
            wait()
            begin = time.perf_counter()
            self._all_layers(step)
            wait()
            times.append((time.perf_counter() - begin) * 1e3 / len(self.layers))
        return times


def make_layers(geometry: Geometry, n_tok: int, n_layers: int, device: torch.device) -> list[Inputs]:
    """Keys and values of several layers; their queries come from the same text."""
    return [drifting(geometry, n_tok, seed=seed, device=device) for seed in range(n_layers)]


def decode_row(attention: LayerAttention, layers: list[Inputs], periods: int, name: str) -> dict[str, Any]:
    """Time whole refresh periods of decode steps of one layer: the times of :func:`step_times`, and how many ``steps`` there were."""
    n_steps = period_of(attention.plan) * periods
    queries = torch.stack([torch.stack([layer.queries(step) for layer in layers]) for step in range(n_steps)])[:, :, :, None]
    times = DecodeRun(attention, layers, queries).times_ms()
    row = {"phase": "decode", "context_tok": layers[0].keys.shape[1], "dense": False, "impl": name}
    return row | step_times(attention.plan, times) | {"steps": n_steps}


def step_times(plan: LayerPlan, times: list[float]) -> dict[str, float | None]:
    """Of the milliseconds of whole refresh periods: ``mean_ms`` over all steps, ``worst_ms``, ``p10_ms``, ``p90_ms``.

    ``cached_ms`` and ``full_ms``: medians of the steps in which no stage runs again (None if there are none), and of those in which all do.
    """
    by_due: dict[int, list[float]] = {}
    for ms, due in zip(times, dues(plan, len(times)), strict=True):
        by_due.setdefault(due, []).append(ms)
    cached = by_due.get(len(plan.decode))
    row = {"mean_ms": sum(times) / len(times), "worst_ms": max(times), "p10_ms": quantile(times, 0.1), "p90_ms": quantile(times, 0.9)}
    return row | {"cached_ms": quantile(cached, 0.5) if cached else None, "full_ms": quantile(by_due[0], 0.5)}


def recall_of(attention: LayerAttention, layers: list[Inputs], step: int = 0) -> dict[str, float]:
    """What a full refresh selects at a decode step, over all heads of all layers: the mass that is always attended to (``fixed``), the
    share of the rest that is selected (``recall``, mean and 5th percentile), and that in parts of the best possible (``oracle_ratio``).

    Measured at the distance at which the stages score, or at true positions where they do. Empty for a pipeline that selects nothing, and
    where nothing has to be left out.
    """
    plan, found = attention.plan, []
    if not plan.decode:
        return {}
    distance = max(0, plan.window_tok - plan.decode[0].chunk_tok)
    for layer in layers:
        q, n_tok, memory = layer.queries(step), layer.keys.shape[1], Memory()
        attention(q[:, None], layer.keys, layer.values, n_tok - 1, memory)
        if not memory.lists:
            return {}
        starts, counts = memory.lists[len(plan.decode)]
        chosen = chosen_tokens(starts[:, 0], counts[:, 0], plan.decode[-1].chunk_tok, n_tok)
        assert attention.tables is not None
        if plan.decode[0].rope is PruneRope.native:
            logits = logits_in_place(q, layer.keys, attention.scale, attention.tables.upto(n_tok))
        else:
            logits = logits_at_one_distance(q, layer.keys, attention.scale, attention.tables.upto(distance + 1), distance)
        found.append(attention_mass(logits, chosen, fixed_tokens(n_tok, plan.sink_tok, max(0, n_tok - plan.window_tok), q.device)))
    recall = torch.cat([mass.recall for mass in found])
    return {
        "fixed": float(torch.cat([mass.fixed for mass in found]).mean()),
        "recall": float(recall.mean()),
        "recall_p5": float(recall.quantile(0.05)),
        "oracle_ratio": float(torch.cat([mass.oracle_ratio for mass in found]).mean()),
    }


def dense_decode_rows(layers: list[Inputs], rounds: int, skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every dense contestant that runs here, on the same keys."""
    device, n_tok = layers[0].keys.device, layers[0].keys.shape[1]
    inputs = [(layer.queries(0), layer.keys, layer.values) for layer in layers]
    able, reasons = runnable([c for c in decode_contestants(device) if c.name not in skip], inputs)
    rows = time_alternating(able, inputs, rounds=rounds)
    common = {"phase": "decode", "context_tok": n_tok, "dense": True}
    return [{**common, "impl": row.pop("name"), **row} for row in rows] + _left_out(common, reasons)


def decode_bytes(attention: LayerAttention, layer: Inputs) -> int:
    """Bytes of keys, values and summaries that a mean decode step asks for, over whole refresh periods, with lists of full length."""
    geometry, n_tok = layer.geometry, layer.keys.shape[1]
    rows = attention.method.decode_rows(n_tok, geometry.heads, geometry.kv_heads)
    return round(sum(rows) * layer.keys.element_size() * geometry.head_dim)


def prefill_rows(
    pipelines: dict[str, LayerAttention], layer: Inputs, n_queries: int, rounds: int, skip: Sequence[str] = ()
) -> list[dict[str, Any]]:  # fmt: skip
    """The last ``n_queries`` of ``T`` tokens, dense contestants and the named pipelines in turn."""
    device, n_tok = layer.keys.device, layer.keys.shape[1]
    q = layer.prefill_queries(n_queries)

    def contestant_of(name: str, attention: LayerAttention) -> Contestant:
        state = attention.method.new_state()  # knows the whole prompt once the first call is through: its making is not timed
        return Contestant(name, lambda q, k, v: attention(q, k, v, n_tok - n_queries, state=state))

    own = [contestant_of(name, attention) for name, attention in pipelines.items()]
    able, reasons = runnable([c for c in prefill_contestants(device) if c.name not in skip], [(q, layer.keys, layer.values)])
    for contestant in own:  # the others ran once to see whether they can
        contestant.run(q, layer.keys, layer.values)
    rows = time_alternating([*able, *own], [(q, layer.keys, layer.values)], rounds=rounds, warmup=0, graphs=False)
    common = {"phase": "prefill", "context_tok": n_tok, "queries": n_queries, "dense": True}
    made = [{**common, "impl": row.pop("name"), **row} for row in rows]
    for row in made[len(able) :]:
        row["dense"] = False
    return made + _left_out(common, reasons)


def _left_out(common: dict[str, Any], reasons: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of contestants that do not run here, with the reason."""
    return [{**common, "impl": name, "note": reason} for name, reason in reasons.items()]


def with_speedup(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``speedup`` over the fastest dense contestant of the same phase and length to the rows of pipelines."""
    for row in rows:
        where = row["phase"], row["context_tok"]
        dense = [r for r in rows if r["dense"] and "mean_ms" in r and (r["phase"], r["context_tok"]) == where]
        if not row["dense"] and dense:
            best = fastest(dense)
            row["speedup"], row["against"] = best["mean_ms"] / row["mean_ms"], best["impl"]
    return rows
