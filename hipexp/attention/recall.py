"""How much of the attention a selection holds: its share of the softmax mass, beside the best that any selection of its size could hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels.rope import RopeTable, rotate
from torch import Tensor

from hipexp.attention.logits import capped

TOP = 64  # heaviest tokens of each head
NOTHING = 1e-4  # a head that puts less than this outside sinks and window has nothing to lose


@dataclass(frozen=True)
class Mass:
    """Shares of the attention of one query, per query head ``[H]``.

    ``fixed``: sinks and window together; ``outside``: the rest. ``selected``: the selection, without what lies in these. ``oracle``: as
    many of the other tokens as are selected, the heaviest of each head by itself. ``top``: which part of the ``TOP`` heaviest other tokens
    is selected.
    """

    fixed: Tensor
    outside: Tensor
    selected: Tensor
    oracle: Tensor
    top: Tensor

    @property
    def recall(self) -> Tensor:
        """What of the mass outside sinks and window is selected ``[H]``; all of it where there is nothing to lose."""
        return torch.where(self.outside < NOTHING, 1.0, self.selected / self.outside.clamp(min=NOTHING))

    @property
    def oracle_ratio(self) -> Tensor:
        """What is selected, in parts of what the oracle holds ``[H]``: 0 if nothing is selected, 1 where there is nothing to lose."""
        return torch.where(self.outside < NOTHING, 1.0, self.selected / self.oracle.clamp(min=1e-30))


def attention_mass(logits: Tensor, chosen: Tensor, fixed: Tensor) -> Mass:
    """The mass of one query with ``logits`` ``[H, T]`` (fp32, scaled) over the keys it sees.

    ``chosen`` ``[S, T]``: what is selected, by list; ``fixed`` ``[T]``: sinks and window.
    """
    H = len(logits)
    mass = torch.softmax(logits, -1)
    per_head = (chosen & ~fixed).repeat_interleave(H // len(chosen), 0)
    rest = mass.masked_fill(fixed, 0)
    counts = per_head.sum(1)
    n_top = min(TOP, int((~fixed).sum()))
    heaviest, at = mass.masked_fill(fixed, -1).topk(max(n_top, int(counts.max())), -1)
    oracle = heaviest.masked_fill(torch.arange(heaviest.shape[1], device=logits.device) >= counts[:, None], 0).sum(1)
    top = per_head.gather(1, at[:, :n_top]).float().sum(1) / max(1, n_top)
    return Mass((mass * fixed).sum(1), rest.sum(1), (mass * per_head).sum(1), oracle, top)


def chosen_tokens(starts: Tensor, counts: Tensor, chunk_tok: int, n_tok: int) -> Tensor:
    """Which of ``n_tok`` tokens lie in the first ``counts`` ``[S]`` of the chunks of ``chunk_tok`` tokens at ``starts`` ``[S, M]``."""
    chosen = torch.zeros(len(starts), n_tok, dtype=torch.bool, device=starts.device)
    for row, chunks, count in zip(chosen, starts, counts.tolist(), strict=True):
        tokens = (chunks[:count, None] + torch.arange(chunk_tok, device=starts.device)).flatten()
        row[tokens[tokens < n_tok]] = True
    return chosen


def fixed_tokens(n_tok: int, sink_tok: int, window_begin: int, device: torch.device) -> Tensor:
    """Which of ``n_tok`` tokens are sinks, or lie at ``window_begin`` or after it ``[n_tok]``."""
    at = torch.arange(n_tok, device=device)
    return (at < sink_tok) | (at >= window_begin)


def logits_at_one_distance(
    q: Tensor, k: Tensor, scale: float, table: RopeTable | None, distance_tok: int, softcap: float | None = None
) -> Tensor:
    """Logits ``[H, T]`` of a query ``[H, D]`` over raw keys ``[K, T, D]`` that all count as ``distance_tok`` tokens before it.

    So the scoring strategies that leave keys raw see them; no length is beyond what the model knows. ``table`` None: no rotation.
    ``softcap``: bound of the model's logits.
    """
    query = q.float() if table is None else rotate(q.float(), table.cos[distance_tok], table.sin[distance_tok])
    return capped(torch.einsum("kgd,ktd->kgt", query.view(len(k), -1, q.shape[-1]), k.float()).flatten(0, 1) * scale, softcap)


def logits_in_place(q: Tensor, k: Tensor, scale: float, table: RopeTable | None, softcap: float | None = None) -> Tensor:
    """Logits ``[H, T]`` of dense attention: of a query ``[H, D]`` at position ``T - 1`` over raw keys ``[K, T, D]`` at true positions."""
    if table is not None:
        T = k.shape[1]
        q, k = rotate(q.float(), table.cos[T - 1], table.sin[T - 1]), rotate(k.float(), table.cos[:T], table.sin[:T])
    return logits_at_one_distance(q, k, scale, None, 0, softcap)
