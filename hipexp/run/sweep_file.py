"""A wandb sweep file, read without wandb: the words of every point, as an agent of the same sweep would start it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hipexp.config.convert import unknown
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import ConfigError
from hipexp.run.sweep_values import GRID, Parameter, read_parameters

DEFAULT_COMMAND = ["${env}", "${interpreter}", "${program}", "${args}"]  # wandb's
ARGUMENTS = ("${args}", "${args_no_hyphens}", "${args_append_hydra}", "${args_override_hydra}")
PYTHON = re.compile(r"(.*/)?python[\d.]*")
PROGRAM = re.compile(r"(.*/)?hipexp(/__main__\.py)?")
# What wandb's own schema has besides what is read here: notes, and settings of its server.
OTHERS = ("program", "command", "project", "entity", "description", "early_terminate", "controller", "settings", "job", "image_uri")
KNOWN = ("name", "method", "metric", "parameters", "run_cap", *OTHERS)
GOALS = ("minimize", "maximize")


@dataclass(frozen=True)
class Choice:
    """A point of a sweep: its command line words, and the values of the parameters in them."""

    words: list[str]
    values: dict[str, Any]


@dataclass(frozen=True)
class SweepFile:
    """What a sweep file asks for; ``words`` are those of its command, without tracking. ``stops``: it has early_terminate."""

    path: Path
    name: str
    method: str
    metric: str
    goal: str
    words: list[str]
    parameters: list[Parameter]
    run_cap: int | None
    stops: bool

    def choices(self, overrides: Sequence[str], count: int | None, seed: int) -> list[Choice]:
        """The points: all of a grid, or ``count`` random ones, the same for the same ``seed``; ``overrides`` win over the file.

        More random points begin with the fewer. Raises ``ConfigError`` where nobody says how many random points there are to be.
        """
        fixed = {_key(word) for word in overrides}
        parameters = [one for one in self.parameters if _key(one.name) not in fixed]
        words = [word for word in self.words if _key(word) not in fixed]
        names = [one.name for one in parameters]
        rows = self._grid(parameters) if self.method == "grid" else self._draws(parameters, count or self.run_cap, seed)
        points = [dict(zip(names, row, strict=True)) for row in rows]
        cap = min(number for number in (len(points), count, self.run_cap) if number is not None)
        # As an agent prints them: key=str(value).
        return [Choice([*words, *(f"{name}={value}" for name, value in point.items()), *overrides], point) for point in points[:cap]]

    def _grid(self, parameters: list[Parameter]) -> list[tuple[Any, ...]]:
        return list(product(*(one.grid() for one in parameters)))

    def _draws(self, parameters: list[Parameter], count: int | None, seed: int) -> list[tuple[Any, ...]]:
        if count is None:
            raise ConfigError(f"{self.path}: method=random has no end; say how many points, as in count=20 (or run_cap: 20 in the file)")
        lots = [random.Random(f"{seed} {one.name}") for one in parameters]
        return [tuple(one.draw(lot) for one, lot in zip(parameters, lots, strict=True)) for _ in range(count)]


def _key(word: str) -> str:
    """The key of a word in any of its spellings."""
    return re.sub(r"\[(\w+)\]", r".\1", word.lstrip("+~-").split("=")[0])


def _tracks(word: str) -> bool:
    """Whether a word is about tracking, which a sweep without wandb leaves to the user."""
    return _key(word).split(".")[0] == "track"


def find_sweep(path: Path) -> Path:
    """A sweep file by its path, or by its name one of ``conf/sweep``, which an installed hipexp has inside of it."""
    named = conf_dir() / "sweep" / f"{path}.yaml"
    return named if len(path.parts) == 1 and named.is_file() and not path.is_file() else path


def read_sweep(path: Path) -> SweepFile:
    """A sweep file. Raises ``ConfigError`` for what is none, and for one that needs wandb's server or starts something else."""
    import yaml

    path = find_sweep(path)
    try:
        made = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is no sweep file ({reason}); those of conf/sweep go by their names, as in `sweep budget`") from error
    if not isinstance(made, dict):
        raise ConfigError(f"{path} is no sweep file: it must hold method, metric and parameters, as conf/sweep/budget.yaml")
    for key in made:
        if key not in KNOWN:
            raise unknown(f"{path}: {key}", str(key), KNOWN)
    metric, goal = _metric(made.get("metric"), path)
    parameters = [one for one in read_parameters(made.get("parameters"), str(path)) if not _tracks(one.name)]
    method = _method(made.get("method"), parameters, path)
    cap = made.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise ConfigError(f"{path}: run_cap={cap!r} must be a whole number from 1, of points; mend it, or leave it out")
    words = [word for word in _own_words(made, path) if not _tracks(word)]
    return SweepFile(path, str(made.get("name") or path.stem), method, metric, goal, words, parameters, cap, "early_terminate" in made)


def _method(method: Any, parameters: Sequence[Parameter], path: Path) -> str:
    if method == "bayes":
        raise ConfigError(
            f"{path}: method=bayes chooses a point by the results before it, which wandb's server does: `wandb sweep {path}`, then `wandb "
            "agent <id>`; without it use method: grid or random"
        )
    if method not in ("grid", "random"):
        raise ConfigError(f"{path}: method={method} must be grid or random (or bayes, with wandb); mend it")
    for one in parameters:
        if method == "grid" and one.distribution not in GRID:
            raise ConfigError(f"{path}: {one.name} of distribution {one.distribution} has no grid; give its values, or use method: random")
    return str(method)


def _metric(metric: Any, path: Path) -> tuple[str, str]:
    if metric is None:
        return "average", "maximize"
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise ConfigError(f"{path}: metric={metric!r} must hold a name and a goal, as in {{name: average, goal: maximize}}")
    goal = metric.get("goal", "minimize")  # wandb's default
    if goal not in GOALS:
        raise ConfigError(f"{path}: metric.goal={goal} must be minimize or maximize; mend it")
    return metric["name"], goal


def _own_words(made: dict[str, Any], path: Path) -> list[str]:
    """The words of ``command`` that follow ``python -m hipexp``, without the macro of the arguments."""
    program, command = str(made.get("program")), made.get("command") or DEFAULT_COMMAND
    if not isinstance(command, list):
        raise ConfigError(f"{path}: command={command!r} must be a list of words, as in conf/sweep/budget.yaml")
    words = [str(word) for word in command]
    shown = " ".join(words)
    rest = words[1:] if words[:1] == ["${env}"] else words
    python = bool(rest) and (rest[0] == "${interpreter}" or PYTHON.fullmatch(rest[0]) is not None)
    rest = rest[1:] if python else rest
    if python and rest[:2] == ["-m", "hipexp"]:
        rest = rest[2:]
    elif rest[:1] == ["${program}"] and PROGRAM.fullmatch(program):
        rest = rest[1:]
    elif rest and not python and PROGRAM.fullmatch(rest[0]):
        rest = rest[1:]
    else:
        raise ConfigError(
            f"{path}: command `{shown}` with program={program} starts something else than hipexp, which only wandb can run; use "
            "[${env}, python, -m, hipexp, …, ${args_no_hyphens}]"
        )
    if not any(word in ARGUMENTS for word in rest):
        raise ConfigError(f"{path}: command `{shown}` passes no parameters on that hipexp takes; end it with ${{args_no_hyphens}}")
    own = [word for word in rest if word not in ARGUMENTS]
    for word in own:
        if "=" not in word or "${envvar:" in word:
            raise ConfigError(f"{path}: {word} in command is no key=value of one experiment point; write it so, or leave it out")
    return own
