"""What ``tune`` searches: a file of lists, from which pipelines are drawn that nearly always obey the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from hipexp.config.convert import unknown
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import (
    AttendRope,
    ConfigError,
    Heads,
    LayerGroup,
    Pipeline,
    PruneRope,
    Representative,
    Rope,
    RopeOverride,
    Stage,
    StageOverride,
)

# Gives the value of a parameter, by its name, out of those there are.
Pick = Callable[[str, Sequence[Any]], Any]


@dataclass(frozen=True)
class LastStage:
    """Values of the last stage."""

    chunk_tok: list[int]
    keep_tok: list[int]
    query_block_tok: list[int]
    query_stride_tok: list[int]
    refresh_steps: list[int]
    representative: list[str]


@dataclass(frozen=True)
class FrontStage:
    """Values of a stage in front of another; ``_times``: in times of that one."""

    chunk_times: list[int]
    keep_times: list[int]
    query_block_tok: list[int]
    query_stride_tok: list[int]
    refresh_times: list[int]
    representative: list[str]


@dataclass(frozen=True)
class Space:
    """The values of everything that is drawn; ``early_layers`` first layers have a strategy and a budget of their own."""

    stages: list[int]
    heads: list[str]
    sink_tok: list[int]
    window_tok: list[int]
    staggered_refresh: list[bool]
    rope: list[str]
    attend: list[str]
    early_layers: list[int]
    early_rope: list[str]
    early_times: list[int]
    last: LastStage
    front: FrontStage

    def draw(self, pick: Pick, divisor: int = 1) -> Pipeline:
        """A pipeline. What stages keep is rounded up to whole chunks of a ``divisor``-th of it, so that it can be divided.

        Parameters of stages are counted from the last one, ``last``, ``front1``, ``front2``, so that they mean the same for any number.
        """
        n_stages = pick("stages", self.stages)
        stages = [self._last(pick, divisor)]
        for number in range(1, n_stages):
            stages.insert(0, self._front(pick, f"front{number}", stages[0], divisor))
        layers, early = {}, pick("early_layers", self.early_layers)
        if early:
            rope, times = pick("early_rope", self.early_rope), pick("early_times", self.early_times)
            kept = {} if times == 1 else {str(n_stages - 1): StageOverride(keep_tok=times * stages[-1].keep_tok)}
            layers["early"] = LayerGroup(f"0-{early - 1}" if early > 1 else "0", RopeOverride(PruneRope(rope)), kept)
        return Pipeline(
            method="hip",
            stages=stages,
            sink_tok=pick("sink_tok", self.sink_tok),
            window_tok=pick("window_tok", self.window_tok),
            heads=Heads(pick("heads", self.heads)),
            rope=Rope(PruneRope(pick("rope", self.rope)), AttendRope(pick("attend", self.attend))),
            layers=layers,
            staggered_refresh=pick("staggered_refresh", self.staggered_refresh),
        )

    def _last(self, pick: Pick, divisor: int) -> Stage:
        drawn = {item.name: pick(f"last.{item.name}", getattr(self.last, item.name)) for item in fields(LastStage)}
        drawn["keep_tok"] = _whole(drawn["keep_tok"], divisor * drawn["chunk_tok"])
        return Stage(**drawn | {"representative": Representative(drawn["representative"])})

    def _front(self, pick: Pick, name: str, behind: Stage, divisor: int) -> Stage:
        drawn = {item.name: pick(f"{name}.{item.name}", getattr(self.front, item.name)) for item in fields(FrontStage)}
        chunk = behind.chunk_tok * drawn["chunk_times"]
        return Stage(
            chunk_tok=chunk,
            keep_tok=_whole(behind.keep_tok * drawn["keep_times"], divisor * chunk),
            query_block_tok=drawn["query_block_tok"],
            query_stride_tok=drawn["query_stride_tok"],
            refresh_steps=behind.refresh_steps * drawn["refresh_times"],
            representative=Representative(drawn["representative"]),
        )

    @property
    def size(self) -> int:
        """How many combinations there are, of those that differ in what counts."""
        last, front = (_product(part) for part in (self.last, self.front))
        early = sum(1 if not n else len(self.early_rope) * len(self.early_times) for n in self.early_layers)
        others = (self.heads, self.sink_tok, self.window_tok, self.staggered_refresh, self.rope, self.attend)
        found = early * sum(last * front ** (n - 1) for n in self.stages)
        for values in others:
            found *= len(values)
        return found

    def lines(self) -> list[tuple[str, str]]:
        """Every parameter and its values, for people."""
        flat: list[tuple[str, str]] = []
        for item in fields(self):
            value = getattr(self, item.name)
            parts = (
                [(item.name, value)]
                if isinstance(value, list)
                else [(f"{item.name}.{x.name}", getattr(value, x.name)) for x in fields(value)]
            )
            flat += [(name, ", ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in values)) for name, values in parts]
        return flat


def _whole(number: int, step: int) -> int:
    return -(-number // step) * step


def _product(part: Any) -> int:
    found = 1
    for item in fields(part):
        found *= len(getattr(part, item.name))
    return found


WORDS: dict[str, type[Enum]] = {
    "heads": Heads,
    "rope": PruneRope,
    "attend": AttendRope,
    "early_rope": PruneRope,
    "representative": Representative,
}


def read_space(path: Path | None) -> Space:
    """The space of a file, ``conf/tune/default.yaml`` if there is none. Raises ``ConfigError`` with what is wrong in it."""
    import yaml

    path = path or conf_dir() / "tune" / "default.yaml"
    try:
        made = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"space={path} is no search space ({reason}); copy conf/tune/default.yaml and change it") from error
    read = _read(made, Space, f"space={path}: ", ("last", "front"))
    last, front = (_read(read[name], kind, f"space={path}: {name}.") for name, kind in (("last", LastStage), ("front", FrontStage)))
    return Space(**read | {"last": LastStage(**last), "front": FrontStage(**front)})


def _read(made: Any, kind: type, where: str, parts: Any = ()) -> dict[str, Any]:
    if not isinstance(made, dict):
        raise ConfigError(f"{where.rstrip('. ')} must hold lists by name; copy conf/tune/default.yaml and change it")
    names = [item.name for item in fields(kind)]
    for name in made:
        if name not in names:
            raise unknown(f"{where}{name}", str(name), names)
    for name in names:
        if name not in made:
            raise ConfigError(f"{where}{name} is missing; it must be a list of values, as in conf/tune/default.yaml")
        if name not in parts:
            _check(f"{where}{name}", name, made[name])
    return made


def _check(where: str, name: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where}={values} must be a list of one value or more, as in conf/tune/default.yaml")
    if len({str(value) for value in values}) < len(values):
        raise ConfigError(f"{where}={values} names a value twice; leave one of them out")
    if name in WORDS:
        known = list(WORDS[name].__members__)
        for value in values:
            if value not in known:
                raise unknown(f"{where}={value}", str(value), known)
        return
    kind, least = (bool, False) if name == "staggered_refresh" else (int, 0 if name in ("early_layers", "sink_tok") else 1)
    for value in values:
        if type(value) is not kind or value < least:
            what = "true or false" if kind is bool else f"whole numbers from {int(least)}"
            raise ConfigError(f"{where}={values} must hold {what}, and {value} is none; mend it")
