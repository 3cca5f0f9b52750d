"""Keys or values of all heads as rows of one matrix, so that one ``index_select`` gathers for every head."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.rope import RopeTable, paired


class Rows:
    """Tokens ``[K, T, D]`` as rows ``[*, D]``: a view, if every head's tokens lie one after the other."""

    def __init__(self, x: Tensor):
        K, T, D = x.shape
        if x.stride(2) != 1 or x.stride(1) != D or x.stride(0) % D:
            x = x.contiguous()
        head = x.stride(0) // D
        self.n_tok = T
        self.rows = x.as_strided(((K - 1) * head + T, D), (D, 1))
        self.heads = head * torch.arange(K, device=x.device)  # the row of each head's first token
        self.buffer = self.rows[:0]

    def gather(self, token: Tensor, heads: slice = slice(None)) -> Tensor:
        """Rows ``[K, ..., D]`` at ``token`` ``[K or 1, ...]``, in memory that the next call uses again."""
        row = token + self.heads[heads].view(-1, *[1] * (token.ndim - 1))
        n_rows, width = row.numel(), self.rows.shape[1]
        if len(self.buffer) < n_rows:
            self.buffer = self.rows.new_empty(n_rows, width)
        return torch.index_select(self.rows, 0, row.flatten(), out=self.buffer[:n_rows]).view(*row.shape, width)


class KeyRows(Rows):
    """Raw keys in fp32; if they will be rotated (``table``), as complex numbers (see :func:`hipexp_kernels.rope.paired`).

    ``once``: all keys are converted now, otherwise each time what was gathered.
    """

    def __init__(self, k: Tensor, table: RopeTable | None, once: bool):
        self.table, self.once = table, once
        super().__init__(self.convert(k) if once else k)

    def convert(self, x: Tensor) -> Tensor:
        """Any keys or queries ``[..., D]`` in that form."""
        return x.float() if self.table is None else paired(x.float(), self.table)

    def gather(self, token: Tensor, heads: slice = slice(None)) -> Tensor:
        keys = super().gather(token, heads)
        return keys if self.once else self.convert(keys)
