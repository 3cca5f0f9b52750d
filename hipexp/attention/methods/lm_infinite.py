"""LM-Infinite (arXiv 2308.16137): sinks and window, and no key lies farther than the window is long.

A query sees the first ``sink_tok`` keys (the paper's n_starting) and those nearer than ``window_tok`` (its L_pretrain), at distances of at
most ``window_tok``. ``method: streaming`` with ``rope.attend: infllm`` does that in decode only: blocks of queries share a window there, so
that a prompt's queries see keys and distances a block farther than the ceiling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels.rope import rotate
from torch import Tensor

from hipexp.attention.logits import capped
from hipexp.attention.method import DenseMethod
from hipexp.attention.rope import RopeTables

QUERIES = 256  # at a time


@dataclass
class LmInfinite(DenseMethod):
    """LM-Infinite; its parameters are the pipeline's ``sink_tok`` and ``window_tok``."""

    linear = True
    splits = True

    def exact_tok(self, tables: RopeTables | None) -> int:
        return self.plan.window_tok

    def decode_rows(self, n_tok: int, heads: int, kv_heads: int) -> tuple[float, float]:
        return 2 * kv_heads * min(n_tok, self.plan.sink_tok + self.plan.window_tok), 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, begin: int, tables: RopeTables | None, scale: float, softcap: float | None) -> Tensor:
        (K, T, _), w = k.shape, self.plan.window_tok
        table = tables.upto(w + QUERIES) if tables else None
        sinks = torch.arange(min(self.plan.sink_tok, T), device=k.device)
        out = torch.empty_like(q)

        def logits(q: Tensor, at: Tensor, k: Tensor, k_at: Tensor) -> Tensor:
            if table is not None:
                q, k = (rotate(x.float(), table.cos[where], table.sin[where]).to(x.dtype) for x, where in ((q, at), (k, k_at)))
            return torch.einsum("kgrd,ktd->kgrt", q.unflatten(0, (K, -1)), k).float() * scale

        for block in range(begin // QUERIES * QUERIES, T, QUERIES):  # a fixed grid: the same angles however a prompt is cut
            first, end, origin = max(begin, block), min(block + QUERIES, T), max(0, block - w + 1)
            low = max(0, first - w + 1)
            rows = slice(first - begin, end - begin)
            own, near = torch.arange(first, end, device=k.device), torch.arange(low, end, device=k.device)
            distance = own[:, None] - near
            seen = torch.cat([own[:, None] - sinks >= w, (distance >= 0) & (distance < w)], -1)
            x = torch.cat([
                logits(q[:, rows], torch.full_like(own, w), k[:, : len(sinks)], torch.zeros_like(sinks)),
                logits(q[:, rows], own - origin, k[:, low:end], near - origin),
            ], -1)  # fmt: skip
            weight = capped(x, softcap).masked_fill(~seen, -torch.inf).softmax(-1).flatten(1, 2)
            values = torch.cat([v[:, : len(sinks)], v[:, low:end]], 1)
            out[:, rows] = (weight.to(v.dtype) @ values).view(q[:, rows].shape)
        return out
