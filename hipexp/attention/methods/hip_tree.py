"""HiP (arXiv 2406.09827, ICLR 2025), which InfiniteHiP grew out of: one list for each head, found by halving chunks of the text.

All keys before a block of queries are cut into as many equal chunks as blocks are kept. Each chunk is halved, each half scored by its
middle key, the best halves go on, as many as before, until they are single blocks. The first layers are dense; positions are true ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hipexp_kernels.paged import whole
from torch import Tensor

from hipexp.attention.logits import at_positions, chosen_blocks
from hipexp.attention.method import EVERYTHING, Call, SelectingMethod
from hipexp.attention.selection import Selection


@dataclass
class HipTree(SelectingMethod):
    """``keep_tok`` (the paper's k) in blocks of ``block_tok`` (b_k) for ``query_tok`` queries (b_q); ``dense_layers`` come first."""

    keep_tok: int = 1024
    block_tok: int = 8
    query_tok: int = 64
    dense_layers: int = 3

    linear = True
    budgets = ("keep_tok",)
    per_head = True

    @property
    def query_block_tok(self) -> int:
        return self.query_tok

    def block(self, decoding: bool) -> int:
        return self.block_tok

    def keep(self, decoding: bool) -> int:
        return self.keep_tok if self.plan.layer >= self.dense_layers else EVERYTHING

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        kept = self.keep_tok // self.block_tok
        rounds = math.ceil(math.log2(max(1, n_tok / self.block_tok / kept)))
        return heads * 2 * kept * rounds

    def select(self, call: Call) -> Selection:
        plan, queries, size, sink_tok = self.plan, call.queries, self.block_tok, self.plan.sink_tok
        keys = at_positions(whole(call.keys), 0, call.tables)
        marked = []
        for n in range(len(queries)):
            first = queries.start + n * queries.size
            begin, end = max(first, queries.begin), min(first + queries.size, queries.end)
            q = at_positions(queries.q[:, n, begin - first : end - first], begin, call.tables).unflatten(0, (len(keys), -1))
            n_blocks = max(0, -(-(first - plan.window_tok + 1 - sink_tok) // size))
            last = first - plan.window_tok  # the last token that may be selected

            def score(token: Tensor, q: Tensor = q, last: int = last) -> Tensor:
                """Largest product of the block's queries with keys ``[H, C]``."""
                probed = keys.repeat_interleave(q.shape[1], 0).gather(1, token.clamp(max=last)[..., None].expand(-1, -1, keys.shape[2]))
                return torch.einsum("hrd,hcd->hrc", q.flatten(0, 1), probed).amax(1)

            marked.append(_descend(score, call.queries.q.shape[0], n_blocks, self.keep_tok // size, size, sink_tok, keys.device))
        return chosen_blocks(marked, size, sink_tok)


def _descend(score, heads: int, n_blocks: int, keep: int, block_tok: int, origin: int, device: torch.device) -> Tensor:
    """Which of ``n_blocks`` blocks each head keeps ``[H, n_blocks]``."""
    chosen = torch.zeros(heads, n_blocks, dtype=torch.bool, device=device)
    n = min(keep, n_blocks)
    if not n:
        return chosen
    border = torch.arange(n + 1, device=device) * n_blocks // n
    low, high = (x.expand(heads, -1) for x in (border[:-1], border[1:]))
    while int((high - low).max()) > 1:
        middle = (low + high + 1) // 2
        low, high = torch.cat([low, middle], 1), torch.cat([middle, high], 1)
        scores = score(origin + (low + high) * block_tok // 2).masked_fill(high <= low, -torch.inf)
        best = scores.topk(n, -1).indices.sort(-1).values
        low, high = low.gather(1, best), high.gather(1, best)
    return chosen.scatter_(1, low, True)
