"""What the attention outside sinks and window follows: distances (diagonals of its matrix) or keys (verticals)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pattern_mass(logits: Sequence[Tensor], folds: Sequence[int], sink_tok: int, window_tok: int) -> tuple[float, float, float]:
    """How much mass a profile over distances (first) and one over keys (second) explain beyond an even spread, and how much there is.

    ``logits``: of queries of one text and layer, each ``[H, n]`` over the keys it sees (scaled), the last of them its own. ``folds``: the
    part 0 or 1 that a query belongs to; the profiles by which it is judged come from queries of the other part, so that they can be wrong.
    With ``p(t)`` the softmax of a head at key ``t`` outside sinks and window, ``m`` its sum, and ``t = n - 1 - distance``::

        profile(x) = mean of p at distance or key x, over the queries of the other part that have it there
        explained  = sum over t of min(p(t), m * profile / (sum of the profile over the query's own keys))

    Where no query of the other part has ``x``, the profile is its median. An even spread explains ``sum of min(p(t), m / number of keys)``.
    Both results are sums over queries and heads of what a profile explains more than that (negative: it misleads); the third is what the
    even spread leaves. Their quotients, pooled over texts, are the diagonal and the vertical share. A repeated distance and a repeated key
    can be the same, so the shares need not add up to 1 or less.
    """
    H, T = logits[0].shape[0], max(x.shape[1] for x in logits)
    by_key, own = torch.zeros(len(logits), H, T), torch.zeros(len(logits), 1, T)
    by_distance, far = by_key.clone(), own.clone()
    for r, x in enumerate(logits):
        n = x.shape[1]
        first, last = sink_tok, max(sink_tok, n - window_tok)
        by_key[r, :, first:last] = torch.softmax(x.float(), -1)[:, first:last].cpu()
        own[r, :, first:last] = 1
        by_distance[r, :, :n], far[r, :, :n] = by_key[r, :, :n].flip(-1), own[r, :, :n].flip(-1)
    fold = torch.tensor(folds)
    explained = [0.0, 0.0]
    left = 0.0
    for part in (0, 1):
        judged, others = fold == part, fold != part
        mass = by_key[judged].sum(-1, keepdim=True)
        even = _overlap(by_key[judged], own[judged], mass)
        left += float(mass.sum() - even)
        for i, (p, there) in enumerate(((by_distance, far), (by_key, own))):
            seen = there[others].sum(0)
            profile = p[others].sum(0) / seen.clamp(min=1)
            known = profile[:, seen[0] > 0]
            usual = known.median(-1, keepdim=True).values if known.numel() else 0.0
            explained[i] += _overlap(p[judged], torch.where(seen > 0, profile, usual) * there[judged], mass) - even
    return explained[0], explained[1], left


def _overlap(p: Tensor, profile: Tensor, mass: Tensor) -> float:
    """What of the masses ``p`` ``[R, H, T]`` lies under the profile ``[R, H or 1, T]``, scaled to as much mass ``[R, H, 1]``."""
    scaled = profile * (mass / profile.sum(-1, keepdim=True).clamp(min=1e-30))
    return float(torch.minimum(p, scaled).sum())
