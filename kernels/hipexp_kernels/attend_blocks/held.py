"""Keys and values that a decode step attends to as the one before did."""

from __future__ import annotations

import torch
from torch import Tensor


class Held:
    """Rotated keys, and values, of sinks and selected blocks of one sequence in one layer, for as long as its selection stays.

    Between two selections the tokens before the window keep their places, and only grow at their end: the window moves on and leaves
    tokens of selected blocks behind. ``clear`` it whenever something else is selected.
    """

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}  # by number of the list: keys and values [K, room, D]
        self._counts: dict[int, int] = {}

    def clear(self) -> None:
        """Forget all rows; their memory is used again."""
        self._counts.clear()

    def count(self, number: int) -> int:
        """How many rows of a list are held."""
        return self._counts.get(number, 0)

    def add(self, number: int, keys: Tensor, values: Tensor, room: int) -> None:
        """Hold ``keys`` and ``values`` ``[K, n, D]`` behind those that are held, of which there will never be more than ``room``."""
        begin = self.count(number)
        end, pair = begin + keys.shape[1], (keys, values)
        if begin == 0 and not self._fits(number, pair, room):
            with torch.inference_mode(False):  # usable within and outside
                self._rows[number] = [torch.empty(x.shape[0], room, x.shape[2], dtype=x.dtype, device=x.device) for x in pair]
        if end > self._rows[number][0].shape[1]:
            raise ValueError(f"{end} rows of a list are more than the {self._rows[number][0].shape[1]} there was room for; clear it first")
        for held, new in zip(self._rows[number], pair, strict=True):
            held[:, begin:end] = new
        self._counts[number] = end

    def _fits(self, number: int, pair: tuple[Tensor, Tensor], room: int) -> bool:
        held = self._rows.get(number, ())
        return bool(held) and all(
            (x.shape[0], x.shape[2], x.dtype, x.device) == (h.shape[0], h.shape[2], h.dtype, h.device) and h.shape[1] >= room
            for x, h in zip(pair, held, strict=True)
        )

    def rows(self, number: int, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` keys and values of a list."""
        keys, values = self._rows[number]
        return keys[:, :n], values[:, :n]

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for pair in self._rows.values() for x in pair)
