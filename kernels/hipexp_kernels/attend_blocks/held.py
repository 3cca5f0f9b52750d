"""Keys and values that a decode step attends to as the one before did."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NOTHING = torch.empty(0, 0, 0)


class Held:
    """What decode steps of one sequence in one layer attend to again: sinks and selected blocks, and the window, keys rotated.

    Between two selections the tokens before the window keep their places, and only grow at their end: the window moves on and leaves
    tokens of selected blocks behind. ``clear`` them whenever something else is selected. Of the window's keys only the distance to the
    query counts, so they are rotated as if the sequence began at its origin, one token of it, and stay when the selection changes.

    ``sinks``: as many first rows of every list stay as well.
    """

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}  # by number of the list: keys and values [K, room, D]
        self._counts: dict[int, int] = {}
        self._window = NOTHING  # keys [K, room, D] of the tokens from origin to end
        self._origin = self._end = self._lists = 0
        self.sinks = 0

    def serve(self, lists: int) -> None:
        """Hold rows of so many lists; of another number, whose lists are of other heads, none stay."""
        if lists != self._lists:
            self._counts.clear()
            self._lists = lists

    def clear(self) -> None:
        """Forget the selected blocks, and what lies behind ``sinks`` rows; their memory is used again."""
        self._counts = {number: min(count, self.sinks) for number, count in self._counts.items()}

    def count(self, number: int) -> int:
        """How many rows of a list are held."""
        return self._counts.get(number, 0)

    def reserve(self, number: int, like: Tensor, room: int) -> None:
        """Make room for so many rows of a list, of the heads and in the format of ``like`` ``[K, n, D]``.

        Rows that are held in memory that does not fit are forgotten.
        """
        held = self._rows.get(number, [NOTHING, NOTHING])
        self._rows[number] = [_with_room(old, like, room) for old in held]
        if any(old is not now for old, now in zip(held, self._rows[number], strict=True)):
            self._counts[number] = 0

    def grow(self, number: int, n: int) -> tuple[Tensor, Tensor]:
        """Memory for ``n`` more keys and values ``[K, n, D]`` of a list, to be written now. Raises ValueError beyond what was reserved."""
        begin, end = self.count(number), self.count(number) + n
        keys, values = self._rows[number]
        if end > keys.shape[1]:
            raise ValueError(f"{end} rows of a list are more than the {keys.shape[1]} that were reserved")
        self._counts[number] = end
        return keys[:, begin:end], values[:, begin:end]

    def rows(self, number: int, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` keys and values of a list."""
        keys, values = self._rows[number]
        return keys[:, :n], values[:, :n]

    def window(self, begin: int, end: int, room: int, make: Callable[[int, int, int], Tensor]) -> tuple[Tensor, int]:
        """Keys ``[K, end - begin, D]`` of the window from token ``begin`` to ``end``, and its origin.

        ``make(origin, begin, end)`` rotates those of some tokens. A step that follows the last one adds its own token; any other makes all
        anew, as does one for which ``room`` tokens from the origin on are not enough.
        """
        if not (self._origin <= begin <= self._end == end - 1 and end - self._origin <= self._window.shape[1]):
            self._origin = self._end = begin
        new, at = make(self._origin, self._end, end), self._end - self._origin
        if at == 0:
            self._window = _with_room(self._window, new, room)
        self._window[:, at : at + new.shape[1]] = new
        self._end = end
        return self._window[:, begin - self._origin : end - self._origin], self._origin

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(x.numel() * x.element_size() for x in (self._window, *(x for pair in self._rows.values() for x in pair)))


def _with_room(held: Tensor, like: Tensor, room: int) -> Tensor:
    """``held``, or new memory ``[K, room, D]`` if that does not fit rows such as ``like``."""
    fits = (held.shape[0], held.shape[2], held.dtype, held.device) == (like.shape[0], like.shape[2], like.dtype, like.device)
    if fits and held.shape[1] >= room:
        return held
    with torch.inference_mode(False):  # usable within and outside
        return torch.empty(like.shape[0], room, like.shape[2], dtype=like.dtype, device=like.device)
