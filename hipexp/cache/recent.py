"""The newest keys and values of one sequence in one layer: all that a sliding window sees."""

from __future__ import annotations

from torch import Tensor

from hipexp.cache.traffic import TrafficLog


class RecentStore:
    """Keeps what the next token sees besides itself, ``keep_tok`` tokens, and what was appended last.

    Room is for twice as much, so that a token is moved once in ``keep_tok`` decode steps.
    """

    def __init__(self, keep_tok: int):
        self.keep_tok = keep_tok
        self.length, self.decoding = 0, False
        self.traffic = TrafficLog()  # stays empty
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._end = 0  # of what is kept, in the buffers
        self._kept = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append keys and values ``[K, n, D]``; of those before them the newest ``keep_tok`` stay."""
        n, stay = k.shape[1], min(self._kept, self.keep_tok)
        first = self._end - stay
        if self._k is None or self._v is None or self._end + n > self._k.shape[1]:
            room = max(2 * self.keep_tok, stay + n)
            self._k, self._v = (_moved(old, new, first, stay, room) for old, new in ((self._k, k), (self._v, v)))
            self._end = stay
        self._k[:, self._end : self._end + n] = k
        self._v[:, self._end : self._end + n] = v
        self._end += n
        self._kept = stay + n
        self.length += n

    def view(self) -> tuple[Tensor, Tensor]:
        """The kept keys and values ``[K, n, D]``, without a copy. Raises ValueError while nothing was appended."""
        if self._k is None or self._v is None:
            raise ValueError("the store is empty: append keys and values before viewing them")
        return self._k[:, self._end - self._kept : self._end], self._v[:, self._end - self._kept : self._end]

    def reserve(self, tokens: int, like: Tensor) -> None:
        """Nothing to do: it never grows with the text."""

    def settle(self) -> None:
        """Nothing is given up."""

    def close(self) -> None:
        """Give back everything."""
        self._k = self._v = None

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in (self._k, self._v) if x is not None)


def _moved(old: Tensor | None, new: Tensor, first: int, n: int, room: int) -> Tensor:
    """A buffer with ``room`` that begins with ``n`` tokens of ``old`` from ``first`` on; ``old`` itself where they do not overlap."""
    if old is not None and old.shape[1] == room and first >= n:
        old[:, :n] = old[:, first : first + n]
        return old
    made = new.new_empty(new.shape[0], room, new.shape[2])
    if old is not None:
        made[:, :n] = old[:, first : first + n]
    return made
