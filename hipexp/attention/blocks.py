"""Queries cut into blocks on a grid that is fixed to the sequence, so that results do not depend on how prefill is cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryBlocks:
    """Queries ``[H, N, size, D]`` of consecutive blocks; block ``n`` starts at position ``first[n]``, a multiple of ``size``.

    Rows before ``begin`` or from ``end`` on do not exist (:meth:`cut` leaves such rows in the first and the last block only).
    """

    q: Tensor
    first: Tensor
    size: int
    begin: int
    end: int

    @classmethod
    def cut(cls, q: Tensor, begin: int, size: int) -> QueryBlocks:
        """Cut queries ``q`` ``[H, Q, D]`` at positions ``begin``, ``begin + 1``, …; missing rows are zero."""
        H, Q, D = q.shape
        grid, end = begin // size * size, begin + Q
        n_blocks = -(-(end - grid) // size)
        padded = q
        if grid < begin or grid + n_blocks * size > end:
            padded = q.new_zeros(H, n_blocks * size, D)
            padded[:, begin - grid : end - grid] = q
        first = grid + size * torch.arange(n_blocks, device=q.device)
        return cls(padded.view(H, n_blocks, size, D), first, size, begin, end)

    @property
    def last(self) -> Tensor:
        """Last position of each block on the grid ``[N]``, whether a query exists there or not."""
        return self.first + self.size - 1

    def rows(self, out: Tensor) -> Tensor:
        """Undo :meth:`cut` for an output ``[H, N, size, D]``: ``[H, Q, D]``."""
        skip = self.begin - int(self.first[0])
        return out.flatten(1, 2)[:, skip : skip + self.end - self.begin]

    def from_block(self, n: int) -> QueryBlocks:
        """The blocks from the ``n``-th on."""
        begin = max(self.begin, int(self.first[n])) if n < len(self.first) else self.end
        return QueryBlocks(self.q[:, n:], self.first[n:], self.size, begin, self.end)

    def split(self, size: int) -> QueryBlocks:
        """The same queries in smaller blocks; those that would begin past the end are left out."""
        H, N, _, D = self.q.shape
        parts = self.size // size
        n = min(N * parts, -(-(self.end - int(self.first[0])) // size))
        first = (self.first[:, None] + size * torch.arange(parts, device=self.q.device)).flatten()
        return QueryBlocks(self.q.reshape(H, N * parts, size, D)[:, :n], first[:n], size, self.begin, self.end)

    def pool(self, stride: int) -> tuple[Tensor, Tensor]:
        """Mean (fp32) of every ``stride`` neighbouring queries that exist ``[H, N, size/stride, D]``, and the position of the first.

        A group without any query repeats the nearest one that has some: a maximum over rows is not changed by that.
        """
        H, N, size, D = self.q.shape
        R = size // stride
        at = self.first[:, None] + torch.arange(0, size, stride, device=self.q.device)
        total = self.q.float().view(H, N, R, stride, D).sum(3)  # rows that do not exist are zero
        if self.begin <= int(self.first[0]) and int(self.first[-1]) + size <= self.end:
            return total / stride, at
        member = at[..., None] + torch.arange(stride, device=self.q.device)
        exists = (member >= self.begin) & (member < self.end)
        pooled = total / exists.sum(-1).clamp(min=1)[..., None]
        filled = exists.any(-1)
        index = torch.arange(R, device=self.q.device).expand(N, R)
        low = torch.where(filled, index, R).amin(1, keepdim=True).clamp(max=R - 1)
        high = torch.where(filled, index, -1).amax(1, keepdim=True).clamp(min=0)
        nearest = torch.maximum(torch.minimum(index, high), low)
        return pooled.gather(2, nearest[None, ..., None].expand(H, N, R, D)), at.gather(1, nearest)
