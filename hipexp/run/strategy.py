"""A pipeline in words: the resolved strategy and budget of every layer, as each run prints it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import groupby

from hipexp.config.check import OFFLOADING
from hipexp.config.offload import show_bytes
from hipexp.config.schema import LayerPlan, Offload, Pipeline, Stage, spans


def budget_tok(plan: LayerPlan, stages: list[Stage]) -> int:
    """The most tokens a query of this layer attends to: sink, what the last stage keeps, window."""
    return plan.sink_tok + (stages[-1].keep_tok if stages else 0) + plan.window_tok


def refresh_pattern(pipeline: Pipeline | None, n_layers: int) -> tuple[int, int]:
    """How refreshes repeat in decode: ``(period, shortest)`` in steps; ``(1, 1)`` where nothing is ever refreshed.

    After ``period`` steps the pattern of all stages and layers repeats; steps between multiples of ``shortest`` use
    cached selections only; of layers that are staggered no step is taken to do so.
    """
    plans = [] if pipeline is None else pipeline.plan(n_layers)
    intervals = {stage.refresh_steps for plan in plans for stage in plan.decode} or {1}
    return math.lcm(*intervals), 1 if any(plan.shift_steps for plan in plans) else min(intervals)


def describe_stage(stage: Stage) -> str:
    """One stage in words."""
    rope = stage.rope.value if stage.rope else "no"
    pieces = f" of {stage.piece_tok}" if stage.piece_tok else ""
    return f"{stage.chunk_tok}→{stage.keep_tok} by {stage.representative.value}{pieces}, {rope} RoPE, refresh {stage.refresh_steps}"


def describe_layers(plans: list[LayerPlan]) -> list[str]:
    """The lines of layers, one after the other, that do the same."""
    plan = plans[0]
    name = f"layer{'s' if len(plans) > 1 else ''} {spans([one.layer for one in plans])}"
    group = f" ({', '.join(plan.groups)})" if plan.groups else ""
    most = f"attends to at most {budget_tok(plan, plan.stages)} tokens" if plan.method in OFFLOADING else ""
    params = ", ".join([most] * bool(most) + [f"{name} {value}" for name, value in plan.params.items()])
    lines = [f"  {name}{group}: sink {plan.sink_tok}, window {plan.window_tok}{', ' * bool(params)}{params}"]
    lines += [f"    stage {i}: {describe_stage(stage)}" for i, stage in enumerate(plan.stages)]
    if plan.decode != plan.stages:
        lines.append(f"    in decode at most {budget_tok(plan, plan.decode)} tokens")
        lines += [f"    decode stage {i}: {describe_stage(stage)}" for i, stage in enumerate(plan.decode)]
    return lines


def describe(
    pipeline: Pipeline | None, n_layers: int, offload: Offload | None = None, own_layers: Collection[int] = (), notes: Sequence[str] = ()
) -> list[str]:
    """What attention does in a model of ``n_layers`` layers, one line per layer group and stage, and where keys and values are.

    ``own_layers`` keep the attention of the model; ``notes`` say so, and what else is peculiar about its layers.
    """
    said = [f"  {note}" for note in notes]
    if pipeline is None:
        return ["attention: dense, every token", *said]
    plans = [plan for plan in pipeline.plan(n_layers) if plan.layer not in own_layers]
    name, heads, rope = pipeline.name or "unnamed", plans[0].heads.value, plans[0].attend.value
    late = ", a new selection is used from the next decode step on" if pipeline.late_refresh else ""
    staggered = ", every layer refreshes a step before the one in front of it" if pipeline.staggered_refresh else ""
    lines = [f"attention: {name} ({pipeline.method}), heads {heads}, {rope} RoPE while attending{late}{staggered}"]

    def same(plan: LayerPlan) -> dict[str, object]:
        return {name: value for name, value in vars(plan).items() if name not in ("layer", "shift_steps")}

    for _, group in groupby(plans, key=same):
        lines += describe_layers(list(group))
    return lines + said + ([describe_offload(offload)] if offload is not None and offload.on else [])


def describe_offload(offload: Offload) -> str:
    """Where keys and values are: tiers with their sizes, format and policy."""

    def size(tier: str, otherwise: str) -> str:
        tokens, bytes_ = getattr(offload, f"{tier}_tok"), getattr(offload, f"{tier}_bytes")
        if bytes_ is not None:
            return f"{show_bytes(bytes_)} for all layers"
        return otherwise if tokens is None else f"{tokens} tokens a layer"

    disk = f", the rest on disk ({size('disk', 'as much as there is')})" if offload.disk_dir is not None else ""
    form = "the model's own format" if offload.format == "auto" else offload.format
    prompt = f"; prompts of up to {show_bytes(offload.prefill_bytes)} a layer are read layer by layer" if offload.prefill_bytes else ""
    return (
        f"keys and values: {size('host', 'all')} in host memory{disk}, in {form}; on the device {size('device', '')}, "
        f"{offload.policy} decides which{prompt}"
    )
