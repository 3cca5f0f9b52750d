"""H2O (arXiv 2306.14048): decode keeps the keys that got most attention so far and the newest ones; the others are gone for good.

A prompt is read densely. Every key's attention is summed over all queries, and over the heads that share it. Before each decode step, of
the keys that have left the window only those with the largest sums stay; later queries add to the sums of what they still see.

Each key/value head has its own keys, whatever ``heads`` says; attention is summed by true positions, whatever ``rope.attend`` says. A
sequence whose keys are gone reads no further prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from hipexp_kernels.paged import whole
from torch import Tensor

from hipexp.attention.logits import KeySums, at_positions, chosen_blocks, keep_best, query_logits
from hipexp.attention.method import EVERYTHING, Call, Contract, SelectingMethod
from hipexp.attention.selection import Selection


@dataclass
class H2O(SelectingMethod):
    """``keep_tok``: heavy hitters kept; the pipeline's ``window_tok`` are the newest, the query's own among them."""

    keep_tok: int = 2048

    budgets = ("keep_tok",)
    remembers = True
    splits = True
    exceptions: ClassVar = {
        Contract.growing: "what a decode step does not keep is gone, so it matters whether the tokens before it were read or decoded",
    }

    def keep(self, decoding: bool) -> int:
        return self.keep_tok if decoding else EVERYTHING

    def new_state(self) -> KeySums:
        return KeySums()

    def observe(self, call: Call) -> None:
        """Evict, then add what the queries give; the sum of a key that is gone is -inf."""
        sums, keys = call.state.grown(whole(call.keys)), whole(call.keys)
        if call.decoding:
            far = self._far(sums, call)
            far.masked_fill_(~keep_best(far, self.keep_tok), -torch.inf)
        elif bool((sums == -torch.inf).any()):
            raise ValueError("h2o has let keys of this sequence go, and a prompt would have to be read densely; begin a new sequence")
        keys = at_positions(keys, 0, call.tables)
        for n in range(len(call.queries)):
            begin, q = call.queries.existing(n)
            end = begin + q.shape[1]
            logits = query_logits(call, q, keys[:, :end], begin, None).unflatten(0, (len(keys), -1))
            if call.decoding:
                logits.masked_fill_(sums[:, None, None, :end] == -torch.inf, -torch.inf)
            sums[:, :end] += logits.softmax(-1).sum((1, 2))

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0  # the sums are far smaller than keys

    def select(self, call: Call) -> Selection:
        return chosen_blocks([self._far(call.state.sums, call) > -torch.inf], 1, self.plan.sink_tok)

    def _far(self, sums: Tensor, call: Call) -> Tensor:
        """Those of keys between sinks and window."""
        return sums[:, self.plan.sink_tok : max(self.plan.sink_tok, call.queries.start - self.plan.window_tok + 1)]
