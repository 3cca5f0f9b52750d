"""Queries cut into blocks on a grid that is fixed to the sequence, so that results do not depend on how prefill is cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where a decode step stands, as the device reads it: ``numbers`` ``[3]``, its position, how many first candidates there are, and
    whether it attends to everything (1 or 0).

    A CUDA graph of decode steps reads the same tensor in every replay; whoever replays it writes the numbers before.
    """

    numbers: Tensor

    @classmethod
    def at(cls, position: int, n_candidates: int, exact: bool, device: torch.device) -> Step:
        """The step of the token at ``position``."""
        return cls(torch.tensor([position, n_candidates, exact], device=device))

    @property
    def position(self) -> Tensor:
        """``[1]``"""
        return self.numbers[:1]

    @property
    def n_candidates(self) -> Tensor:
        """``[1, 1]``"""
        return self.numbers[1:2, None]

    @property
    def exact(self) -> Tensor:
        """``[1]``"""
        return self.numbers[2:]


@dataclass(frozen=True)
class QueryBlocks:
    """Queries ``[H, N, size, D]`` of consecutive blocks; block ``n`` begins at position ``start + n * size``, a multiple of ``size``.

    Rows before ``begin`` or from ``end`` on do not exist (:meth:`cut` leaves such rows in the first and the last block only).
    ``step``: of a decode step, what the device reads in place of ``start`` (see :class:`Step`).
    """

    q: Tensor
    start: int
    size: int
    begin: int
    end: int
    step: Step | None = None

    @classmethod
    def cut(cls, q: Tensor, begin: int, size: int) -> QueryBlocks:
        """Cut queries ``q`` ``[H, Q, D]`` at positions ``begin``, ``begin + 1``, …; missing rows are zero."""
        H, Q, D = q.shape
        start, end = begin // size * size, begin + Q
        n_blocks = -(-(end - start) // size)
        padded = q
        if start < begin or start + n_blocks * size > end:
            padded = q.new_zeros(H, n_blocks * size, D)
            padded[:, begin - start : end - start] = q
        return cls(padded.view(H, n_blocks, size, D), start, size, begin, end)

    @classmethod
    def one(cls, q: Tensor, position: int, step: Step) -> QueryBlocks:
        """The query ``[H, 1, D]`` of a decode step, which stands at ``position`` or, in a CUDA graph, no later."""
        return cls(q[:, None], position, 1, position, position + 1, step)

    def __len__(self) -> int:
        return self.q.shape[1]

    @cached_property
    def first(self) -> Tensor:
        """First position of each block ``[N]``."""
        if self.step:
            return self.step.position
        return self.start + self.size * torch.arange(len(self), device=self.q.device)

    @property
    def last(self) -> Tensor:
        """Last position of each block on the grid ``[N]``, whether a query exists there or not."""
        return self.first + (self.size - 1) if self.size > 1 else self.first

    def within(self, length: int) -> int:
        """How many of the blocks, from the first on, end before position ``length``."""
        return min(len(self), max(0, (length - self.start) // self.size))

    def existing(self, n: int) -> tuple[int, Tensor]:
        """Of the ``n``-th block the position of its first query that exists, and all that do ``[H, R, D]``."""
        first = self.start + n * self.size
        begin, end = max(first, self.begin), min(first + self.size, self.end)
        return begin, self.q[:, n, begin - first : end - first]

    def rows(self, out: Tensor) -> Tensor:
        """Undo :meth:`cut` for an output ``[H, N, size, D]``: ``[H, Q, D]``."""
        skip = self.begin - self.start
        return out.flatten(1, 2)[:, skip : skip + self.end - self.begin]

    def from_block(self, n: int) -> QueryBlocks:
        """The blocks from the ``n``-th on."""
        if not n:
            return self
        start = self.start + n * self.size
        return QueryBlocks(self.q[:, n:], start, self.size, min(self.end, max(self.begin, start)), self.end)

    def split(self, size: int) -> QueryBlocks:
        """The same queries in smaller blocks; those that would begin past the end are left out."""
        H, N, _, D = self.q.shape
        n = min(N * self.size // size, -(-(self.end - self.start) // size))
        return QueryBlocks(self.q.reshape(H, -1, size, D)[:, :n], self.start, size, self.begin, self.end)

    def pool(self, stride: int) -> tuple[Tensor, Tensor]:
        """Mean (fp32) of every ``stride`` neighbouring queries that exist ``[H, N, size/stride, D]``, and the position of the first.

        Where every query stands for itself they are returned as they are.
        A group without any query repeats the nearest one that has some: a maximum over rows is not changed by that.
        """
        H, N, size, D = self.q.shape
        if self.step:
            return self.q, self.first[:, None]
        R = size // stride
        at = self.first[:, None] + torch.arange(0, size, stride, device=self.q.device)
        complete = self.begin <= self.start and self.start + N * size <= self.end
        if complete and stride == 1:
            return self.q, at
        groups = self.q.view(H, N, R, stride, D)
        if complete:
            return groups.mean(3, dtype=torch.float32), at
        total = groups.sum(3, dtype=torch.float32)  # rows that do not exist are zero
        member = at[..., None] + torch.arange(stride, device=self.q.device)
        exists = (member >= self.begin) & (member < self.end)
        pooled = total / exists.sum(-1).clamp(min=1)[..., None]
        filled = exists.any(-1)
        index = torch.arange(R, device=self.q.device).expand(N, R)
        low = torch.where(filled, index, R).amin(1, keepdim=True).clamp(max=R - 1)
        high = torch.where(filled, index, -1).amax(1, keepdim=True).clamp(min=0)
        nearest = torch.maximum(torch.minimum(index, high), low)
        return pooled.gather(2, nearest[None, ..., None].expand(H, N, R, D)), at.gather(1, nearest)
