"""Dense causal attention by torch's fastest path on this device: the baseline every speed figure is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hipexp_kernels import attend_blocks, merge_lse
from hipexp_kernels.attend_blocks.vectorized import attend_all
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.method import QUERY_BLOCK_TOK
from hipexp.attention.selection import Selection

# Not cuDNN's, which torch would take for a single query: it gives all keys of a head to one program.
SPLIT = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend_dense(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Return ``[H, Q, D]``: the last ``Q`` queries ``[H, Q, D]`` over rotated keys and values ``[K, T, D]``.

    On a GPU that is torch's fused attention. On a CPU a whole prompt is one causal flash attention; a later chunk is two, over the
    prefix and over itself, merged by their log-sum-exp, so no mask is ever materialised. There the query heads of a key/value head
    are rows of one product over the prefix: keys are read once per key/value head. Logits that are bound to ``softcap``, which torch's
    kernels do not know, are hipexp's own.
    """
    H, Q, D = q.shape
    K, T, _ = k.shape
    if softcap is not None:
        return _attend_capped(q, k, v, scale, softcap)
    if Q == 1:
        rows = q.reshape(K, H // K, D)
        if q.device.type == "cpu":
            return attend_all(rows, k, v, scale)[0].reshape(H, 1, D)
        with sdpa_kernel(SPLIT):
            return F.scaled_dot_product_attention(rows[None], k[None], v[None], scale=scale)[0].reshape(H, 1, D)
    if q.device.type != "cpu":
        grouped = q.dtype != torch.float32  # the kernel for fp32 wants as many key as query heads
        k, v = (k, v) if grouped else (x.repeat_interleave(H // K, 0) for x in (k, v))
        mask = causal_lower_right(Q, T)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=grouped and H != K)[0]
    own_k, own_v = (x[:, T - Q :].repeat_interleave(H // K, 0) for x in (k, v))
    if T == Q:
        return F.scaled_dot_product_attention(q[None], own_k[None], own_v[None], is_causal=True, scale=scale)[0]
    own, own_lse = _attend_causally(q, own_k, own_v, scale)
    far, far_lse = attend_all(q.reshape(K, -1, D), k[:, : T - Q], v[:, : T - Q], scale)
    return merge_lse([far.reshape(H, Q, D), own], [far_lse.reshape(H, Q), own_lse])[0]


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> Tensor:
    """By our kernel with nothing pruned: a window as long as the text."""
    queries, T = QueryBlocks.cut(q, k.shape[1] - q.shape[1], min(QUERY_BLOCK_TOK, q.shape[1])), k.shape[1]
    nothing = Selection.empty(len(queries), q.device)
    exact = torch.ones(len(queries), dtype=torch.bool, device=q.device)
    out, _ = attend_blocks(
        queries.q, k, v, nothing.blocks, nothing.counts, queries.first, exact, block_tok=1, sink_tok=0, window_tok=T, scale=scale,
        softcap=softcap,
    )  # fmt: skip
    return queries.rows(out)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention ``[H, Q, D]`` among as many queries as keys, and its log-sum-exp ``[H, Q]``."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], is_causal=True, scale=scale)
    return out[0], lse[0]
