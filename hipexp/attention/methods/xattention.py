"""XAttention (arXiv 2503.16428) in prefill: blocks of keys by the sums of antidiagonals of the attention matrix; decode is dense.

Of every ``stride_tok`` by ``stride_tok`` tile the logits on its antidiagonal are averaged: every query and every key of the tile takes part
once. A softmax over the tiles of a row, summed by blocks, estimates what attention each block of keys gets from a block of queries. The
block itself is attended to, with sinks and window (a sink as long as a block is what the authors' program adds to the paper), and of the
others the fewest that bring what is held to ``mass``. All heads have the same threshold; the paper can also search one for each.
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
    splits = True

    def check(self) -> None:
        if self.stride_tok < 1 or self.block_tok < 1 or self.block_tok % self.stride_tok or self.plan.sink_tok % self.block_tok:
            raise ConfigError(
                f"pipeline.params.block_tok={self.block_tok} must be a multiple of params.stride_tok={self.stride_tok} and divide "
                f"pipeline.sink_tok={self.plan.sink_tok}; try 128, 16 and 0"
            )
        if not 0 < self.mass <= 1:
            raise ConfigError(f"pipeline.params.mass={self.mass} must be above 0 and at most 1; try 0.9")

    @property
    def query_block_tok(self) -> int:
        return self.block_tok

    def keep(self, decoding: bool) -> int:
        return EVERYTHING  # a threshold is no budget

    def exact_tok(self, decoding: bool) -> int:
        return EVERYTHING if decoding else self.block_tok

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0  # decode is dense

    def select(self, call: Call) -> Selection:
        plan, keys, queries, B, S = self.plan, whole(call.keys), call.queries, self.block_tok, self.stride_tok
        tiles = self._tiles(at_positions(keys, 0, call.tables)).flip(2).flatten(2)
        marked = []
        for n, first in enumerate(range(queries.start, queries.end, B)):
            q = queries.q[:, n, : queries.end - first]
            rows = self._tiles(at_positions(q, first, call.tables)).flatten(2)
            n_tiles = first // S + rows.shape[1]
            logits = torch.einsum("kgrd,ktd->kgrt", rows.unflatten(0, (len(keys), -1)), tiles[:, :n_tiles]).flatten(0, 1) * (call.scale / S)
            tile = torch.arange(n_tiles, device=q.device)
            share = logits.masked_fill(tile > tile[first // S :, None], -torch.inf).softmax(-1).mean(1)
            share = torch.nn.functional.pad(share, (0, -n_tiles % (B // S))).unflatten(1, (-1, B // S)).sum(-1)
            start = torch.arange(0, first + B, B, device=q.device)
            held = (start < plan.sink_tok) | (start > first - plan.window_tok)
            marked.append(_fewest(share, held, self.mass)[:, plan.sink_tok // B : first // B])
        return chosen_blocks(marked, B, plan.sink_tok)

    def _tiles(self, x: Tensor) -> Tensor:
        """``x`` ``[.., n, D]`` in tiles ``[.., n/S, S, D]``, zeros at the end. A product with a reversed one sums an antidiagonal."""
        return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.stride_tok)).unflatten(1, (-1, self.stride_tok))


def _fewest(share: Tensor, held: Tensor, mass: float) -> Tensor:
    """The fewest entries of ``share`` ``[H, C]``, which sums to 1, that make ``mass`` together with those that are ``held`` ``[C]``."""
    order = share.masked_fill(held, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ordered = share.gather(-1, order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(-1) - ordered < mass)
