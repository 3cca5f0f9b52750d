"""Block by block: one dense, unmasked attention over a packed tile of keys, and one small causal one over the block itself.

The query heads of a key/value head are rows of the same product. The two parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.attend_blocks.held import Held
from hipexp_kernels.merge_lse.vectorized import merge_lse
from hipexp_kernels.rope import AttendRotation, turn
from hipexp_kernels.rows import KeyRows, Rows

# Keys in flight for a single query: few enough that they are in the cache when they are used.
FLOATS, LEAST_TOK = 1 << 19, 64


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, *,
    block_tok: int, sink_tok: int, window_tok: int, scale: float, rotation: AttendRotation | None, softcap: float | None,
    held: Held | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, N, Q, D = q.shape
    (K, T, _), exact = k.shape, exact.bool()
    keys = KeyRows(
        k,
        rotation.table if rotation else None,
        once=T <= N * (sink_tok + blocks.shape[2] * block_tok + window_tok),
        purpose="attended keys",
    )
    values = Rows(v, purpose="attended values")
    q = keys.convert(q).view(K, H // K, N, Q, -1).transpose(1, 2)
    near = (first - window_tok + 1).clamp(min=0)  # where the window begins
    selected, n_selected = _selected(blocks, counts, near, block_tok)
    n_far = near.clamp(max=sink_tok) + n_selected
    rows = _queries(q, first, exact, n_far, first - near + 1, T, rotation).to(v.dtype).reshape(K, N, -1, D)
    out, lse = torch.zeros_like(rows), torch.full(rows.shape[:3], float("-inf"), device=q.device)
    alone = int(Q == 1)  # a single query attends to itself with the others: no causal part is left
    prefix = _true_keys(k, int((first[exact] + alone).amax()) if exact.any() else 0, keys)
    tile = max(LEAST_TOK, FLOATS // (K * D))  # for a single query; many are worth a product over all keys
    held = held if alone and N == 1 and (rotation is None or rotation.mode == "streaming") else None
    lists = [slice(s, s + 1) for s in range(K)] if len(blocks) > 1 else [slice(0, K)]
    for n, (start, begin, is_exact) in enumerate(zip(first.tolist(), near.tolist(), exact.tolist(), strict=True)):
        end, last = start + alone, start + Q - 1
        for s, heads in enumerate(lists):
            if is_exact:
                if end:
                    out[heads, n], lse[heads, n] = attend_all(
                        rows[heads, n], prefix[heads, :end].to(v.dtype), v[heads, :end], scale, softcap
                    )
                continue
            sinks, window = torch.arange(min(sink_tok, begin), device=k.device), torch.arange(begin, end, device=k.device)
            token = torch.cat([sinks, selected[s, n, : n_selected[s, n]], window])
            angle = rotation.keys(token, start, last, int(n_far[s, n]), window_tok) if rotation else None
            far, n_keys = int(n_far[s, n]), len(token)
            kept = held if len(sinks) == sink_tok else None  # from there on sinks and selected tokens keep their places
            have = kept.count(s) if kept is not None else 0
            parts = [attend_all(rows[heads, n], *kept.rows(s, have), scale, softcap)] if kept is not None and have else []
            cuts = [*_cut(have, far, tile), *_cut(far, n_keys, tile)] if alone else _cut(0, n_keys, n_keys)
            for part in cuts:
                some = token[None, part]
                if part.start >= far:  # window, one after the other: they can stay where they are
                    run = slice(int(some[0, 0]), int(some[0, 0]) + some.shape[1])
                    tile_k = keys.gather(some, heads) if keys.once else keys.convert(k[heads, run], reuse=True)
                    tile_v = v[heads, run]
                else:
                    tile_k, tile_v = keys.gather(some, heads), values.gather(some, heads)
                tile_k = (tile_k if angle is None else turn(tile_k, angle[part], scratch=True)).to(v.dtype)
                if kept is not None and part.start < far:
                    kept.add(s, tile_k, tile_v, sink_tok + selected.shape[2])
                parts.append(attend_all(rows[heads, n], tile_k, tile_v, scale, softcap))
            if parts:
                out[heads, n], lse[heads, n] = merge_lse(*map(list, zip(*parts, strict=True))) if len(parts) > 1 else parts[0]
    if not alone:
        own_out, own_lse = _attend_own_block(q, keys, values, first, scale, softcap)
        out, lse = merge_lse([out, own_out.view(out.shape)], [lse, own_lse.view(lse.shape)])
    return out.view(K, N, -1, Q, D).transpose(1, 2).reshape(H, N, Q, D), lse.view(K, N, -1, Q).transpose(1, 2).reshape(H, N, Q)


def attend_all(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of ``q`` ``[K, R, D]`` over keys ``[K, n, D]`` (where ``mask`` is true): output and log-sum-exp ``[K, R]``."""
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


def _selected(blocks: Tensor, counts: Tensor, near: Tensor, block_tok: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[S, N, M * block_tok]`` of the selected blocks, and how many of them, from the first on, lie before ``near`` ``[S, N]``."""
    tokens = (blocks[..., None] + torch.arange(block_tok, device=blocks.device)).flatten(2)
    slot = torch.arange(tokens.shape[2], device=blocks.device)
    return tokens, ((slot < counts[..., None] * block_tok) & (tokens < near[:, None])).sum(-1)


def _queries(
    q: Tensor, first: Tensor, exact: Tensor, n_far: Tensor, n_near: Tensor, n_keys: int, rotation: AttendRotation | None
) -> Tensor:
    """Converted queries ``[K, N, G, Q, ...]``, rotated as ``[K, N, G, Q, D]``; rows past the end are rotated like the last one."""
    if rotation is None:
        return q
    position = (first[:, None] + torch.arange(q.shape[3], device=q.device)).clamp(max=n_keys - 1)
    at = torch.where(exact[:, None], position, rotation.query(position, first[:, None], n_far[..., None], n_near[:, None]))
    return turn(q, rotation.table.factor[at].unsqueeze(-3))


def _cut(begin: int, end: int, size: int) -> list[slice]:
    """Parts of ``size`` from ``begin`` to ``end``, the last one shorter."""
    return [slice(at, min(at + size, end)) for at in range(begin, end, size)] if begin < end else []


def _true_keys(k: Tensor, length: int, keys: KeyRows) -> Tensor:
    """The first ``length`` keys at their true positions, for blocks that attend to everything."""
    prefix = keys.convert(k[:, :length])
    return prefix if keys.table is None else turn(prefix, keys.table.factor[:length], scratch=True)


def _attend_own_block(q: Tensor, keys: KeyRows, values: Rows, first: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Causal attention of every block ``[K, N, G, Q, ...]`` to its own tokens; only their distances matter, so positions start at 0."""
    K, N, G, Q, _ = q.shape
    row = torch.arange(Q, device=q.device)
    own = (first[:, None] + row).clamp(max=keys.n_tok - 1)[None]
    own_k, own_v = keys.gather(own), values.gather(own).flatten(0, 1)
    if keys.table is not None:
        q, own_k = turn(q, keys.table.factor[:Q]), turn(own_k, keys.table.factor[:Q], scratch=True)
    causal = (row[:, None] >= row).repeat(G, 1)
    return attend_all(q.reshape(K * N, G * Q, -1).to(own_v.dtype), own_k.flatten(0, 1).to(own_v.dtype), own_v, scale, softcap, causal)
