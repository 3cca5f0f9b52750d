"""Attention of some query rows to all keys of one or several lists, as fast as torch does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hipexp_kernels.merge_lse.vectorized import merge_lse

FEW_ROWS = 8  # up to so many, plain products with keys as the left factor read memory half as fast again as flash attention
Part = tuple[Tensor, Tensor, Tensor]  # queries [K, R, D], keys and values [K, n, D]


def attend_all(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``q`` ``[K, R, D]`` over keys ``[K, n, D]`` (where ``mask`` is true): output and log-sum-exp ``[K, R]``."""
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    if not _by_flash(q, softcap):
        return _attend([(q, k, v)], scale, softcap, bias)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # this operator takes it for 1
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], attn_mask=bias, scale=scale)
    return out[0], lse[0].float()


def attend_parts(parts: Sequence[Part], scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of all parts, each under its own rotated copy of the queries."""
    if not _by_flash(parts[0][0], softcap):
        return _attend(parts, scale, softcap)
    outs, lses = zip(*(attend_all(*part, scale) for part in parts), strict=True)
    return merge_lse(list(outs), list(lses))


def _by_flash(q: Tensor, softcap: float | None) -> bool:
    return q.device.type == "cpu" and softcap is None and not (q.shape[1] <= FEW_ROWS and q.dtype is torch.float32)


def _attend(parts: Sequence[Part], scale: float, softcap: float | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    few = parts[0][0].shape[1] <= FEW_ROWS
    logits = torch.cat([(k @ q.mT).mT if few else q @ k.mT for q, k, _ in parts], -1).float().mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits += bias
    top = logits.amax(-1, keepdim=True)
    weight = logits.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    each = weight.div_(total).to(parts[0][2].dtype).split([k.shape[1] for _, k, _ in parts], -1)
    out = each[0] @ parts[0][2]
    for some, (_, _, v) in zip(each[1:], parts[1:], strict=True):
        out += some @ v
    return out, (top + total.log()).squeeze(-1)
