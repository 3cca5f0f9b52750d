"""RoPE strategies: which positions queries and keys get while chunks are scored (InfiniteHiP, arXiv 2502.08910, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hipexp_kernels.rope import RopeTable, ScoreRotation
from torch import Tensor

from hipexp.attention.blocks import QueryBlocks
from hipexp.config.schema import PruneRope

CosSin = Callable[[Tensor], tuple[Tensor, Tensor]]


class RopeTables:
    """cos and sin by position, taken from a model's own rotary module and grown on demand.

    ``cos_sin(positions [n])`` returns cos and sin ``[n, R/2]``; scaled variants (llama3, linear, YaRN with its attention
    factor) are thereby inherited. ``trained_tok`` is the trained length of the model.
    """

    def __init__(self, cos_sin: CosSin, trained_tok: int):
        self.cos_sin, self.trained_tok = cos_sin, trained_tok
        self._tables: list[RopeTable] = []  # outgrown ones too: a CUDA graph may still read them

    def upto(self, rows: int) -> RopeTable:
        """A table with at least ``rows`` positions, starting from 0."""
        if not self._tables or self._tables[-1].cos.shape[0] < rows:
            rows = max(4096, 1 << (rows - 1).bit_length())
            cos, sin = self.cos_sin(torch.arange(rows))
            self._tables.append(RopeTable(cos.float().contiguous(), sin.float().contiguous()))
        return self._tables[-1]


MODES = {PruneRope.chunk_indexed: "rank"}  # of ScoreRotation, where the name differs


def score_rotation(
    strategy: PruneRope, tables: RopeTables, position: Tensor, n_chunks: int, queries: QueryBlocks, scan_window_tok: int
) -> ScoreRotation | None:
    """How chunks are scored for blocks of ``queries`` under a strategy; None: nothing is rotated.

    ``position`` ``[N, R]``: position of each pooled query. ``n_chunks``: the length of the longest list. The table holds every
    position that can be asked for: a probed key lies before its block.
    """
    if strategy is PruneRope.none:
        return None
    rows = {PruneRope.relative: 2, PruneRope.infllm: 1, PruneRope.chunk_indexed: n_chunks + 1}.get(strategy)
    table = tables.upto(queries.end if rows is None else scan_window_tok + rows)
    mode = MODES.get(strategy, strategy.value)
    return ScoreRotation(mode, table, tables.trained_tok, scan_window_tok, position, queries.first, queries.last)
