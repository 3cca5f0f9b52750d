"""The attention that ``needle`` is trained with, and the locality loss that it measures."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

LAYERS, HEAD_DIM, ROPE_THETA = 5, 64, 1e6
LOCALITY_FROM_LAYER = LAYERS - 2  # the last two do the looking up
NEAR_SINK_TOK = 4
OWN_HEADS = (1, 3)  # query heads with a locality loss of their own: one of each key/value head
BF16_FROM_TOK = 1536  # attention over longer sequences multiplies in bfloat16: twice as fast on processors that know it


class Asking(NamedTuple):
    """Queries that ask for needles: ``rows`` [B, N, S] positions (S of them share a target), ``target`` [B, N, T] sums to 1 or 0 and
    says where the needles lie, ``allowed`` [B, N, T] the tokens among which they must stand out."""

    rows: torch.Tensor
    target: torch.Tensor
    allowed: torch.Tensor


class Locality:
    """Collects the locality loss of one forward pass.

    ``near_tok``: block size in tokens of the attention of ``near_layers`` in this step, 0 for all tokens.
    """

    def __init__(self):
        self.single: Asking | None = None
        self.blocks: Asking | None = None
        self.near_tok = 0
        self.near_layers: tuple[int, ...] = ()
        self.own: list[torch.Tensor] = []
        self.shared: list[torch.Tensor] = []

    def add(self, q_BHTD: torch.Tensor, k_BHTD: torch.Tensor, scale: float) -> None:
        """Compares without regard to distance: each query looks at all keys as if they lay at one random distance, as pruning does.

        Each token of the needle's neighbourhood competes with the tokens elsewhere, so that attention may still single one out.
        """
        T, device = k_BHTD.shape[2], k_BHTD.device
        k_BHTD = turn(k_BHTD, -torch.arange(T, device=device))
        own = [(slice(head, head + 1), self.single, self.own) for head in OWN_HEADS]
        for heads, asking, losses in (*own, (slice(None), self.blocks, self.shared)):
            q, rows = q_BHTD[:, heads], asking.rows.flatten(1)
            q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
            distance = torch.randint(T // 8, T * 2 // 3, asking.rows.shape[:2]).to(device)
            distance = distance[..., None].expand_as(asking.rows).flatten(1)
            logits = (turn(q, (distance - rows)[:, None]) @ k_BHTD[:, heads].transpose(-1, -2)) * scale
            pooled = logits.unflatten(2, asking.rows.shape[1:]).logsumexp((1, 3))
            pooled = pooled.masked_fill(~asking.allowed, -1e9)
            elsewhere = pooled.masked_fill(asking.target > 0, -1e9).logsumexp(-1, keepdim=True)
            chosen = F.logsigmoid(pooled - elsewhere)
            losses.append(-(asking.target * chosen).sum() / asking.target.sum().clamp(min=1))


def turn(x_D: torch.Tensor, by_tok: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: turn vectors ``[..., D]`` on by ``by_tok`` ``[...]`` positions."""
    angle = by_tok[..., None] * ROPE_THETA ** (-torch.arange(HEAD_DIM // 2, device=by_tok.device) / (HEAD_DIM // 2))
    (a, b), cos, sin = x_D.chunk(2, -1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


LOCALITY = Locality()


def attention(module, query, key, value, attention_mask, *, scaling, **_):
    """Attention of a layer, as transformers calls it: causal, over all or near tokens; the last layers measure their locality."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if LOCALITY.single is not None and module.layer_idx >= LOCALITY_FROM_LAYER:
        LOCALITY.add(query.float(), key.float(), scaling)
    if key.shape[2] >= BF16_FROM_TOK:
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    if LOCALITY.near_tok and module.layer_idx in LOCALITY.near_layers:
        out = attend_near(query, key, value, LOCALITY.near_tok, scaling)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).float(), None


def attend_near(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, near_tok: int, scale: float) -> torch.Tensor:
    """Attention ``[B, H, T, D]`` in blocks of ``near_tok``: each sees itself causally, the block before it, and the first few tokens."""
    B, H, T, D = q.shape
    blocks = -(-T // near_tok)
    q, k, v = (F.pad(x, (0, 0, 0, blocks * near_tok - T)) for x in (q, k, v))

    def seen(x: torch.Tensor) -> torch.Tensor:
        own = x.unflatten(2, (blocks, near_tok))
        sink = x[:, :, None, :NEAR_SINK_TOK].expand(B, H, blocks, NEAR_SINK_TOK, D)
        return torch.cat([sink, own.roll(1, 2), own], 3).transpose(1, 2).flatten(0, 1)

    block = torch.arange(blocks, device=q.device)[:, None, None]
    key, query = torch.arange(NEAR_SINK_TOK + 2 * near_tok, device=q.device), torch.arange(near_tok, device=q.device)[:, None]
    before, own = key >= NEAR_SINK_TOK, key - NEAR_SINK_TOK - near_tok
    mask = torch.where(own >= 0, own <= query, torch.where(before, block >= 1, block >= 2))
    mask = mask.repeat(B, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(
        q.unflatten(2, (blocks, near_tok)).transpose(1, 2).flatten(0, 1), seen(k), seen(v), mask, scale=scale
    )
    return out.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]
