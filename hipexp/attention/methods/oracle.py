"""An upper bound: of all selections of its size the one that holds most attention, found by looking at every key.

For each block of queries, blocks of keys outside sinks and window are ranked by the attention that the queries of the block, and the heads
that share the list, give them together: by true positions if ``rope.prune`` is ``native``, else as if every key lay one window before the
query. No paper's method; every method that selects is measured against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hipexp.attention.across import sum_of_heads
from hipexp.attention.logits import block_mass, chosen_blocks, keep_best
from hipexp.attention.method import Call, SelectingMethod, check_whole_blocks
from hipexp.attention.selection import Selection
from hipexp.config.schema import Heads


@dataclass
class Oracle(SelectingMethod):
    """``keep_tok``: tokens kept, in blocks of ``block_tok``."""

    keep_tok: int = 2048
    block_tok: int = 1

    budgets = ("keep_tok",)
    splits = True

    def check(self) -> None:
        check_whole_blocks(self.keep_tok, self.block_tok)

    def keep(self, decoding: bool) -> int:
        return self.keep_tok

    def select(self, call: Call) -> Selection:
        plan, size = self.plan, self.block_tok
        marked = []
        for first, mass in block_mass(call, plan.prune, plan.window_tok):
            by_list = mass.unflatten(0, (call.keys.shape[0], -1)).sum(1)  # of key/value heads
            by_list = by_list if plan.heads is Heads.per_kv else sum_of_heads(by_list, call.processes)
            marked.append(keep_best(_far(by_list, plan.sink_tok, first - plan.window_tok, size), self.keep_tok // size))
        return chosen_blocks(marked, size, plan.sink_tok)


def _far(mass: Tensor, sink_tok: int, edge: int, block_tok: int) -> Tensor:
    """What lies behind the sinks and no later than ``edge``, summed by blocks ``[S, blocks]``; the last one may be a part of one."""
    far = mass[:, sink_tok : max(sink_tok, edge + 1)]
    return torch.nn.functional.pad(far, (0, -far.shape[1] % block_tok)).unflatten(1, (-1, block_tok)).sum(-1)
