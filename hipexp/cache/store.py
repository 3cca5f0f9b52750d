"""What keeps the keys and values of one sequence in one layer, wherever they lie."""

from __future__ import annotations

from typing import Protocol

from hipexp_kernels.paged import KV
from torch import Tensor

from hipexp.cache.traffic import TrafficLog


class KVStore(Protocol):
    """Keys and values that only grow. ``length``: tokens so far; ``decoding``: whether what is appended and read now is a decode step."""

    length: int
    decoding: bool
    traffic: TrafficLog

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append keys and values ``[K, n, D]``."""

    def view(self) -> tuple[KV, KV]:
        """All keys and values, ``[K, length, D]``; good until the next call of anything else. Raises ValueError while there are none."""

    def reserve(self, tokens: int, like: Tensor) -> None:
        """Say how many tokens there will be; ``like`` ``[K, n, D]`` gives heads, dimension, dtype and device."""

    def settle(self) -> None:
        """What was appended has been attended to: give up what only that needed."""

    def close(self) -> None:
        """The sequence is finished: give back everything. Twice is as good as once."""

    @property
    def bytes(self) -> int:
        """Bytes allocated on the device."""
