"""Threshold selection and order-preserving compaction: one top-k for the threshold, no sort of the survivors."""

import torch
from torch import Tensor


def keep_top(scores: Tensor, counts: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    S, N, C = scores.shape
    rank = torch.arange(C, device=scores.device)
    active = rank < counts[..., None]
    kept = counts.clamp(max=keep)
    if keep == 0:
        return scores.new_empty(S, N, 0, dtype=torch.int64), kept
    scores = scores.masked_fill(~active, float("-inf"))
    threshold = scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = (scores > threshold) & active
    tied = (scores == threshold) & active
    chosen = above | (tied & (tied.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, keep)
    index = torch.full((S, N, keep + 1), -1, dtype=torch.int64, device=scores.device)
    index.scatter_(-1, slot, rank.expand_as(slot))
    return index[..., :keep], kept
