"""Scores over all heads of a layer, where each of several processes has some of them (tensor parallelism).

Methods whose heads choose together come here; without other processes nothing happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def best_of_heads(scores: Tensor, processes: ProcessGroup | None) -> Tensor:
    """The best of ``scores`` ``[K, ..]`` over the heads of all processes ``[1, ..]``, to the same bits on each; None: as they are.

    A score that is not a number, which a maximum may lose on its way, counts as the best.
    """
    if processes is None:
        return scores
    best = scores.amax(0, keepdim=True).nan_to_num(torch.inf, torch.inf, -torch.inf)
    dist.all_reduce(best, dist.ReduceOp.MAX, group=processes)
    return best


def sum_of_heads(scores: Tensor, processes: ProcessGroup | None) -> Tensor:
    """The sum of ``scores`` ``[K, ..]`` over the heads of all processes ``[1, ..]``, to the same bits on each; None: over those here."""
    total = scores.sum(0, keepdim=True)
    if processes is not None:
        dist.all_reduce(total, dist.ReduceOp.SUM, group=processes)
    return total
