"""Keys or values that are not all on the device, as operations read them in place of a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where keys or values of a sequence lie on the device, those that are there.

    From token ``begin`` on they are in ``newest`` ``[K, room, D]``, the others by units in ``slots`` ``[n, K / lists, unit_tok, D]``.
    Rows lie side by side in both. Units of keys (``which`` 0) and of values (1) are numbered ``(unit * lists + list) * 2 + which``,
    where ``lists`` is 1 or K. The first ``n_sinks`` numbers have the slots from ``sinks`` on, the others those of ``table``
    ``[numbers - n_sinks]``, int32, which knows the numbers of all tokens before ``begin``; below 0 stands for those that are not there.
    """

    slots: Tensor
    table: Tensor
    newest: Tensor
    begin: int
    which: int
    lists: int
    n_sinks: int
    sinks: int


class Paged(ABC):
    """Keys or values of a sequence, ``shape`` ``[K, T, D]``, of which some are elsewhere until they are asked for.

    What is asked for is what a tensor in their place would have given, number for number. ``vectorized`` implementations ask for rows as
    they need them; ``reference`` ones ask for everything; ``triton`` ones know what they will read, have it brought, and read it there.
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
    def bring(self, begin: Tensor, end: Tensor, *others: Paged, past: bool = False) -> tuple[Places, ...] | None:
        """Have the tokens of some runs on the device, all at once, and say where: of these, and of ``others`` of the same sequence.

        ``begin`` and ``end`` ``[k or 1, n]``: the runs of every head, or of all; empty where ``end`` is not above ``begin``. Good until
        anything else is asked for. None, and nothing happens, if there is no room for so many; ``past`` the cache there is.
        """

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


T = TypeVar("T")
Box = tuple[tuple[int, int], ...]  # a range along each of some axes


def in_parts(sizes: tuple[int, ...], bring: Callable[[Box, bool], T | None]) -> Iterator[tuple[Box, T]]:
    """Cut a box of ``sizes`` into parts for which ``bring`` finds room on the device, and give each with what it returned.

    What has no room is halved, first along the first axis; ``bring(part, True)`` of a part that cannot be halved returns no None.
    """
    waiting: list[Box] = [tuple((0, n) for n in sizes)]
    while waiting:
        part = waiting.pop()
        axis = next((i for i, (begin, end) in enumerate(part) if end - begin > 1), None)
        found = bring(part, axis is None)
        if found is not None:
            yield part, found
            continue
        assert axis is not None
        begin, end = part[axis]
        middle = (begin + end) // 2
        waiting += [(*part[:axis], half, *part[axis + 1 :]) for half in ((middle, end), (begin, middle))]
