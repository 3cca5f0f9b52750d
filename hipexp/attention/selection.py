"""The outcome of pruning, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Blocks that the final attention reads besides sinks and window.

    ``blocks`` ``[S, N, M]``: ascending, unique starts, -1 padded, none inside the sink; ``counts`` ``[S, N]``. ``S`` is 1 if all
    heads share the list, else the number of key/value heads. Blocks may overlap the window as it was when they
    were selected: the attention clips them to the tokens before the window.
    """

    blocks: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, n_blocks: int, device: torch.device | str = "cpu") -> Selection:
        """Nothing selected for ``n_blocks`` query blocks."""
        return cls(torch.full((1, n_blocks, 0), -1, device=device), torch.zeros(1, n_blocks, dtype=torch.int64, device=device))

    def after_none(self, n_exact: int) -> Selection:
        """The same selection behind ``n_exact`` query blocks without one."""
        if not n_exact:
            return self
        S, _, M = self.blocks.shape
        return Selection(
            torch.cat([self.blocks.new_full((S, n_exact, M), -1), self.blocks], 1),
            torch.cat([self.counts.new_zeros(S, n_exact), self.counts], 1),
        )
