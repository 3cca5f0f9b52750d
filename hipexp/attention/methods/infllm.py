"""InfLLM (arXiv 2402.04617): blocks of the past, each found by a few representative keys, all at one distance from the query.

A key represents its block if the queries of the local window that followed it liked it: by the sum of its logits with them. A block's
relevance is the sum of the logits of its representatives with all queries of a part of the prompt; the most relevant blocks are attended
to, with the first tokens and the local window. Far keys count as lying one window away (``rope.attend: infllm``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels.paged import whole
from hipexp_kernels.rope import rotate
from torch import Tensor

from hipexp.attention.logits import at_positions, chosen_blocks, keep_best, query_logits
from hipexp.attention.method import Call, SelectingMethod
from hipexp.attention.selection import Selection
from hipexp.config.schema import Heads


class Likings:
    """Sum of the logits of each key with the queries of the window behind it, ``[K, T]`` in fp32."""

    def __init__(self) -> None:
        self.sums = torch.empty(0)

    @property
    def bytes(self) -> int:
        return self.sums.nbytes

    def add(self, q: Tensor, keys: Tensor, begin: int, window_tok: int, call: Call) -> None:
        """Queries ``q`` ``[H, R, D]`` at ``begin`` … have come."""
        end, low = begin + q.shape[1], max(0, begin - window_tok + 1)
        if self.sums.ndim < 2 or self.sums.shape[1] < end:
            sums = torch.zeros(len(keys), keys.shape[1], device=keys.device)
            if self.sums.ndim > 1:
                sums[:, : self.sums.shape[1]] = self.sums
            self.sums = sums
        near = at_positions(keys[:, low:end], 0, call.tables)
        logits = query_logits(q, near, begin - low, call.tables, call.scale, None)
        distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(low, end, device=q.device)
        logits = logits.masked_fill((distance < 1) | (distance >= window_tok), 0)
        self.sums[:, low:end] += logits.sum(1).unflatten(0, (len(keys), -1)).sum(1)


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

    @property
    def query_block_tok(self) -> int:
        return self.query_tok

    def block(self, decoding: bool) -> int:
        return self.block_tok

    def keep(self, decoding: bool) -> int:
        return (self.keep_blocks + 1) * self.block_tok  # and the block at the edge of the window

    def new_state(self) -> Likings:
        return Likings()

    def observe(self, call: Call) -> None:
        queries = call.queries
        for n in range(len(queries) if call.state is not None else 0):
            first = queries.start + n * queries.size
            begin, end = max(first, queries.begin), min(first + queries.size, queries.end)
            call.state.add(queries.q[:, n, begin - first : end - first], whole(call.keys)[:, :end], begin, self.plan.window_tok, call)

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return kv_heads * self.representatives * n_tok / self.block_tok

    def select(self, call: Call) -> Selection:
        plan, keys, queries, size = self.plan, whole(call.keys), call.queries, self.block_tok
        likings = Likings() if call.state is None else call.state
        last = queries.start + (len(queries) - 1) * queries.size
        n_blocks = max(0, -(-(last - plan.window_tok + 1 - plan.sink_tok) // size))
        stand_for = self._representing(keys, likings.sums, n_blocks)
        table = call.tables.upto(plan.window_tok + 1)
        marked = []
        for n in range(len(queries)):
            first = queries.start + n * queries.size
            whole_blocks = max(0, first - plan.window_tok + 1 - plan.sink_tok) // size
            asked = rotate(queries.q[:, n].float().sum(1), table.cos[plan.window_tok], table.sin[plan.window_tok])
            relevance = torch.einsum("kgd,kcd->kc", asked.unflatten(0, (len(keys), -1)), stand_for)
            relevance = relevance if plan.heads is Heads.per_kv else relevance.sum(0, keepdim=True)
            block = torch.arange(n_blocks, device=keys.device)
            best = keep_best(relevance.masked_fill(block >= whole_blocks, -torch.inf), self.keep_blocks)
            edge = (block == whole_blocks) & (plan.sink_tok + block * size <= first - plan.window_tok)
            marked.append(best | edge)
        return chosen_blocks(marked, size, plan.sink_tok)

    def _representing(self, keys: Tensor, likings: Tensor, n_blocks: int) -> Tensor:
        """Sum of the representatives of each block ``[K, n_blocks, D]``."""
        begin, n = self.plan.sink_tok, n_blocks * self.block_tok
        part = torch.nn.functional.pad(keys[:, begin : begin + n].float(), (0, 0, 0, max(0, begin + n - keys.shape[1])))
        part = part.unflatten(1, (-1, self.block_tok))
        liked = likings[:, begin : begin + n] if likings.ndim > 1 else torch.zeros(len(keys), 0, device=keys.device)
        liked = torch.nn.functional.pad(liked, (0, n - liked.shape[1])).unflatten(1, (-1, self.block_tok))
        best = keep_best(liked, self.representatives)
        return (part * best[..., None]).sum(2)
