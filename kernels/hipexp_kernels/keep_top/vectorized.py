"""Threshold selection and order-preserving compaction: one top-k for the threshold, no sort of the survivors."""

import torch
from torch import Tensor


def keep_top(
    scores: Tensor, starts: Tensor, counts: Tensor, limits: Tensor, *,
    keep: int, lists: int, chunk_tok: int, next_tok: int, out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = scores.unflatten(0, (lists, -1)).amax(1)
    index, kept = _best(scores, counts.expand(lists, -1), min(keep, scores.shape[2]))
    chosen = starts.expand(lists, index.shape[1], -1).gather(2, index.clamp(min=0)) if index.numel() else index
    pieces = torch.arange(0, chunk_tok, next_tok, device=starts.device)
    fine = (chosen[..., None] + pieces).flatten(2)
    slot = torch.arange(fine.shape[2], device=starts.device)
    valid = (slot < kept[..., None] * len(pieces)) & (fine < limits[:, None])
    found, kept = fine.masked_fill_(~valid, -1), valid.sum(-1)
    return (out[0].copy_(found), out[1].copy_(kept)) if out else (found, kept)


def _best(scores: Tensor, counts: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices ``[S, N, keep]`` of the best of ``scores`` ``[S, N, C]``, ascending and -1 padded, and how many there are."""
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
