"""How sure a mean is: its bootstrap interval, and the paired difference of two runs on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ConfigError

if TYPE_CHECKING:
    import numpy as np

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Mean (``score``), ``n`` and ``interval`` of the scores of single samples. Raises as :func:`mean_interval`."""
    scores = checked(values)
    return {"score": sum(scores.tolist()) / scores.size, "n": scores.size, "interval": mean_interval(values)}


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of a mean by the percentile bootstrap; None for a single value, of whose spread nothing is known.

    Seeded, and the same for every order of ``values``. Raises ``ConfigError`` for none, and for values that are not finite.
    """
    import numpy as np

    scores = np.sort(checked(values))
    if scores.size < 2:
        return None
    rng = np.random.default_rng(SEED)
    means = [scores[rng.integers(scores.size, size=scores.size)].mean() for _ in range(RESAMPLES)]
    return [float(bound) for bound in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """``mean``, ``interval`` and ``n`` of our score less theirs, sample by sample: both in the same order of the same samples.

    Raises ``ConfigError`` where the numbers of samples differ, and as :func:`mean_interval`.
    """
    a, b = checked(ours), checked(theirs)
    if a.size != b.size:
        raise ConfigError(f"a paired difference needs the same samples in both runs: {a.size} here, {b.size} there; score the same ones")
    difference = (a - b).tolist()
    return {"mean": sum(difference) / a.size, "interval": mean_interval(difference), "n": a.size}


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
