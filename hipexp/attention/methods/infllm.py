"""InfLLM (arXiv 2402.04617): blocks of the past, each found by a few representative keys, all at one distance from the query.

A key represents its block if the queries that followed it within the local window liked it: by the sum of its logits with them, at true
positions. A block's relevance is the sum of the logits of its representatives with all queries of a part of the prompt, as if one window
lay between. The most relevant blocks are attended to, with the first tokens, the local window, and what has left the window and fills no
block yet. Far keys count as lying one window away there too, under ``rope.attend: infllm``.

Representatives are of a key/value head, liked by all query heads that share it; under ``heads: shared`` all heads choose blocks together,
as in the authors' program (which takes shares of attention where the paper has logits). Queries that look up together share a window's
begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hipexp_kernels.paged import whole
from torch import Tensor

from hipexp.attention.across import sum_of_heads
from hipexp.attention.logits import KeySums, at_distance, at_positions, chosen_blocks, keep_best, query_logits
from hipexp.attention.method import Call, SelectingMethod
from hipexp.attention.selection import Selection
from hipexp.config.schema import Heads


class Likings(KeySums):
    """Sum of the logits of each key with the queries of the window behind it; ``stand_for`` ``[K, blocks, D]``: sums of representatives."""

    def __init__(self) -> None:
        super().__init__()
        self.stand_for = torch.empty(0, 0)

    @property
    def bytes(self) -> int:
        return self.sums.nbytes + self.stand_for.nbytes

    def add(self, q: Tensor, keys: Tensor, begin: int, window_tok: int, call: Call) -> None:
        """Queries ``q`` ``[H, R, D]`` at ``begin`` … have come."""
        end, low = begin + q.shape[1], max(0, begin - window_tok + 1)
        near = at_positions(keys[:, low:end], 0, call.tables)
        logits = query_logits(replace(call, softcap=None), q, near, begin - low, None)  # the paper's rule is of plain products
        distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(low, end, device=q.device)
        logits = logits.masked_fill((distance < 1) | (distance >= window_tok), 0)
        self.sums[:, low:end] += logits.sum(1).unflatten(0, (len(keys), -1)).sum(1)

    def represent(self, keys: Tensor, begin: int, block_tok: int, representatives: int) -> Tensor:
        """Sums of representatives of the blocks ``[K, n, D]`` from ``begin`` on that ``keys`` hold; all queries that count have come."""
        there = self.stand_for.shape[1]
        new = keys[:, begin + there * block_tok :].float().unflatten(1, (-1, block_tok))
        liked = self.sums[:, begin + there * block_tok : keys.shape[1]].unflatten(1, (-1, block_tok))
        new = (new * keep_best(liked, representatives)[..., None]).sum(2)
        self.stand_for = torch.cat([self.stand_for, new], 1) if there else new
        return self.stand_for


@dataclass
class InfLLM(SelectingMethod):
    """``block_tok``: of a block; ``keep_blocks``: how many are attended to; ``representatives``: keys that stand for a block (the paper's
    r_k); ``query_tok``: queries of a prompt that look blocks up together. The local window is the pipeline's ``window_tok``."""

    block_tok: int = 128
    keep_blocks: int = 16
    representatives: int = 4
    query_tok: int = 512

    linear = True
    budgets = ("keep_blocks",)
    remembers = True
    splits = True

    def keep(self, decoding: bool) -> int:
        return (self.keep_blocks + 1) * self.block_tok  # and what fills no block yet

    def new_state(self) -> Likings:
        return Likings()

    def observe(self, call: Call) -> None:
        call.state.grown(whole(call.keys))
        for n in range(len(call.queries)):
            begin, q = call.queries.existing(n)
            call.state.add(q, whole(call.keys), begin, self.plan.window_tok, call)

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return kv_heads * self.representatives * n_tok / self.block_tok

    def select(self, call: Call) -> Selection:
        plan, keys, queries, size = self.plan, whole(call.keys), call.queries, self.block_tok
        left = [max(0, first - plan.window_tok + 1 - plan.sink_tok) for first in queries.first.tolist()]  # tokens behind the window
        stand_for = call.state.represent(keys[:, : plan.sink_tok + left[-1] // size * size], plan.sink_tok, size, self.representatives)
        marked = []
        for n in range(len(queries)):
            asked = at_distance(queries.q[:, n].float().sum(1), plan.window_tok, call.tables)  # rows that do not exist are zero
            relevance = torch.einsum("kgd,knd->kn", asked.unflatten(0, (len(keys), -1)), stand_for[:, : left[n] // size])
            relevance = relevance if plan.heads is Heads.per_kv else sum_of_heads(relevance, call.processes)
            best = keep_best(relevance, self.keep_blocks)
            marked.append(torch.cat([best, best.new_ones(len(best), 1)], 1) if left[n] % size else best)
        return chosen_blocks(marked, size, plan.sink_tok)
