"""Methods: how a selection is made. One file, one idea: ``pipeline.method: hip`` is the class in ``hip.py``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from hipexp.attention.method import Method, SelectingMethod
from hipexp.config.convert import convert, fields_of, unknown
from hipexp.config.schema import ConfigError, LayerPlan, Pipeline


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


def check_methods(pipeline: Pipeline) -> None:
    """Refuse parameters that break a rule of the method, by themselves or under a layer group; raises ConfigError."""
    for groups in ([], *([name] for name, group in pipeline.layers.items() if group.range.strip())):
        make_method(pipeline.plan_layer(0, groups))


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
    return made[0]


def _load(path: Path) -> ModuleType:
    name = f"hipexp_method_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"pipeline.method={path} is no file of Python; give the path of one, or a method of hipexp")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
