"""Plain statement of the merge: every part weighs as much as its share of the common denominator."""

import torch
from torch import Tensor


def merge_lse(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    total = torch.logsumexp(torch.stack([lse.float() for lse in lses]), 0)
    merged = torch.zeros_like(outs[0], dtype=torch.float32)
    for out, lse in zip(outs, lses, strict=True):
        share = torch.exp(lse.float() - total)[..., None]
        merged += (out.float() * share).masked_fill((lse == float("-inf"))[..., None], 0)
    return merged.to(outs[0].dtype), total
