"""Keys and values of one sequence in one layer, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp.cache.traffic import TrafficLog


class ResidentStore:
    """A growing pair of buffers ``[K, capacity, D]``; appending copies only what is new (capacity grows by half)."""

    def __init__(self) -> None:
        self.length, self.decoding = 0, False
        self.traffic = TrafficLog()  # stays empty
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append keys and values ``[K, n, D]``. Raises RuntimeError for what was begun in another autograd mode."""
        if self._k is not None and self._k.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError("this cache was begun under torch.inference_mode() and can only go on there; keep one mode per cache")
        new = self.length + k.shape[1]
        self._k, self._v = self._fitting(self._k, k, new), self._fitting(self._v, v, new)
        self._k[:, self.length : new] = k
        self._v[:, self.length : new] = v
        self.length = new

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[K, length, D]``, without a copy. Raises ValueError while nothing was appended."""
        if self._k is None or self._v is None:
            raise ValueError("the store is empty: append keys and values before viewing them")
        return self._k[:, : self.length], self._v[:, : self.length]

    @property
    def room(self) -> tuple[Tensor, Tensor]:
        """All there is room for, ``[K, capacity, D]``: keys and values, and behind ``length`` anything."""
        if self._k is None or self._v is None:
            raise ValueError("the store is empty: append keys and values before asking for its room")
        return self._k, self._v

    def write(self, position: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values ``[K, 1, D]`` of a token where ``position`` ``[1]`` says on the device; who does so sets ``length``."""
        for room, new in zip(self.room, (k, v), strict=True):
            room.index_copy_(1, position, new)

    def reserve(self, tokens: int, like: Tensor) -> None:
        """Make room for ``tokens`` in all; ``like`` ``[K, n, D]`` gives heads, dimension, dtype and device."""
        self._k, self._v = self._fitting(self._k, like, tokens, exact=True), self._fitting(self._v, like, tokens, exact=True)

    def settle(self) -> None:
        """Nothing is given up."""

    def close(self) -> None:
        """Give back everything."""
        self._k = self._v = None

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for x in (self._k, self._v) if x is not None)

    def _fitting(self, buffer: Tensor | None, like: Tensor, tokens: int, exact: bool = False) -> Tensor:
        if buffer is not None and buffer.shape[1] >= tokens:
            return buffer
        grown = like.new_empty(like.shape[0], tokens if exact or buffer is None else tokens + tokens // 2, like.shape[2])
        if buffer is not None:
            grown[:, : self.length] = buffer[:, : self.length]
        return grown
