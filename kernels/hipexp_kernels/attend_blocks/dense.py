"""Attention of a few query rows to all keys of a tile, as fast as torch does it."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROWS = 8  # up to so many, keys as the left factor come through at twice the rate


def attend_all(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``q`` ``[K, R, D]`` over keys ``[K, n, D]`` (where ``mask`` is true): output and log-sum-exp ``[K, R]``."""
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    few = q.shape[1] <= FEW_ROWS
    if q.device.type == "cpu" and softcap is None and not (few and q.dtype is torch.float32):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], attn_mask=bias, scale=scale)
        return out[0], lse[0].float()
    logits = ((k @ q.mT).mT if few else q @ k.mT).float().contiguous().mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits += bias
    top = logits.amax(-1, keepdim=True)
    weight = logits.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    return (weight.to(v.dtype) @ v).float().div_(total).to(v.dtype), (top + total.log()).squeeze(-1)
