"""Latency of attention alone: what is timed, which steps refresh what, what stands in a row. No assertion about time."""

import dataclasses

import pytest
import torch
from hipexp_kernels.rope import rotate

from hipexp.attention import Memory
from hipexp.attention.inputs import Geometry
from hipexp.config.schema import AttendRope, Pipeline, PruneRope, Representative, Rope, Stage
from hipexp.run import attention_latency as latency
from hipexp.run.gpu import preset

GEOMETRY, CPU, T = Geometry(4, 2, 16), torch.device("cpu"), 608
SMALL = Pipeline(
    method="hip",
    sink_tok=16,
    window_tok=64,
    stages=[Stage(32, 128, 16, 4, 4), Stage(8, 64, 16, 1, 2)],
    rope=Rope(),
    name="small",
)


@pytest.fixture(scope="module")
def layers():
    return latency.make_layers(GEOMETRY, T, 2, CPU)


def test_which_stage_each_step_runs_again():
    plan = latency.layer_attention(SMALL, GEOMETRY, CPU).plan
    assert latency.period_of(plan) == 4
    assert latency.dues(plan, 8) == [0, 2, 1, 2, 0, 2, 1, 2]
    staggered = dataclasses.replace(SMALL, staggered_refresh=True)
    assert latency.dues(latency.layer_attention(staggered, GEOMETRY, CPU, layer=1).plan, 4) == [2, 1, 2, 0]
    assert latency.period_of(latency.layer_attention(preset("3stage_flash"), GEOMETRY, CPU).plan) == 96


@pytest.mark.parametrize("staggered", [False, True])
def test_timed_steps_are_those_of_decode(layers, staggered):
    """What is timed computes what a decode loop does, at the position of each step."""
    pipeline = dataclasses.replace(SMALL, staggered_refresh=staggered)
    attention = latency.layer_attention(pipeline, GEOMETRY, CPU)
    queries = torch.stack([torch.stack([layer.queries(step) for layer in layers]) for step in range(6)])[:, :, :, None]
    run, seen = latency.DecodeRun(attention, layers, queries), []
    plain, memory = latency.layer_attention(pipeline, GEOMETRY, CPU), Memory()
    inner = LayerSpy(attention, seen)
    run.attention = inner
    assert len(run.times_ms()) == 6
    for step in range(6):
        end = T - 6 + step + 1
        expected = plain(queries[step, 0], layers[0].keys[:, :end], layers[0].values[:, :end], end - 1, memory)
        torch.testing.assert_close(seen[2 * (step + 1)], expected)  # two layers, and a step before the clock runs


class LayerSpy:
    def __init__(self, attention, seen):
        self.attention, self.seen, self.plan, self.step_at = attention, seen, attention.plan, attention.step_at

    def __call__(self, *args):
        self.seen.append(self.attention(*args))
        return self.seen[-1]


def test_a_row_says_how_long_and_how_well(layers):
    attention = latency.layer_attention(SMALL, GEOMETRY, CPU)
    row = latency.decode_row(attention, layers, 1, "small") | latency.recall_of(attention, layers)
    assert row["steps"] == 4 and row["context_tok"] == T
    assert row["p10_ms"] <= row["p90_ms"] <= row["worst_ms"]
    assert 0 < row["recall_p5"] <= row["recall"] <= 1 and 0 < row["fixed"] < 1
    assert row["recall"] < row["oracle_ratio"] <= 1 + 1e-6


def test_recall_at_the_positions_of_the_strategy(layers):
    """True positions see another attention than one distance for all, and the selection is measured by what it was made for."""
    native = dataclasses.replace(SMALL, rope=Rope(prune=PruneRope.native, attend=AttendRope.native))
    attention = latency.layer_attention(native, GEOMETRY, CPU)
    found = latency.recall_of(attention, layers[:1])
    q, memory = layers[0].queries(0), Memory()
    attention(q[:, None], layers[0].keys, layers[0].values, T - 1, memory)
    cos, sin = attention.tables.cos_sin(torch.arange(T))
    keys = rotate(layers[0].keys, cos, sin).repeat_interleave(2, 0)
    mass = torch.softmax(torch.einsum("hd,htd->ht", rotate(q, cos[-1], sin[-1]), keys) * attention.scale, -1)
    starts, counts = memory.lists[2]
    chosen = torch.zeros(T, dtype=torch.bool)
    for start in starts[0, 0, : counts[0, 0]]:
        chosen[start : start + 8] = True
    outside = (torch.arange(T) >= 16) & (torch.arange(T) < T - 64)
    expected = (mass[:, chosen & outside].sum(1) / mass[:, outside].sum(1)).mean()
    assert found["recall"] == pytest.approx(float(expected), rel=1e-4)


def test_nothing_selected_is_no_recall(layers):
    streaming = Pipeline(method="streaming", sink_tok=16, window_tok=64, stages=[], rope=Rope(), name="streaming")
    roomy = dataclasses.replace(SMALL, window_tok=T)
    assert latency.recall_of(latency.layer_attention(streaming, GEOMETRY, CPU), layers) == {}
    assert latency.recall_of(latency.layer_attention(roomy, GEOMETRY, CPU), layers) == {}


def test_the_speedup_is_over_the_fastest_dense_kernel():
    def row(impl, ms, n=1024, dense=True, median=1.0):
        return {"phase": "decode", "context_tok": n, "dense": dense, "impl": impl, "mean_ms": ms, "median_ms": median}

    rows = [row("a", 8.0), row("b", 6.0, median=3.0), row("3stage", 2.0, dense=False), row("3stage", 1.0, 2048, dense=False)]
    rows = latency.with_speedup([*rows, {"phase": "decode", "context_tok": 1024, "dense": True, "impl": "c", "note": "not here"}])
    assert rows[2]["speedup"] == 3 and rows[2]["against"] == "b"
    assert all("speedup" not in rows[i] for i in (0, 1, 3, 4))


def test_prefill_and_dense_in_one_table(layers):
    bounds = dataclasses.replace(
        SMALL, stages=[dataclasses.replace(SMALL.stages[0], representative=Representative.bounds), SMALL.stages[1]]
    )
    pipelines = {name: latency.layer_attention(pipeline, GEOMETRY, CPU) for name, pipeline in (("small", SMALL), ("bounds", bounds))}
    rows = latency.prefill_rows(pipelines, layers[0], 96, rounds=2) + latency.dense_decode_rows(layers, 2, skip=("flex packed",))
    names = {row["impl"] for row in rows}
    assert {"small", "bounds", "flash, prefix + diagonal", "sdpa packed"} <= names
    assert [row["impl"] for row in rows if not row["dense"]] == ["small", "bounds"]
    assert all(row["mean_ms"] > 0 for row in rows if "note" not in row)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_steps_are_those_of_decode():
    """Every CUDA graph gives what eager decode gives at the step it is replayed for."""
    device = torch.device("cuda", 0)
    made = latency.make_layers(GEOMETRY, T, 1, device)
    queries = torch.stack([made[0].queries(step)[None] for step in range(8)])[:, :, :, None]
    attention, seen = latency.layer_attention(SMALL, GEOMETRY, device), []
    run = latency.DecodeRun(attention, made, queries)
    run.attention = LayerSpy(attention, seen)
    run._set(0)
    run._all_layers(0)
    schedule = latency.dues(attention.plan, 8)
    calls = run._captured(schedule)
    outputs = dict(zip(sorted(set(schedule)), seen[-len(calls) :], strict=True))
    plain, memory = latency.layer_attention(SMALL, GEOMETRY, device), Memory()
    for step, due in enumerate(schedule):
        run._set(step)
        calls[due]()
        end = T - 8 + step + 1
        expected = plain(queries[step, 0], made[0].keys[:, :end], made[0].values[:, :end], end - 1, memory)
        torch.testing.assert_close(outputs[due], expected, rtol=1e-3, atol=1e-3)
