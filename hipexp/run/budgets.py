"""A part of a pipeline's budgets: what it keeps, divided."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ALONE, ConfigError, LayerPlan, Pipeline

if TYPE_CHECKING:
    from hipexp.attention.method import SelectingMethod


def divided(pipeline: Pipeline, divisor: int) -> Pipeline:
    """The pipeline with ``1/divisor`` of what it keeps, also in layer groups; sinks and window stay. Raises ConfigError."""
    if pipeline.method != "hip":
        return _divided_params(pipeline, divisor) if divisor > 1 else pipeline

    def less(keep_tok: int, chunk_tok: int, key: str) -> int:
        if keep_tok % (divisor * chunk_tok):
            raise ConfigError(
                f"task.divisors: {divisor} does not divide {key}.keep_tok={keep_tok} into chunks of {chunk_tok}; leave it out, or keep more"
            )
        return keep_tok // divisor

    def group(name: str) -> Any:
        made = pipeline.layers[name]
        stages = {
            number: stage
            if stage.keep_tok is None
            else dataclasses.replace(
                stage,
                keep_tok=less(
                    stage.keep_tok, stage.chunk_tok or pipeline.stages[int(number)].chunk_tok, f"pipeline.layers.{name}.stages.{number}"
                ),
            )
            for number, stage in made.stages.items()
        }
        return dataclasses.replace(made, stages=stages)

    stages = [
        dataclasses.replace(stage, keep_tok=less(stage.keep_tok, stage.chunk_tok, f"pipeline.stages[{i}]"))
        for i, stage in enumerate(pipeline.stages)
    ]
    return dataclasses.replace(pipeline, stages=stages, layers={name: group(name) for name in pipeline.layers})


def _divided_params(pipeline: Pipeline, divisor: int) -> Pipeline:
    def less(groups: list[str], key: str, own: dict[str, Any]) -> dict[str, Any]:
        method, found = selecting_method(pipeline.plan_layer(ALONE, groups)), dict(own)
        if not method.budgets:
            name = pipeline.method
            raise ConfigError(f"task.divisors: pipeline.method={name} has no budget to divide by {divisor}; use task.divisors=[1]")
        for name in method.budgets if not groups else own.keys() & method.budgets:
            value = getattr(method, name)
            if value % divisor:
                raise ConfigError(f"task.divisors: {divisor} does not divide {key}.params.{name}={value}; leave it out, or keep more")
            found[name] = value // divisor
        return found

    layers = {
        name: dataclasses.replace(group, params=less([name], f"pipeline.layers.{name}", group.params)) if group.params else group
        for name, group in pipeline.layers.items()
    }
    return dataclasses.replace(pipeline, params=less([], "pipeline", pipeline.params), layers=layers)


def selecting_method(plan: LayerPlan) -> SelectingMethod:
    """The method of a layer. Raises ConfigError for one that attends to everything. Imports torch."""
    from hipexp.attention.method import SelectingMethod
    from hipexp.attention.methods import make_method

    method = make_method(plan)
    if not isinstance(method, SelectingMethod):
        raise ConfigError(f"task=recall measures what is selected, and pipeline.method={plan.method} attends to everything; choose another")
    return method
