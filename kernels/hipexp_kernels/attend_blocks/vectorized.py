"""Block by block: one dense, unmasked attention over a packed tile of keys, and one small causal one over the block itself.

The query heads of a key/value head are rows of the same product. The two parts are merged by their log-sum-exp.
"""

import torch
from torch import Tensor

from hipexp_kernels.merge_lse.vectorized import merge_lse
from hipexp_kernels.rope import AttendRotation, rotate


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, *, block_tok: int, sink_tok: int, window_tok: int, scale: float,
    rotation: AttendRotation | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, N, Q, D = q.shape
    K, G = k.shape[0], H // k.shape[0]
    lists = [slice(s, s + 1) for s in range(K)] if blocks.shape[0] > 1 else [slice(0, K)]
    starts, is_exact, counted = first.tolist(), exact.tolist(), counts.tolist()
    far_out, far_lse = torch.zeros_like(q), torch.full((H, N, Q), float("-inf"), device=q.device)
    prefix = _rotated_prefix(k, max((p for p, e in zip(starts, is_exact, strict=True) if e), default=0), rotation)
    for n, start in enumerate(starts):
        for s, heads in enumerate(lists):
            if is_exact[n]:
                keys, values, query = prefix[heads, :start], v[heads, :start], _rotate_queries(q[:, n], start, rotation)
            else:
                chosen = _tokens(blocks[s, n, : counted[s][n]], block_tok, start - window_tok)
                keys, values, query = _tile(q[:, n], k[heads], v[heads], chosen, start, sink_tok, window_tok, rotation)
            if keys.shape[1]:
                rows = query.view(K, G, Q, D)[heads].reshape(-1, G * Q, D)
                out, lse = attend_all(rows, keys, values, scale, softcap)
                far_out.view(K, G, N, Q, D)[heads, :, n] = out.view(-1, G, Q, D)
                far_lse.view(K, G, N, Q)[heads, :, n] = lse.view(-1, G, Q)
    own_out, own_lse = _attend_own_block(q, k, v, first, scale, rotation, softcap)
    return merge_lse([far_out, own_out], [far_lse, own_lse])


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, mask: Tensor | None = None, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``q`` ``[K, R, D]`` over all keys ``[K, n, D]`` (or where ``mask`` is true, or causally if there are as many queries as keys): output and log-sum-exp ``[K, R]``."""
    if q.device.type == "cpu" and softcap is None and mask is None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], is_causal=causal, scale=scale)
        return out[0], lse[0].float()
    logits = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return torch.softmax(logits, -1).to(v.dtype) @ v, torch.logsumexp(logits, -1)


def _tokens(starts: Tensor, block_tok: int, edge: int) -> Tensor:
    """Token indices of ascending blocks, up to and including ``edge``."""
    tokens = (starts[:, None] + torch.arange(block_tok, device=starts.device)).flatten()
    return tokens[: int((tokens <= edge).sum())]


def _tile(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, start: int, sink_tok: int, window_tok: int, rotation: AttendRotation | None):
    """Keys and values before the block, packed as sinks, selected, window, and the block's queries ``[H, Q, D]``, all rotated."""
    near = max(0, start - window_tok + 1)
    n_sink = min(sink_tok, near)
    n_far = n_sink + chosen.shape[0]
    keys = torch.cat([k[:, :n_sink], k.index_select(1, chosen), k[:, near:start]], 1)
    values = torch.cat([v[:, :n_sink], v.index_select(1, chosen), v[:, near:start]], 1)
    if rotation is None:
        return keys, values, q
    last = start + q.shape[1] - 1
    if rotation.mode == "streaming":
        token = torch.empty(keys.shape[1], device="meta")  # only its length matters
    else:
        token = torch.cat([torch.arange(n_sink, device=k.device), chosen, torch.arange(near, start, device=k.device)])
    at = rotation.query(torch.arange(start, last + 1, device=k.device), start, n_far, start - near + 1)
    return rotate(keys, *rotation.keys(token, start, last, n_far, window_tok)), values, rotate(q, rotation.table.cos[at], rotation.table.sin[at])


def _rotated_prefix(k: Tensor, length: int, rotation: AttendRotation | None) -> Tensor:
    """The first ``length`` keys at their true positions, for blocks that attend to everything."""
    return k[:, :length] if rotation is None else rotate(k[:, :length], rotation.table.cos[:length], rotation.table.sin[:length])


def _rotate_queries(q: Tensor, start: int, rotation: AttendRotation | None) -> Tensor:
    end = start + q.shape[1]
    return q if rotation is None else rotate(q, rotation.table.cos[start:end], rotation.table.sin[start:end])


def _attend_own_block(q: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float, rotation: AttendRotation | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Causal attention of every block to its own tokens; only their distances matter, so positions start at 0."""
    H, N, Q, D = q.shape
    K, T, _ = k.shape
    row = torch.arange(Q, device=q.device)
    own = (first[:, None] + row).clamp(max=T - 1).flatten()
    keys, values = k.index_select(1, own).view(K * N, Q, D), v.index_select(1, own).view(K * N, Q, D)
    query = q.view(K, H // K, N, Q, D).transpose(1, 2)
    if rotation is not None:
        cos, sin = rotation.table.cos[:Q], rotation.table.sin[:Q]
        query, keys = rotate(query, cos, sin), rotate(keys, cos, sin)
    causal = (row[:, None] >= row).repeat(H // K, 1)
    out, lse = attend_all(query.reshape(K * N, -1, D), keys, values, scale, softcap, causal)
    return out.view(K, N, -1, Q, D).transpose(1, 2).reshape(H, N, Q, D), lse.view(K, N, -1, Q).transpose(1, 2).reshape(H, N, Q)
