"""Block by block: one dense, unmasked attention over a packed tile of keys, and one small causal one over the block itself.

The query heads of a key/value head are rows of the same product. The two parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.merge_lse.vectorized import merge_lse
from hipexp_kernels.rope import AttendRotation, RopeTable, turn
from hipexp_kernels.rows import KeyRows, Rows


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, *, block_tok: int, sink_tok: int, window_tok: int, scale: float,
    rotation: AttendRotation | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, N, Q, D = q.shape
    K, T, _ = k.shape
    table = rotation.table if rotation else None
    keys = KeyRows(k, table, once=T <= N * (sink_tok + blocks.shape[2] * block_tok + window_tok))
    values = Rows(v)
    q = keys.convert(q).unflatten(0, (K, H // K))
    out, lse = torch.zeros(q.shape, dtype=v.dtype, device=v.device), torch.full(q.shape[:-1], float("-inf"), device=v.device)
    starts, is_exact, counted = first.tolist(), exact.tolist(), counts.tolist()
    alone = int(Q == 1)  # a single query attends to itself with the others: no causal part is left
    prefix = _exact_keys(k, max((p + alone for p, e in zip(starts, is_exact, strict=True) if e), default=0), keys, table)
    lists = [slice(s, s + 1) for s in range(K)] if blocks.shape[0] > 1 else [slice(0, K)]
    for n, start in enumerate(starts):
        end, near = start + alone, max(0, start - window_tok + 1)
        position = torch.arange(start, start + Q, device=q.device).clamp(max=T - 1)
        for s, heads in enumerate(lists):
            if is_exact[n]:
                tile_k, tile_v, at = prefix[heads, :end], v[heads, :end], position
            else:
                token, n_far = _tokens(blocks[s, n, : counted[s][n]], block_tok, min(sink_tok, near), near, end)
                tile_k, tile_v = keys.gather(token[None], heads), values.gather(token[None], heads)
                if rotation:
                    tile_k = turn(tile_k, rotation.keys(token, start, start + Q - 1, n_far, window_tok), scratch=True)
                    at = rotation.query(position, start, n_far, start - near + 1)
            if tile_k.shape[1]:
                rows = q[heads, :, n] if table is None else turn(q[heads, :, n], table.factor[at])
                far_out, far_lse = attend_all(rows.flatten(1, 2).to(v.dtype), tile_k.to(v.dtype), tile_v, scale, softcap)
                out[heads, :, n], lse[heads, :, n] = far_out.unflatten(1, (-1, Q)), far_lse.unflatten(1, (-1, Q))
    if not alone:
        own_out, own_lse = _attend_own_block(q, keys, values, first, T, scale, table, softcap)
        out, lse = merge_lse([out, own_out], [lse, own_lse])
    return out.flatten(0, 1), lse.flatten(0, 1)


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``q`` ``[K, R, D]`` over all keys ``[K, n, D]`` (or where ``mask`` is true): output and log-sum-exp ``[K, R]``."""
    bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    if q.device.type == "cpu" and softcap is None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], attn_mask=bias, scale=scale)
        return out[0], lse[0].float()
    logits = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    return torch.softmax(logits, -1).to(v.dtype) @ v, torch.logsumexp(logits, -1)


def _tokens(chosen: Tensor, block_tok: int, n_sink: int, near: int, end: int) -> tuple[Tensor, int]:
    """Tokens of a tile: sinks, those of the chosen blocks that lie before ``near``, and ``near`` to ``end``; and how many come before ``near``."""
    selected = (chosen[:, None] + torch.arange(block_tok, device=chosen.device)).flatten()
    selected = selected[: int((selected < near).sum())]
    sinks, window = torch.arange(n_sink, device=chosen.device), torch.arange(near, end, device=chosen.device)
    return torch.cat([sinks, selected, window]), n_sink + len(selected)


def _exact_keys(k: Tensor, length: int, keys: KeyRows, table: RopeTable | None) -> Tensor:
    """The first ``length`` keys at their true positions, for blocks that attend to everything."""
    prefix = keys.convert(k[:, :length])
    return prefix if table is None else turn(prefix, table.factor[:length], scratch=True)


def _attend_own_block(q: Tensor, keys: KeyRows, values: Rows, first: Tensor, n_keys: int, scale: float, table: RopeTable | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Causal attention of every block ``[K, G, N, Q, D]`` to its own tokens; only their distances matter, so positions start at 0."""
    K, _, N, Q, D = q.shape
    row = torch.arange(Q, device=q.device)
    own = (first[:, None] + row).clamp(max=n_keys - 1)[None]
    own_k, own_v = keys.gather(own), values.gather(own)
    if table is not None:
        q, own_k = turn(q, table.factor[:Q]), turn(own_k, table.factor[:Q], scratch=True)
    causal = (row[:, None] >= row).repeat(q.shape[1], 1)
    rows = q.transpose(1, 2).reshape(K * N, -1, D).to(own_v.dtype)
    out, lse = attend_all(rows, own_k.flatten(0, 1).to(own_v.dtype), own_v.flatten(0, 1), scale, softcap, causal)
    return out.view(K, N, -1, Q, D).transpose(1, 2), lse.view(K, N, -1, Q).transpose(1, 2)
