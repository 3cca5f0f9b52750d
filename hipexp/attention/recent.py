"""The newest queries of one sequence in one layer, for decode steps that score chunks with more than their own."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp.attention.blocks import QueryBlocks


class RecentQueries:
    """The ``size`` newest raw queries, each at its position modulo ``size``; of a shorter sequence some of them several times.

    The memory is made once, and written and read by positions that the device knows, so that it serves CUDA graphs of decode steps.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._q: Tensor | None = None  # [H, size, D]
        self._at = torch.empty(0)  # positions [size]

    def note(self, queries: QueryBlocks) -> None:
        """Note the newest of ``queries``, which follow those that were noted before."""
        q = queries.rows(queries.q)[:, -self.size :]
        at = queries.first if queries.step else torch.arange(queries.end - q.shape[1], queries.end, device=q.device)
        if self._q is None:
            with torch.inference_mode(False):  # usable within and outside
                self._q, self._at = q.new_empty(q.shape[0], self.size, q.shape[2]), at.new_empty(self.size)
            self._q.copy_(q[:, -1:])
            self._at.copy_(at[-1:])
        self._q.index_copy_(1, at % self.size, q)
        self._at.index_copy_(0, at % self.size, at)

    def newest(self, n: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """The ``n`` newest queries ``[H, 1, n, D]``, in no order, and their positions ``[1, n]``; ``last`` ``[1]``: that of the newest."""
        assert self._q is not None, "noted before"
        if n == self.size:
            return self._q[:, None], self._at[None]
        places = (last - torch.arange(n, device=last.device)) % self.size
        return self._q.index_select(1, places)[:, None], self._at.index_select(0, places)[None]

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._q is None else self._q.nbytes + self._at.nbytes
