"""What ``tune`` may aim at, and which points no other beats in all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hipexp.config.convert import unknown
from hipexp.config.schema import ConfigError

Values = Sequence[float]


@dataclass(frozen=True)
class Objective:
    """``more``: more of it is better. ``needs``: it is counted from the pipeline, taken from recorded attention, or asked of the model."""

    name: str
    more: bool
    needs: str
    unit: str

    @property
    def direction(self) -> str:
        """As Optuna calls it."""
        return "maximize" if self.more else "minimize"

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` beats ``b``."""
        return a > b if self.more else a < b

    def show(self, value: float | None) -> str | None:
        """A value for a table, in the unit of the header."""
        if value is None:
            return None
        return f"{value / 1e6:.3f}" if self.unit == "MB" else f"{value:.3f}" if self.name == "recall" else f"{value:.1f}"

    @property
    def header(self) -> str:
        """The name and the unit of shown values."""
        return f"{self.name} {self.unit}".replace("_ms ms", " ms").replace("_bytes MB", " MB").replace("bytes MB", "read MB").rstrip()


OBJECTIVES = {
    item.name: item
    for item in (
        Objective("score", True, "model", ""),
        Objective("recall", True, "activations", ""),
        Objective("decode_ms", False, "model", "ms"),
        Objective("prefill_ms", False, "model", "ms"),
        Objective("bytes", False, "count", "MB"),
        Objective("attended_bytes", False, "count", "MB"),
    )
}


def read_objectives(text: str) -> list[Objective]:
    """The objectives that ``[score,bytes]`` names. Raises ``ConfigError`` for unknown or repeated ones, and for none."""
    names = [name.strip().strip("'\"") for name in text.strip("[]() ").split(",")]
    for name in names:
        if name not in OBJECTIVES:
            raise unknown(f"objective={name or repr(name)}", name, OBJECTIVES)
    if len(set(names)) < len(names):
        raise ConfigError(f"objective={text} names one twice; leave it out")
    return [OBJECTIVES[name] for name in names]


def dominates(a: Values, b: Values, objectives: Sequence[Objective]) -> bool:
    """Whether ``a`` is as good as ``b`` in everything, and better in something."""
    told = [(one.better(x, y), one.better(y, x)) for one, x, y in zip(objectives, a, b, strict=True)]
    return any(wins for wins, _ in told) and not any(loses for _, loses in told)


def front(points: Sequence[Values], objectives: Sequence[Objective]) -> list[int]:
    """Which points no other dominates, of equal ones all."""
    return [i for i, one in enumerate(points) if not any(dominates(other, one, objectives) for other in points)]
