"""H2O (arXiv 2306.14048): decode keeps the keys that got most attention so far and the newest ones; the others are gone for good.

A prompt is read densely. Every key's attention is summed over all queries, and over the heads that share it. Before each decode step, of
the keys that have left the window only those with the largest sums stay; later queries add to the sums of what they still see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from hipexp_kernels.paged import whole
from torch import Tensor

from hipexp.attention.logits import at_positions, chosen_blocks, keep_best, query_logits
from hipexp.attention.method import EVERYTHING, Call, Contract, SelectingMethod
from hipexp.attention.selection import Selection


class Sums:
    """Attention that each key got so far, ``[K, T]`` in fp32; -inf where the key is gone."""

    def __init__(self) -> None:
        self.sums = torch.empty(0)

    @property
    def bytes(self) -> int:
        return self.sums.nbytes

    def grow(self, kv_heads: int, length: int, device: torch.device) -> None:
        """Zeros for new keys."""
        sums = torch.zeros(kv_heads, length, device=device)
        if self.sums.ndim > 1:
            sums[:, : self.sums.shape[1]] = self.sums
        self.sums = sums


@dataclass
class H2O(SelectingMethod):
    """``keep_tok``: heavy hitters kept; the pipeline's ``window_tok`` are the newest."""

    keep_tok: int = 2048

    budgets = ("keep_tok",)
    exceptions: ClassVar = {
        Contract.growing: "what a decode step does not keep is gone, so it matters whether the tokens before it were read or decoded",
    }

    def block(self, decoding: bool) -> int:
        return 1

    def keep(self, decoding: bool) -> int:
        return self.keep_tok if decoding else EVERYTHING

    def new_state(self) -> Sums:
        return Sums()

    def observe(self, call: Call) -> None:
        state, keys, queries = call.state, whole(call.keys), call.queries
        if state is None:
            return
        state.grow(*keys.shape[:2], keys.device)
        if call.decoding:
            far = state.sums[:, self.plan.sink_tok : max(self.plan.sink_tok, queries.start - self.plan.window_tok + 1)]
            far.masked_fill_(~keep_best(far, self.keep_tok), -torch.inf)
        keys = at_positions(keys, 0, call.tables)
        for n in range(len(queries)):
            begin = max(queries.start + n * queries.size, queries.begin)
            end = min(queries.start + (n + 1) * queries.size, queries.end)
            q = queries.q[:, n, begin - queries.start - n * queries.size :][:, : end - begin]
            logits = query_logits(q, keys[:, :end], begin, call.tables, call.scale, None).unflatten(0, (len(keys), -1))
            logits.masked_fill_(state.sums[:, None, None, :end] == -torch.inf, -torch.inf)
            state.sums[:, :end] += logits.softmax(-1).sum((1, 2))

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0  # the sums are far smaller than keys

    def select(self, call: Call) -> Selection:
        sink_tok, edge = self.plan.sink_tok, call.queries.start - self.plan.window_tok
        far: Tensor = call.state.sums[:, sink_tok : edge + 1]
        return chosen_blocks([far > -torch.inf], 1, sink_tok)
