"""Two parts at a time, through a sigmoid: no exponential can overflow."""

import torch
from torch import Tensor

EMPTY = float("-inf")


def merge_lse(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = outs[0], lses[0].float()
    out = out.masked_fill((lse == EMPTY)[..., None], 0)
    for other, other_lse in zip(outs[1:], lses[1:], strict=True):
        empty = other_lse == EMPTY
        weight = torch.sigmoid(other_lse.float() - lse).masked_fill(empty, 0)  # NaN where both are empty, then masked
        out = torch.lerp(out, other.masked_fill(empty[..., None], 0), weight[..., None].to(out.dtype))
        lse = torch.logaddexp(lse, other_lse.float())
    return out, lse
