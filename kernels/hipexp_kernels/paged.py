"""Keys or values that are not all on the device, as operations read them in place of a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import torch
from torch import Tensor


class Paged(ABC):
    """Keys or values of a sequence, ``shape`` ``[K, T, D]``, of which some are elsewhere until they are asked for.

    What is asked for is what a tensor in their place would have given, number for number. ``vectorized`` implementations ask for rows as
    they need them; ``reference`` ones ask for everything.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def gather(self, token: Tensor, heads: slice, out: Tensor) -> Tensor:
        """Write the rows at ``token`` ``[k or 1, ...]`` of ``k`` heads into ``out`` ``[k, ..., D]`` (contiguous), and return it."""

    @abstractmethod
    def run(self, begin: int, end: int) -> Tensor:
        """The rows ``[K, end - begin, D]`` of tokens that follow each other, on the device: a view where they lie there side by side."""

    @abstractmethod
    def by(self, reader: str) -> Paged:
        """The same, for a ``reader`` whose traffic is counted by itself."""


KV: TypeAlias = Tensor | Paged


def run_of(x: KV, begin: int, end: int) -> Tensor:
    """Rows ``[K, end - begin, D]`` of tokens that follow each other."""
    return x.run(begin, end) if isinstance(x, Paged) else x[:, begin:end]


def read_by(x: KV, reader: str) -> KV:
    """The same keys or values, read by ``reader``: where somebody counts, it is told apart."""
    return x.by(reader) if isinstance(x, Paged) else x


def whole(x: KV) -> Tensor:
    """All rows as a tensor."""
    return run_of(x, 0, x.shape[1])
