"""RoPE strategies: which positions queries and keys get while chunks are scored (InfiniteHiP, arXiv 2502.08910, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hipexp_kernels.rope import KeyRotation, RopeTable, rotate
from torch import Tensor

from hipexp.config.schema import PruneRope

CosSin = Callable[[Tensor], tuple[Tensor, Tensor]]


class RopeTables:
    """cos and sin by position, taken from a model's own rotary module and grown on demand.

    ``cos_sin(positions [n])`` returns cos and sin ``[n, R/2]``; scaled variants (llama3, linear, YaRN with its attention
    factor) are thereby inherited. ``trained_tok`` is the trained length of the model.
    """

    def __init__(self, cos_sin: CosSin, trained_tok: int):
        self.cos_sin, self.trained_tok = cos_sin, trained_tok
        self._table: RopeTable | None = None

    def upto(self, rows: int) -> RopeTable:
        """A table with at least ``rows`` positions, starting from 0."""
        if self._table is None or self._table.cos.shape[0] < rows:
            rows = max(4096, 1 << (rows - 1).bit_length())
            cos, sin = self.cos_sin(torch.arange(rows))
            self._table = RopeTable(cos.float().contiguous(), sin.float().contiguous())
        return self._table


def score_rotation(
    strategy: PruneRope,
    tables: RopeTables,
    pooled: Tensor,
    position: Tensor,
    n_chunks: Tensor,
    first: Tensor,
    last: Tensor,
    scan_window_tok: int,
) -> tuple[Tensor, Tensor, KeyRotation | None]:
    """Rotate pooled queries ``[H, N, R, D]`` for the left and the right probe, and say how probed keys are rotated.

    ``position`` ``[N, R]``: position of each pooled query (that of its first member). ``n_chunks`` ``[S, N]``: candidates of each block
    (``S`` is 1, or the key/value heads if each has its own list).
    ``first``, ``last`` ``[N]``: the block's first and last position.

    | strategy        | query                               | key                 |
    |-----------------|-------------------------------------|---------------------|
    | `relative`      | scan window + 1 (left), + 0 (right) | 0: left raw         |
    | `infllm`        | scan window                         | 0: left raw         |
    | `chunk_indexed` | min(position, chunks + scan window) | rank of its chunk   |
    | `dynamic`       | position                            | squeezed position   |
    | `self_extend`   | position                            | grouped position    |
    | `native`        | position                            | position            |
    | `none`          | not rotated                         | not rotated         |
    """
    if strategy is PruneRope.none:
        return pooled, pooled, None
    if strategy in (PruneRope.relative, PruneRope.infllm):
        table = tables.upto(scan_window_tok + 2)
        right = _with_key_factor(rotate(pooled, table.cos[scan_window_tok], table.sin[scan_window_tok]), table)
        if strategy is PruneRope.infllm:
            return right, right, None
        left = _with_key_factor(rotate(pooled, table.cos[scan_window_tok + 1], table.sin[scan_window_tok + 1]), table)
        return left, right, None
    if strategy is PruneRope.chunk_indexed:
        position = torch.minimum(position, n_chunks[..., None] + scan_window_tok).repeat_interleave(len(pooled) // len(n_chunks), 0)
        table = tables.upto(int(n_chunks.max()) + scan_window_tok + 1)
        mode = "rank"
    else:
        table = tables.upto(int(position.max()) + 1)  # every probed key lies before a block
        mode = strategy.value
    rotated = rotate(pooled, table.cos[position], table.sin[position])
    return rotated, rotated, KeyRotation(mode, table, tables.trained_tok, first, last)


def _with_key_factor(query: Tensor, table: RopeTable) -> Tensor:
    """Give a rotated query the attention factor of its raw key too (cos of position 0 is the factor)."""
    factor = float(table.cos[0, 0])
    if factor != 1.0:
        query[..., : 2 * table.cos.shape[1]] *= factor
    return query
