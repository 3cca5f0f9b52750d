"""A lower bound: blocks of keys drawn by lot for every block of queries. What a method does not do better than this is worth nothing.

All heads share a draw, whatever ``heads`` says. Blocks are those between sinks and window; the last one may reach into the window.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from hipexp.attention.logits import chosen_blocks
from hipexp.attention.method import Call, SelectingMethod, check_whole_blocks
from hipexp.attention.selection import Selection


@dataclass
class Random(SelectingMethod):
    """``keep_tok``: tokens kept, in blocks of ``block_tok``; the draw depends on ``seed``, the layer and the position of the queries."""

    keep_tok: int = 2048
    block_tok: int = 8
    seed: int = 0

    linear = True
    budgets = ("keep_tok",)
    splits = True

    def check(self) -> None:
        check_whole_blocks(self.keep_tok, self.block_tok)

    def keep(self, decoding: bool) -> int:
        return self.keep_tok

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0

    def select(self, call: Call) -> Selection:
        plan, marked = self.plan, []
        for first in call.queries.first.tolist():
            n_blocks = max(0, -(-(first - plan.window_tok + 1 - plan.sink_tok) // self.block_tok))
            lots = random.Random(f"{self.seed} {plan.layer} {first}")
            drawn = torch.zeros(1, n_blocks, dtype=torch.bool)
            drawn[0, lots.sample(range(n_blocks), min(n_blocks, self.keep_tok // self.block_tok))] = True
            marked.append(drawn.to(call.keys.device))
        return chosen_blocks(marked, self.block_tok, plan.sink_tok)
