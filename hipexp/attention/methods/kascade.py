"""Kascade's reuse across layers (arXiv 2512.16391): anchor layers look at every key, those behind them take over what they chose.

An anchor selects, for each tile of queries and each key/value head, the keys with the most attention: after the softmax, summed over the
tile and the heads that share them. The first layer is dense, and may be an anchor all the same. Which layers are anchors the paper finds by
their likeness on sample texts, and likewise whose list a head takes over; here anchors are given and a head takes over that of the same
head. The paper keeps a tenth of the length and the tile itself; here as many as other methods, with sinks and window.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hipexp_kernels.paged import whole

from hipexp.attention.logits import block_mass, chosen_blocks, keep_best
from hipexp.attention.method import EVERYTHING, Call, SelectingMethod
from hipexp.attention.selection import Selection
from hipexp.config.schema import ConfigError, PruneRope


@dataclass
class Kascade(SelectingMethod):
    """``anchors``: layers that select, by default those for Llama 3.1 8B; ``keep_tok``: keys kept; ``query_tok``: queries of a tile."""

    anchors: list[int] = field(default_factory=lambda: [0, 2, 8, 13, 14])
    keep_tok: int = 2048
    query_tok: int = 32

    budgets = ("keep_tok",)
    splits = True

    def check(self) -> None:
        if not self.anchors or min(self.anchors) < 0 or sorted(set(self.anchors)) != self.anchors:
            raise ConfigError(f"pipeline.params.anchors={self.anchors} must be layers from 0 on, ascending; try [0,2,8]")
        for name in ("keep_tok", "query_tok"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pipeline.params.{name}={getattr(self, name)} must be at least 1; try {getattr(Kascade, name)}")

    @property
    def anchor(self) -> int | None:
        """The layer whose selection this one uses; None if there is none before it."""
        return max((layer for layer in self.anchors if layer <= self.plan.layer), default=None)

    @property
    def takes_from(self) -> int | None:
        return None if self.plan.layer in (0, self.anchor) else self.anchor

    def keep(self, decoding: bool) -> int:
        return EVERYTHING if self.plan.layer == 0 or self.anchor is None else self.keep_tok

    def observe(self, call: Call) -> None:
        """Select if this is an anchor, for the blocks that later layers have no room for; only the last selection is kept."""
        if self.plan.layer != self.anchor:
            return
        n_exact = call.queries.within(self.plan.sink_tok + self.plan.window_tok + self.keep_tok)
        if n_exact < len(call.queries):
            queries = call.queries.from_block(n_exact)
            call.shared[Kascade, self.anchor] = queries.start, self._chosen(replace(call, queries=queries))

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return kv_heads * n_tok if self.plan.layer == self.anchor else 0

    def select(self, call: Call) -> Selection:
        start, chosen = call.shared.get((Kascade, self.anchor), (None, None))
        if chosen is None or start != call.queries.start:
            raise ValueError(f"layer {self.plan.layer} takes over what layer {self.anchor} selected, which did not see these tokens")
        return chosen

    def _chosen(self, call: Call) -> Selection:
        sink_tok, marked = self.plan.sink_tok, []
        for first, mass in block_mass(call, PruneRope.native, 0):
            far = mass.unflatten(0, (len(whole(call.keys)), -1)).sum(1)[:, sink_tok : max(sink_tok, first - self.plan.window_tok + 1)]
            marked.append(keep_best(far, self.keep_tok))
        return chosen_blocks(marked, 1, sink_tok)
