"""How much of the attention a selection holds: its share of the softmax mass, beside the best that any selection of its size could hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels.rope import RopeTable, rotate
from torch import Tensor

from hipexp.attention.selection import Selection


@dataclass(frozen=True)
class Mass:
    """Shares of the attention of one query, per query head ``[H]``.

    ``fixed``: sinks and window together. ``selected``: the selection, without what lies in these. ``oracle``: as many of the other tokens
    as are selected, the heaviest of each head by itself.
    """

    fixed: Tensor
    selected: Tensor
    oracle: Tensor

    @property
    def recall(self) -> Tensor:
        """What of the mass outside sinks and window is selected ``[H]``."""
        return self.selected / (1 - self.fixed).clamp(min=1e-9)

    @property
    def oracle_ratio(self) -> Tensor:
        """What is selected, in parts of what the oracle holds ``[H]``."""
        return self.selected / self.oracle.clamp(min=1e-9)


def attention_mass(
    q: Tensor, k: Tensor, selection: Selection, position: int, *, block_tok: int, sink_tok: int, window_tok: int, scale: float,
    table: RopeTable | None = None, distance_tok: int = 0,
) -> Mass:  # fmt: skip
    """The mass of the query ``q`` ``[H, D]`` at ``position`` over raw keys ``k`` ``[K, T, D]``, of which it sees those up to its own.

    ``selection`` is of one query block. Every key counts as lying ``distance_tok`` tokens before the query (``table`` rotates it by so
    many), as in the scoring strategies that leave keys raw: no length is beyond what the model knows.
    """
    (H, D), K, T = q.shape, k.shape[0], position + 1
    query = q.float() if table is None else rotate(q.float(), table.cos[distance_tok], table.sin[distance_tok])
    logits = torch.einsum("kgd,ktd->kgt", query.view(K, -1, D), k[:, :T].float()) * scale
    mass = torch.softmax(logits, -1).view(H, T)
    fixed = torch.zeros(T, dtype=torch.bool, device=q.device)
    fixed[:sink_tok] = fixed[max(0, T - window_tok) :] = True
    chosen = torch.zeros(len(selection.blocks), T, dtype=torch.bool, device=q.device)
    for row, blocks, count in zip(chosen, selection.blocks[:, 0], selection.counts[:, 0].tolist(), strict=True):
        tokens = (blocks[:count, None] + torch.arange(block_tok, device=q.device)).flatten()
        row[tokens[tokens < T]] = True
    chosen &= ~fixed
    per_head = chosen.repeat_interleave(H // len(chosen), 0)
    rest = mass.masked_fill(fixed, 0)
    most = int(per_head.sum(1).max())
    heaviest = rest.topk(most, -1).values.masked_fill(torch.arange(most, device=q.device) >= per_head.sum(1, keepdim=True), 0)
    return Mass((mass * fixed).sum(1), (mass * per_head).sum(1), heaviest.sum(1))
