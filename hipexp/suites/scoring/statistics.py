"""How sure a mean is: its bootstrap interval, and the paired difference of two runs on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ConfigError

if TYPE_CHECKING:
    import numpy as np

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95
MOST = 100.0  # of a score, and of a difference of two


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Mean (``score``), ``n`` and ``interval`` of the scores of single samples. Raises as :func:`mean_interval`."""
    scores = checked(values)
    return {"score": sum(scores.tolist()) / scores.size, "n": scores.size, "interval": mean_interval(values)}


def mean_interval(values: Sequence[float], least: float = 0.0) -> list[float] | None:
    """The 95 % interval of a mean of scores by the percentile bootstrap; None for a single one, of whose spread nothing is known.

    Samples that are all alike have no spread to draw from. They say that others are rarer than a share ``u`` with
    ``(1 - u)**n = 2.5 %``: the interval reaches as far as that share can move the mean, between ``least`` (0, of differences -100)
    and 100. Seeded, and the same for every order of ``values``. Raises ``ConfigError`` for none, and for values that are not finite.
    """
    bounds = _interval(tuple(sorted(checked(values).tolist())), least)
    return None if bounds is None else list(bounds)


@cache  # most cells of a sweep hold the same few scores
def _interval(scores: tuple[float, ...], least: float) -> tuple[float, float] | None:
    import numpy as np

    n = len(scores)
    if n < 2:
        return None
    if scores[0] == scores[-1]:
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / n)
        return scores[0] + unseen * (least - scores[0]), scores[0] + unseen * (MOST - scores[0])
    drawn, rng = np.asarray(scores), np.random.default_rng(SEED)
    means = [drawn[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """``mean``, ``interval`` and ``n`` of our score less theirs, sample by sample: both in the same order of the same samples.

    Raises ``ConfigError`` where the numbers of samples differ, and as :func:`mean_interval`.
    """
    a, b = checked(ours), checked(theirs)
    if a.size != b.size:
        raise ConfigError(f"a paired difference needs the same samples in both runs: {a.size} here, {b.size} there; score the same ones")
    difference = (a - b).tolist()
    return {"mean": sum(difference) / a.size, "interval": mean_interval(difference, least=-MOST), "n": a.size}


def checked(values: Sequence[float]) -> np.ndarray:
    """``values`` as an array; ``ConfigError`` if there are none or one of them is not finite."""
    import numpy as np

    scores = np.asarray(values, dtype=float)
    if scores.ndim != 1 or scores.size == 0:
        raise ConfigError(f"statistics need a list of at least one score, not shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ConfigError(
            f"statistics need finite scores; number {int(np.argmin(np.isfinite(scores)))} is {scores[~np.isfinite(scores)][0]}"
        )
    return scores
