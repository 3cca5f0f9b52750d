"""How long runs will take on this machine: two prompts of a contestant, and what follows from them for longer ones."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hipexp.run import latency
from hipexp.suites.sample import LineEncoder

if TYPE_CHECKING:
    from hipexp.hf import Loaded
    from hipexp.run.several import Named

DECODE_STEPS = 8


@dataclass(frozen=True)
class Rate:
    """Seconds of one sample of ``T`` tokens on this machine: ``linear · T + square · T²``."""

    linear: float
    square: float

    def seconds(self, length_tok: int) -> float:
        """What one sample of this length should take."""
        return self.linear * length_tok + self.square * length_tok**2

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> Rate:
        """The rate that gives two measured ``(tokens, seconds)``; neither part is negative."""
        (n, s), (m, t) = first, second
        square = max(0.0, (t / m - s / n) / (m - n))
        return cls(max(0.0, t / m - square * m), square)

    @classmethod
    def of(cls, point: Named, loaded: Loaded, times: int) -> Rate:
        """Measure prompts of the trained length and of ``times`` as much, after a short one that warms up."""
        seconds_of(point, loaded, latency.WARM_TOK)
        first, second = ((n, seconds_of(point, loaded, n)) for n in (loaded.trained_tok, times * loaded.trained_tok))
        return cls.through(first, second)


def seconds_of(point: Named, loaded: Loaded, length_tok: int) -> float:
    """Seconds for a prompt of ``length_tok`` tokens and a few decode steps."""
    sample = latency.prompt(LineEncoder(loaded.tokenizer), length_tok, DECODE_STEPS, point.experiment.seed)
    started = time.monotonic()
    latency.timed(point.experiment, loaded, "dense" if point.experiment.pipeline is None else "pruned", sample, DECODE_STEPS)
    return time.monotonic() - started
