"""SelfExtend (arXiv 2401.01325): far keys share positions in groups, so that no distance is longer than the model was trained for.

A key nearer than ``neighbour_tok`` lies at its true distance. Farther ones do by positions divided by ``group_tok``, moved so that both
meet where one ends and the other begins: query ``p`` at ``p // g + w - w // g``, key ``j`` at ``j // g``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels import merge_lse
from hipexp_kernels.attend_blocks.dense import attend_all
from hipexp_kernels.rope import rotate
from torch import Tensor

from hipexp.attention.logits import capped
from hipexp.attention.method import EVERYTHING, DenseMethod
from hipexp.attention.rope import RopeTables
from hipexp.config.schema import ConfigError

QUERIES = 256  # at a time


@dataclass
class SelfExtend(DenseMethod):
    """``group_tok``: keys that share a position (the paper's G); ``neighbour_tok``: keys at true distances (its w_n)."""

    group_tok: int = 16
    neighbour_tok: int = 1024

    splits = True

    def check(self) -> None:
        for name in ("group_tok", "neighbour_tok"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pipeline.params.{name}={getattr(self, name)} must be at least 1; try 16")

    def exact_tok(self, tables: RopeTables | None) -> int:
        return self.neighbour_tok if tables else EVERYTHING

    def attend(self, q: Tensor, k: Tensor, v: Tensor, begin: int, tables: RopeTables | None, scale: float, softcap: float | None) -> Tensor:
        K, T, _ = k.shape
        table = tables.upto(T) if tables else None
        position, g, w = torch.arange(T, device=k.device), self.group_tok, self.neighbour_tok

        def at(x: Tensor, where: Tensor) -> Tensor:
            return x if table is None else rotate(x.float(), table.cos[where], table.sin[where]).to(x.dtype)

        true_k, grouped_k = at(k, position), at(k, position // g)
        out = torch.empty_like(q)
        for first in range(begin, T, QUERIES):
            end, near = min(first + QUERIES, T), max(0, first - w + 1)
            rows = slice(first - begin, end - begin)
            own = position[first:end]
            moved = torch.minimum(own, own // g + w - w // g)  # farther only before there are keys that need it
            true_q, grouped_q = (at(q[:, rows], x).unflatten(0, (K, -1)) for x in (own, moved))
            distance = own[:, None] - position[near:end]
            logits = torch.where(distance < w, *(torch.einsum("kgrd,ktd->kgrt", x, y[:, near:end]).float() * scale
                                                 for x, y in ((true_q, true_k), (grouped_q, grouped_k))))  # fmt: skip
            logits = capped(logits, softcap).masked_fill(distance < 0, -torch.inf).flatten(1, 2)
            part = (logits.softmax(-1) @ v[:, near:end].float()).to(q.dtype), logits.logsumexp(-1)
            if near:
                far = attend_all(grouped_q.flatten(1, 2), grouped_k[:, :near], v[:, :near], scale, softcap)
                part = merge_lse([part[0], far[0]], [part[1], far[1]])
            out[:, rows] = part[0].view(q[:, rows].shape)
        return out
