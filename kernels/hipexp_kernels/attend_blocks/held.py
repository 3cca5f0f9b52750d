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
        end = begin + keys.shape[1]
        if number not in self._rows or self._rows[number][0].shape[1] < end:
            with torch.inference_mode(False):  # usable within and outside
                self._rows[number] = [x.new_empty(x.shape[0], room, x.shape[2]) for x in (keys, values)]
        for held, new in zip(self._rows[number], (keys, values), strict=True):
            held[:, begin:end] = new
        self._counts[number] = end

    def rows(self, number: int, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` keys and values of a list."""
        keys, values = self._rows[number]
        return keys[:, :n], values[:, :n]

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for pair in self._rows.values() for x in pair)
