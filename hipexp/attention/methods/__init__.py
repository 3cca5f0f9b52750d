"""Methods: how a selection is made. One file, one idea: ``pipeline.method: hip`` is the class in ``hip.py``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import ModuleType

from hipexp.attention.method import Method, SelectingMethod
from hipexp.config.convert import convert, fields_of, is_plain, unknown
from hipexp.config.schema import ALONE, ConfigError, LayerPlan, Pipeline


def make_method(plan: LayerPlan) -> Method:
    """The method of a layer. Raises ConfigError for one that does not exist, and for parameters that it does not take."""
    kind = method_class(plan.method)
    types = {name: of for name, of in fields_of(kind).items() if name != "plan"}
    params = {}
    for name, value in plan.params.items():
        key = f"pipeline.params.{name}"
        if not types:
            raise ConfigError(f"{key}={value} must not be set: pipeline.method={plan.method} has no parameters of its own; leave it out")
        if name not in types:
            raise unknown(key, name, types)
        params[name] = convert(value, types[name], key)
        if isinstance(params[name], int | float) and params[name] < 0:
            raise ConfigError(f"{key}={value} must not be negative; try 0 or more")
    made = kind(plan, **params)
    made.check()
    if params and isinstance(made, SelectingMethod) and not (made.block(False) and made.block(True) and made.query_block_tok):
        raise ConfigError(f"pipeline.params={params} cut keys or queries into blocks of 0 tokens; a block must have at least 1, try 64")
    return made


def check_methods(pipeline: Pipeline, n_layers: int = 0, prefill_chunk_tok: int = 0) -> None:
    """Refuse parameters that break a rule, by themselves or under a layer group, and parts of a prompt that cut a query block.

    ``n_layers``: of the model, where that is known; layers must then be like those whose selection they take over. Raises ConfigError.
    """
    groups = [[], *([name] for name, group in pipeline.layers.items() if group.range.strip())]
    plans = pipeline.plan(n_layers) if n_layers else []
    for method in map(make_method, [*(pipeline.plan_layer(ALONE, names) for names in groups), *plans]):
        if isinstance(method, SelectingMethod) and method.aligned and prefill_chunk_tok % method.query_block_tok:
            size = method.query_block_tok
            raise ConfigError(
                f"model.prefill_chunk_tok={prefill_chunk_tok} must be a multiple of {size}, the queries for which pipeline.method="
                f"{pipeline.method} selects together; try {max(1, prefill_chunk_tok // size) * size}"
            )
    for plan in plans:
        source = plans[_source_of(plan)]
        if (source.params, source.window_tok) != (plan.params, plan.window_tok):
            raise ConfigError(
                f"pipeline.layers ({', '.join(sorted({*plan.groups, *source.groups}))}) must give layers {source.layer} and {plan.layer} "
                f"the same params and window_tok, since under pipeline.method={pipeline.method} one takes over what the other selects; let "
                "a group hold both or neither"
            )


def check_alone(plan: LayerPlan) -> None:
    """Refuse a layer that is measured alone and takes over what another one selects; raises ConfigError."""
    source = _source_of(plan)
    if source != plan.layer:
        raise ConfigError(
            f"task.layer={plan.layer} takes over what layer {source} selects under pipeline.method={plan.method}, and alone there is no "
            f"other layer; try task.layer={source}"
        )


def _source_of(plan: LayerPlan) -> int:
    """The layer whose selection a layer attends to, itself or one before."""
    method = make_method(plan)
    source = method.takes_from if isinstance(method, SelectingMethod) else None
    return plan.layer if source is None else source


@cache
def method_class(name: str) -> type[Method]:
    """The one method that the file of that name, or at that path, defines."""
    module = _load(Path(name)) if name.endswith(".py") else importlib.import_module(f"{__name__}.{name}")
    made = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(made) != 1:
        raise ConfigError(f"pipeline.method={name} must be a file with one subclass of hipexp.attention.method.Method; it has {len(made)}")
    missing = sorted(made[0].__abstractmethods__)
    if missing:
        raise ConfigError(f"pipeline.method={name} must say all that a method does; {made[0].__name__} lacks {', '.join(missing)}")
    bare = [x.name for x in fields(made[0]) if x.name != "plan" and x.default is MISSING and x.default_factory is MISSING]
    if bare:
        raise ConfigError(
            f"pipeline.method={name} must give every parameter a default; {made[0].__name__} gives none for {', '.join(bare)}"
        )
    strange = [item for item, kind in fields_of(made[0]).items() if item != "plan" and not is_plain(kind)]
    if strange:
        raise ConfigError(
            f"pipeline.method={name} must have parameters of int, float, str or bool, lists of them, or None; of another type is "
            f"{', '.join(strange)}"
        )
    return made[0]


def _load(path: Path) -> ModuleType:
    name = f"hipexp_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"pipeline.method={path} is no file of Python; give the path of one, or a method of hipexp")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
