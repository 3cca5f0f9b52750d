"""HiP (arXiv 2406.09827, ICLR 2025), which InfiniteHiP grew out of: one list for each head, found by halving chunks of the text.

All keys before a block of queries are cut into as many equal chunks as blocks are kept. Each chunk is halved, the block in the middle of a
half stands for it, by its largest product of a query with a key; the best halves go on, as many as before, until they are single blocks.
The first layers are dense; positions are true ones. Here sinks and window are read besides and are not searched, a decode step is a block
of one query, and every step searches anew (the paper may keep a list for some steps).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hipexp_kernels.paged import whole
from hipexp_kernels.rows import Rows
from torch import Tensor

from hipexp.attention.logits import at_positions, chosen_blocks
from hipexp.attention.method import EVERYTHING, Call, SelectingMethod, check_whole_blocks
from hipexp.attention.rope import RopeTables
from hipexp.attention.selection import Selection
from hipexp.config.schema import ConfigError


@dataclass
class HipTree(SelectingMethod):
    """``keep_tok`` (the paper's k) in blocks of ``block_tok`` (b_k) for ``query_tok`` queries (b_q); ``dense_layers`` (l_d) come first.

    Of a block every ``query_stride_tok``-th query (b_sq) and every ``key_stride_tok``-th key (b_sk) are multiplied.
    """

    keep_tok: int = 1024
    block_tok: int = 2
    query_tok: int = 64
    query_stride_tok: int = 2
    key_stride_tok: int = 1
    dense_layers: int = 3

    linear = True
    budgets = ("keep_tok",)
    per_head = True
    splits = True

    def check(self) -> None:
        for name in ("block_tok", "query_tok", "query_stride_tok", "key_stride_tok"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pipeline.params.{name}={getattr(self, name)} must be at least 1; try {getattr(HipTree, name)}")
        check_whole_blocks(self.keep_tok, self.block_tok)

    def keep(self, decoding: bool) -> int:
        return self.keep_tok if self.plan.layer >= self.dense_layers else EVERYTHING

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        kept = self.keep_tok // self.block_tok
        rounds = math.ceil(math.log2(max(1, n_tok / self.block_tok / kept))) if kept else 0
        return heads * 2 * kept * rounds

    def select(self, call: Call) -> Selection:
        queries, sink_tok = call.queries, self.plan.sink_tok
        keys = whole(call.keys)
        marked = []
        for n in range(len(queries)):
            first = queries.start + n * queries.size
            begin, end = max(first, queries.begin), min(first + queries.size, queries.end)
            q = at_positions(queries.q[:, n, begin - first : end - first], begin, call.tables)[:, :: self.query_stride_tok]
            marked.append(self._descend(q, keys[:, sink_tok : max(sink_tok, first - self.plan.window_tok + 1)], call.tables))
        return chosen_blocks(marked, self.block_tok, sink_tok)

    def _descend(self, q: Tensor, keys: Tensor, tables: RopeTables) -> Tensor:
        """Which blocks of raw ``keys`` ``[K, T, D]`` behind the sinks the heads of queries ``[H, R, D]`` keep ``[H, blocks]``."""
        n_blocks = -(-keys.shape[1] // self.block_tok)
        n = min(self.keep_tok // self.block_tok, n_blocks)
        chosen = torch.zeros(len(q), n_blocks, dtype=torch.bool, device=q.device)
        if not n:
            return chosen
        border = torch.arange(n + 1, device=q.device) * n_blocks // n
        low, high = (x.expand(len(q), -1) for x in (border[:-1], border[1:]))
        while int((high - low).max()) > 1:
            middle = (low + high + 1) // 2
            low, high = torch.cat([low, middle], 1), torch.cat([middle, high], 1)  # the later half of a single block is empty
            scores = self._scores(q, keys, (low + high) // 2, tables).masked_fill(high <= low, -torch.inf)
            best = scores.topk(n, -1).indices
            low, high = low.gather(1, best), high.gather(1, best)
        return chosen.scatter_(1, low, True)

    def _scores(self, q: Tensor, keys: Tensor, block: Tensor, tables: RopeTables) -> Tensor:
        """Largest product of queries with keys of each ``block`` ``[H, C]``; its first key stands for keys that the last block lacks.

        Only the keys that are looked at are rotated: of a longer text as many more as there are more halvings.
        """
        inside = torch.arange(0, self.block_tok, self.key_stride_tok, device=q.device)
        begin = (block * self.block_tok).clamp(max=keys.shape[1] - 1)[..., None]
        token = torch.where(begin + inside < keys.shape[1], begin + inside, begin).flatten(1)
        rows = Rows(keys, "searched keys").gather(token.view(len(keys), -1)).view(*token.shape, -1)
        products = q @ at_positions(rows, self.plan.sink_tok + token, tables).mT
        return products.amax(1).unflatten(1, (-1, len(inside))).amax(-1)
