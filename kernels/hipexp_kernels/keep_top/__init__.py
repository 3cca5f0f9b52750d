"""Keep the best chunks of a list, in the order of the list."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.dispatch import choose, require
from hipexp_kernels.keep_top.reference import keep_top as reference
from hipexp_kernels.keep_top.vectorized import keep_top as vectorized


def keep_top(scores: Tensor, counts: Tensor, keep: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the list indices of the ``keep`` best scores, ascending, and how many there are.

    ``scores`` ``[S, N, C]``: only the first ``counts[s, n]`` of a row take part. Ties go to the lower index. If a row has
    no more than ``keep`` entries all of them are kept. Returns ``index`` ``[S, N, min(keep, C)]`` (int64, -1 padded) and
    ``kept`` ``[S, N]``. Raises ``ValueError`` on a negative ``keep`` or shapes that do not match, ``FloatingPointError`` if a score is NaN.
    """
    require(
        scores.ndim == 3 and counts.shape == scores.shape[:2],
        f"keep_top: scores {tuple(scores.shape)} do not go with counts {tuple(counts.shape)}",
    )
    require(keep >= 0, f"keep_top: keep={keep} must not be negative")
    nan = scores.isnan()
    if bool(nan.any()) and bool((nan & (torch.arange(scores.shape[-1], device=scores.device) < counts[..., None])).any()):
        raise FloatingPointError("keep_top: a score is NaN, so no chunk is better than another; a query or a key is not finite")
    return choose(impl, {"reference": reference, "vectorized": vectorized})(scores, counts, min(keep, scores.shape[-1]))
