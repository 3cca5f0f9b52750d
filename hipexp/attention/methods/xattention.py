"""XAttention (arXiv 2503.16428) in prefill: blocks of keys by the sums of antidiagonals of the attention matrix; decode is dense.

Of every ``stride_tok`` by ``stride_tok`` tile the logits on its antidiagonal are averaged: every query and every key of the tile takes part
once. A softmax over the tiles of a row, summed by blocks, estimates what attention each block of keys gets from a block of queries; the
fewest blocks that hold ``mass`` of it are attended to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels.paged import whole
from torch import Tensor

from hipexp.attention.logits import at_positions, chosen_blocks
from hipexp.attention.method import EVERYTHING, Call, SelectingMethod
from hipexp.attention.selection import Selection
from hipexp.config.schema import ConfigError


@dataclass
class XAttention(SelectingMethod):
    """``block_tok``: of blocks of queries and of keys; ``stride_tok``: of tiles, a divisor of it; ``mass``: the paper's threshold."""

    block_tok: int = 128
    stride_tok: int = 16
    mass: float = 0.9

    per_head = True

    def check(self) -> None:
        if self.block_tok % self.stride_tok or self.plan.sink_tok % self.block_tok:
            raise ConfigError(
                f"pipeline.params.block_tok={self.block_tok} must be a multiple of params.stride_tok={self.stride_tok} and divide "
                f"pipeline.sink_tok={self.plan.sink_tok}; try 128, 16 and 0"
            )

    @property
    def query_block_tok(self) -> int:
        return self.block_tok

    def block(self, decoding: bool) -> int:
        return self.block_tok

    def keep(self, decoding: bool) -> int:
        return EVERYTHING  # a threshold is no budget

    def exact_tok(self, decoding: bool) -> int:
        return EVERYTHING if decoding else self.block_tok

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0  # decode is dense

    def select(self, call: Call) -> Selection:
        keys, queries, B, S = whole(call.keys), call.queries, self.block_tok, self.stride_tok
        tiles = self._tiles(at_positions(keys, 0, call.tables), keys.shape[1], reverse=True)
        marked = []
        for n in range(len(queries)):
            first = queries.start + n * B
            q = at_positions(queries.q[:, n], first, call.tables)
            rows = self._tiles(q, B, reverse=False).unflatten(0, (len(keys), -1))
            logits = torch.einsum("kgrd,ktd->kgrt", rows, tiles[:, : (first + B) // S]).flatten(0, 1) * (call.scale / S)
            at = first // S + torch.arange(B // S, device=q.device)
            logits = logits.masked_fill(torch.arange(logits.shape[2], device=q.device) > at[:, None], -torch.inf)
            share = logits.softmax(-1).sum(1) / (B // S)
            share = torch.nn.functional.pad(share, (0, -share.shape[1] % (B // S))).unflatten(1, (-1, B // S)).sum(-1)
            marked.append(_fewest(share, self.mass)[:, self.plan.sink_tok // B : first // B])
        return chosen_blocks(marked, B, self.plan.sink_tok)

    def _tiles(self, x: Tensor, n: int, reverse: bool) -> Tensor:
        """``[.., tiles, S * D]``: all tokens of a tile in one row, so that a product of two rows sums an antidiagonal."""
        x = torch.nn.functional.pad(x, (0, 0, 0, -n % self.stride_tok)).unflatten(1, (-1, self.stride_tok))
        return (x.flip(2) if reverse else x).flatten(2)


def _fewest(share: Tensor, mass: float) -> Tensor:
    """The fewest entries of ``share`` ``[H, C]``, which sums to 1, that hold ``mass`` of it."""
    ordered, order = share.sort(dim=-1, descending=True, stable=True)
    needed = ordered.cumsum(-1) - ordered < mass
    return torch.zeros_like(needed).scatter_(-1, order, needed)
