"""Quest (arXiv 2406.10774): decode reads the pages of keys that could hold the largest logits; prompts are read densely.

Of every page the least and the largest number of each dimension of its keys are kept. A query's logit with any key of the page is at most
the sum, over dimensions, of the larger of its products with the two; the pages with the largest bounds are attended to. The paper has no
sinks and no window: here they are read besides, pages begin behind the sinks, and the window holds the page that is not whole yet. Each
query head has pages of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels.paged import whole
from torch import Tensor

from hipexp.attention.logits import at_positions, chosen_blocks, keep_best
from hipexp.attention.method import EVERYTHING, Call, SelectingMethod, check_whole_blocks
from hipexp.attention.rope import RopeTables
from hipexp.attention.selection import Selection
from hipexp.config.schema import ConfigError


class PageBounds:
    """Least and largest numbers ``[K, P, D]`` of the keys of whole pages, rotated to their true positions."""

    def __init__(self) -> None:
        self.low = self.high = torch.empty(0)

    @property
    def bytes(self) -> int:
        return self.low.nbytes + self.high.nbytes

    def upto(self, keys: Tensor, origin: int, page_tok: int, tables: RopeTables) -> None:
        """Take in the pages that have become whole; the first one begins at ``origin``."""
        there = self.low.shape[1] if self.low.ndim > 1 else 0
        n = max(0, keys.shape[1] - origin) // page_tok
        if n > there:
            begin, end = origin + there * page_tok, origin + n * page_tok
            new = at_positions(keys[:, begin:end], begin, tables).unflatten(1, (-1, page_tok))
            low, high = new.amin(2), new.amax(2)
            self.low, self.high = (low, high) if not there else (torch.cat([self.low, low], 1), torch.cat([self.high, high], 1))


@dataclass
class Quest(SelectingMethod):
    """``page_tok``: tokens of a page; ``keep_tok``: tokens kept besides sinks and window; the first ``dense_layers`` are dense."""

    page_tok: int = 16
    keep_tok: int = 2048
    dense_layers: int = 2

    budgets = ("keep_tok",)
    per_head = True
    splits = True

    def check(self) -> None:
        if self.page_tok < 1:
            raise ConfigError(f"pipeline.params.page_tok={self.page_tok} must be at least 1; try 16")
        check_whole_blocks(self.keep_tok, self.page_tok, "page_tok")
        if self.plan.window_tok < self.page_tok:
            raise ConfigError(
                f"pipeline.window_tok={self.plan.window_tok} must be at least pipeline.params.page_tok={self.page_tok}, so that a page "
                f"which is not whole lies in the window; try {self.page_tok}"
            )

    def block(self, decoding: bool) -> int:
        return self.page_tok

    def keep(self, decoding: bool) -> int:
        return self.keep_tok if decoding and self.plan.layer >= self.dense_layers else EVERYTHING

    def new_state(self) -> PageBounds:
        return PageBounds()

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 2 * kv_heads * n_tok / self.page_tok

    def select(self, call: Call) -> Selection:
        plan, pages = self.plan, call.state or PageBounds()
        pages.upto(whole(call.keys), plan.sink_tok, self.page_tok, call.tables)
        first = call.queries.start
        q = at_positions(call.queries.q[:, 0], first, call.tables)[:, 0].unflatten(0, (call.keys.shape[0], -1))
        bound = torch.einsum("kgd,kpd->kgp", q.clamp(min=0), pages.high) + torch.einsum("kgd,kpd->kgp", q.clamp(max=0), pages.low)
        start = plan.sink_tok + self.page_tok * torch.arange(bound.shape[2], device=q.device)
        bound = bound.flatten(0, 1).masked_fill(start > first - plan.window_tok, -torch.inf)
        return chosen_blocks([keep_best(bound, self.keep_tok // self.page_tok)], self.page_tok, plan.sink_tok)
