"""A lower bound: blocks of keys drawn by lot for every block of queries. What a method does not do better than this is worth nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hipexp.attention.logits import chosen_blocks, keep_best
from hipexp.attention.method import Call, SelectingMethod
from hipexp.attention.selection import Selection


@dataclass
class Random(SelectingMethod):
    """``keep_tok``: tokens kept, in blocks of ``block_tok``; the draw depends on ``seed``, the layer and the position of the queries."""

    keep_tok: int = 2048
    block_tok: int = 8
    seed: int = 0

    linear = True
    budgets = ("keep_tok",)

    def block(self, decoding: bool) -> int:
        return self.block_tok

    def keep(self, decoding: bool) -> int:
        return self.keep_tok

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0

    def select(self, call: Call) -> Selection:
        sink_tok, marked = self.plan.sink_tok, []
        for n in range(len(call.queries)):
            first = call.queries.start + n * call.queries.size
            n_blocks = max(0, -(-(first - self.plan.window_tok + 1 - sink_tok) // self.block_tok))
            generator = torch.Generator().manual_seed((self.seed << 40) + (self.plan.layer << 32) + first)
            drawn = torch.rand(1, n_blocks, generator=generator)
            marked.append(keep_best(drawn, self.keep_tok // self.block_tok).to(call.keys.device))
        return chosen_blocks(marked, self.block_tok, sink_tok)
