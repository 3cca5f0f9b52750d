"""The parameters of a wandb sweep file: the values of a grid and random draws.

They mean what they mean to wandb's own controller (package ``sweeps`` 0.3.0, ``params.py`` and ``grid_search.py``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

from hipexp.config.schema import ConfigError

NUMBERS = ("min", "max")
# What an entry of a distribution holds besides its name; ``q`` is 1 where it is left out.
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": NUMBERS,
    "uniform": NUMBERS,
    "q_uniform": (*NUMBERS, "q"),
    "log_uniform_values": NUMBERS,
    "q_log_uniform_values": (*NUMBERS, "q"),
}
GRID = ("constant", "categorical", "int_uniform", "q_uniform")


@dataclass(frozen=True)
class Parameter:
    """A parameter by its dotted name; ``entry`` holds what ``DISTRIBUTIONS`` says of its ``distribution``."""

    name: str
    distribution: str
    entry: dict[str, Any]

    def grid(self) -> list[Any]:
        """All values, for one of ``GRID``. As in wandb ``int_uniform`` includes ``max``, and ``q_uniform`` does not."""
        if self.distribution == "constant":
            return [self.entry["value"]]
        if self.distribution == "categorical":
            return list(self.entry["values"])
        least, most = self.entry["min"], self.entry["max"]
        if self.distribution == "int_uniform":
            return list(range(least, most + 1))
        return list(takewhile(lambda value: value < most, (least + step * self.entry["q"] for step in count())))

    def draw(self, rng: random.Random) -> Any:
        """A value by lot. As in wandb multiples of ``q`` are rounded to, so that one may lie beyond ``min`` or ``max`` by half of it."""
        kind, entry = self.distribution, self.entry
        if kind == "constant":
            return entry["value"]
        if kind.startswith("categorical"):
            return rng.choices(entry["values"], entry.get("probabilities"))[0]
        if kind == "int_uniform":
            return rng.randint(entry["min"], entry["max"])
        logarithmic = "log" in kind
        least, most = (math.log(entry[name]) if logarithmic else entry[name] for name in NUMBERS)
        value = rng.uniform(least, most)
        value = math.exp(value) if logarithmic else value
        return round(value / entry["q"]) * entry["q"] if kind.startswith("q_") else value


def read_parameters(tree: Any, where: str, prefix: str = "") -> Iterator[Parameter]:
    """The parameters below ``parameters:``; those inside another one get dotted names. ``where`` names the file in errors.

    Raises ``ConfigError`` for what is no parameter, and for distributions that wandb has and this does not.
    """
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{where}: {prefix or 'parameters'} must name parameters, as in task.length_tok: {{values: [8192, 16384]}}")
    for key, entry in tree.items():
        name = f"{prefix}{key}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: {name}={entry!r} must hold value, values, or min and max, as in {name}: {{value: {entry!r}}}")
        if "parameters" in entry:
            yield from read_parameters(entry["parameters"], where, f"{name}.")
        else:
            yield _parameter(name, entry, where)


def _parameter(name: str, entry: dict[str, Any], where: str) -> Parameter:
    kind = entry.get("distribution") or _implied(entry)
    if kind is None:
        raise ConfigError(f"{where}: {name} must hold value, values, or min and max; it holds {', '.join(map(str, entry)) or 'nothing'}")
    if kind not in DISTRIBUTIONS:
        raise ConfigError(f"{where}: {name}.distribution={kind} is none of {', '.join(DISTRIBUTIONS)}; use one of them, or wandb's server")
    held = {"q": 1, **entry} if "q" in DISTRIBUTIONS[kind] else dict(entry)
    held.pop("distribution", None)
    if set(held) != set(DISTRIBUTIONS[kind]):
        wanted = " and ".join(DISTRIBUTIONS[kind])
        raise ConfigError(f"{where}: {name} of distribution {kind} must hold {wanted}; it holds {', '.join(map(str, held)) or 'nothing'}")
    if "values" in held:
        _check_values(name, held, where)
    elif "min" in held:
        _check_range(name, kind, held, where)
    return Parameter(name, kind, held)


def _implied(entry: dict[str, Any]) -> str | None:
    """The distribution that wandb takes where none is named."""
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if "min" in entry and "max" in entry:
        return "int_uniform" if all(type(entry[name]) is int for name in NUMBERS) else "uniform"
    return None


def _check_values(name: str, held: dict[str, Any], where: str) -> None:
    values, shares = held["values"], held.get("probabilities")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: {name}.values={values!r} must be a list of values, as in [1024, 2048]")
    if shares is None:
        return
    right = isinstance(shares, list) and len(shares) == len(values) and all(_is_number(share) and share >= 0 for share in shares)
    if not right or not math.isclose(sum(shares), 1):
        raise ConfigError(f"{where}: {name}.probabilities={shares!r} must be a number from 0 for each of its values, 1 together")


def _check_range(name: str, kind: str, held: dict[str, Any], where: str) -> None:
    for key, value in held.items():
        if not _is_number(value) or (kind == "int_uniform" and type(value) is not int):
            wanted = "a whole number" if kind == "int_uniform" else "a number"
            raise ConfigError(f"{where}: {name}.{key}={value!r} must be {wanted}; YAML reads 1e-3 as text, write 1.0e-3")
    if held["min"] > held["max"]:
        raise ConfigError(f"{where}: {name}.min={held['min']} must not be above max={held['max']}; exchange them")
    if "log" in kind and held["min"] <= 0:
        raise ConfigError(f"{where}: {name}.min={held['min']} must be above 0 for {kind}; raise it, or use uniform")
    if held.get("q", 1) <= 0:
        raise ConfigError(f"{where}: {name}.q={held['q']} must be above 0; it is what values are multiples of")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
