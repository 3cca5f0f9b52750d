"""Block by block: one dense, unmasked attention over packed keys, and one small causal one over the block itself.

The query heads of a key/value head are rows of the same product. The two parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.attend_blocks.dense import attend_all
from hipexp_kernels.attend_blocks.held import Held
from hipexp_kernels.attend_blocks.members import each_member
from hipexp_kernels.attend_blocks.vectorized_decode import attend_one
from hipexp_kernels.merge_lse.vectorized import merge_lse
from hipexp_kernels.paged import KV, run_of
from hipexp_kernels.rope import AttendRotation, turn
from hipexp_kernels.rows import KeyRows, Rows


def attend_blocks(
    q: Tensor, k: KV, v: KV, blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, *,
    block_tok: int, sink_tok: int, window_tok: int, scale: float, rotation: AttendRotation | None, softcap: float | None,
    held: Held | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, N, Q, D = q.shape
    (K, T, _), exact = k.shape, exact.bool()
    if Q == N == 1 and not exact[0]:
        return attend_one(
            q, k, v, blocks[:, 0], counts[:, 0], int(first[0]), held or Held(),
            block_tok=block_tok, sink_tok=sink_tok, window_tok=window_tok, scale=scale, rotation=rotation, softcap=softcap,
        )  # fmt: skip
    sizes = dict(block_tok=block_tok, sink_tok=sink_tok, window_tok=window_tok)
    if len(blocks) > K:
        return each_member(attend_blocks, q, k, v, blocks, counts, first, exact, **sizes, scale=scale, rotation=rotation, softcap=softcap)
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
    n_true = int(first[exact].amax()) if exact.any() else 0
    true_k, true_v = _true_keys(k, n_true, keys), run_of(v, 0, n_true)
    lists = [slice(s, s + 1) for s in range(K)] if len(blocks) > 1 else [slice(0, K)]
    for n, (start, begin, is_exact) in enumerate(zip(first.tolist(), near.tolist(), exact.tolist(), strict=True)):
        for s, heads in enumerate(lists):
            if start == 0:
                continue  # a block that begins with token 0 sees itself alone
            if is_exact:
                tile_k, tile_v = true_k[heads, :start], true_v[heads, :start]
            else:
                sinks, window = torch.arange(min(sink_tok, begin), device=k.device), torch.arange(begin, start, device=k.device)
                token = torch.cat([sinks, selected[s, n, : n_selected[s, n]], window])
                if not len(token):
                    continue
                tile_k, tile_v = keys.gather(token[None], heads), values.gather(token[None], heads)
                if rotation:
                    angle = rotation.keys(token, start, start + Q - 1, int(n_far[s, n]), window_tok)
                    tile_k = turn(tile_k, angle, scratch=True)
            out[heads, n], lse[heads, n] = attend_all(rows[heads, n], tile_k.to(v.dtype), tile_v, scale, softcap)
    own_out, own_lse = _attend_own_block(q, keys, values, first, scale, softcap)
    out, lse = merge_lse([out, own_out.view(out.shape)], [lse, own_lse.view(lse.shape)])
    return out.view(K, N, -1, Q, D).transpose(1, 2).reshape(H, N, Q, D), lse.view(K, N, -1, Q).transpose(1, 2).reshape(H, N, Q)


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


def _true_keys(k: KV, length: int, keys: KeyRows) -> Tensor:
    """The first ``length`` keys at their true positions, for blocks that attend to everything."""
    prefix = keys.convert(run_of(k, 0, length))
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
