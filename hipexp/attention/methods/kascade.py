"""Kascade's reuse across layers (arXiv 2512.16391): anchor layers look at every key, those behind them take over what they chose.

An anchor selects, for each block of queries and each key/value head, the keys with the most attention; which layers are anchors the paper
finds by their likeness on sample texts, here they are given. The first layer is dense. Heads take over the list of the same head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hipexp_kernels.paged import whole

from hipexp.attention.logits import block_mass, chosen_blocks, keep_best
from hipexp.attention.method import EVERYTHING, Call, SelectingMethod
from hipexp.attention.selection import Selection
from hipexp.config.schema import ConfigError, PruneRope


@dataclass
class Kascade(SelectingMethod):
    """``anchors``: layers that select; ``keep_tok``: keys kept; ``query_tok``: queries of a prompt that share a list."""

    anchors: list[int] = field(default_factory=lambda: [1, 5, 9, 13, 17, 21, 25, 29])
    keep_tok: int = 2048
    query_tok: int = 128

    budgets = ("keep_tok",)

    def check(self) -> None:
        if not self.anchors or min(self.anchors) < 1 or sorted(set(self.anchors)) != self.anchors:
            raise ConfigError(f"pipeline.params.anchors={self.anchors} must be layers from 1 on, ascending; try [1,5,9]")

    @property
    def query_block_tok(self) -> int:
        return self.query_tok

    @property
    def anchor(self) -> int:
        """The layer whose selection this one uses; 0 if there is none before it."""
        return max((layer for layer in self.anchors if layer <= self.plan.layer), default=0)

    def block(self, decoding: bool) -> int:
        return 1

    def keep(self, decoding: bool) -> int:
        return self.keep_tok if self.anchor else EVERYTHING

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return kv_heads * n_tok if self.plan.layer == self.anchor else 0

    def select(self, call: Call) -> Selection:
        key = self.anchor, call.decoding or call.queries.start
        if self.plan.layer == self.anchor:
            call.shared[key] = self._chosen(call)
        if key not in call.shared:
            raise ValueError(f"layer {self.plan.layer} takes over what layer {self.anchor} selected, which did not see these tokens")
        return call.shared[key]

    def _chosen(self, call: Call) -> Selection:
        sink_tok, marked = self.plan.sink_tok, []
        for first, mass in block_mass(call, PruneRope.native, 0):
            far = mass.unflatten(0, (len(whole(call.keys)), -1)).sum(1)[:, sink_tok : max(sink_tok, first - self.plan.window_tok + 1)]
            marked.append(keep_best(far, self.keep_tok))
        return chosen_blocks(marked, 1, sink_tok)
