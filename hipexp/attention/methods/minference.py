"""MInference's vertical-slash heads (arXiv 2407.02490) in prefill; decode is dense.

The last ``last_tok`` queries of what is read at once attend to all keys. The keys that get most of that attention (verticals) and the
distances that do (slashes) are then read by every query. A block of queries reads the union of what its queries would, and all of itself.
Blocks that end before the smaller of both numbers see everything, and have no say. Every part of a prompt has its own verticals and
slashes, and all heads have as many; the paper reads prompts in one piece, and searches a pattern and its size for each head.
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
from hipexp.config.schema import ConfigError


@dataclass
class MInference(SelectingMethod):
    """``verticals`` and ``slashes``: how many are kept, among them the first ``first_tok`` keys and the ``near_tok`` least distances."""

    verticals: int = 1000
    slashes: int = 6096
    last_tok: int = 64
    first_tok: int = 30
    near_tok: int = 100

    budgets = ("verticals", "slashes")
    per_head = True
    splits = True
    exceptions: ClassVar = {
        Contract.causal: "the last queries decide what all queries before them attend to",
        Contract.chunked: "the last queries of every part decide for that part",
    }

    def check(self) -> None:
        for name, most, of in (("first_tok", self.verticals, "verticals"), ("near_tok", self.slashes, "slashes")):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(
                    f"pipeline.params.{name}={getattr(self, name)} must be from 0 to params.{of}={most}, which it is a part of; "
                    f"try {min(30, max(0, most))}"
                )
        if self.last_tok < 1:
            raise ConfigError(f"pipeline.params.last_tok={self.last_tok} must be at least 1; try 64")

    def keep(self, decoding: bool) -> int:
        return EVERYTHING if decoding else self.verticals + self.slashes * self.query_block_tok

    def exact_tok(self, decoding: bool) -> int:
        return EVERYTHING if decoding else min(self.verticals, self.slashes)

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0  # decode is dense

    def select(self, call: Call) -> Selection:
        vertical, slash = self._found(call)
        size, plan = call.queries.size, self.plan
        reach = torch.nn.functional.max_pool1d(slash.float()[:, None], size, 1)[:, 0].bool()  # at x: a slash from x to x + size - 1
        marked = []
        for n in range(len(call.queries)):
            first = call.queries.start + n * size
            read = vertical[:, :first] | reach[:, 1 : first + 1].flip(1)  # key j lies first - j before the block
            marked.append(read[:, plan.sink_tok : max(plan.sink_tok, first - plan.window_tok + 1)])
        return chosen_blocks(marked, 1, plan.sink_tok)

    def _found(self, call: Call) -> tuple[Tensor, Tensor]:
        """Which keys ``[H, T]`` and which distances ``[H, T + block]`` are kept."""
        queries, keys = call.queries, whole(call.keys)
        end = queries.end
        begin = max(queries.begin, end - self.last_tok)
        q = queries.q.flatten(1, 2)[:, begin - queries.start : end - queries.start]
        logits = query_logits(call, q, at_positions(keys[:, :end], 0, call.tables), begin, None)
        mass = logits.softmax(-1)
        column = mass.sum(1)
        column[:, : self.first_tok] = torch.inf
        distance = (torch.arange(begin, end, device=q.device)[:, None] - torch.arange(end, device=q.device)).clamp(min=0)
        diagonal = torch.zeros_like(column).scatter_add_(1, distance.flatten().expand(len(q), -1), mass.flatten(1))
        diagonal[:, : self.near_tok] = torch.inf
        slash = keep_best(diagonal, self.slashes)
        return keep_best(column, self.verticals), torch.nn.functional.pad(slash, (0, queries.size))
