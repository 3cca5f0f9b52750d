"""Summaries of one sequence's keys in one layer, for stages with ``representative: bounds``."""

from __future__ import annotations

import torch
from hipexp_kernels import Summaries, coarsen, summarize
from hipexp_kernels.paged import KV, run_of
from torch import Tensor

PIECE_TOK = 64  # tokens of a piece, where chunks are not smaller


class KeySummaries:
    """Landmarks of whole pieces; every piece is summarized once, when it is first asked for after its last key was appended.

    Keys are read for the smallest pieces only: larger ones are made from their landmarks.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Rows] = {}  # by tokens of a piece
        self._grid = (0, 0)

    def upto(self, k: KV, first_tok: int, piece_tok: int, larger_tok: int | None = None) -> Summaries:
        """Of all whole pieces of ``piece_tok`` keys of ``k`` ``[K, T, D]``, which has grown at its end only, from ``first_tok`` on.

        ``larger_tok``: of pieces of so many keys instead, a multiple of ``piece_tok``, made from the landmarks of those.
        Raises ValueError for another ``first_tok`` or ``piece_tok`` than before.
        """
        if self._levels and self._grid != (first_tok, piece_tok):
            begin, size = self._grid
            raise ValueError(f"keys were summarized in pieces from {begin} by {size} tokens; one cache serves one pipeline")
        self._grid = first_tok, piece_tok
        level = self._levels.setdefault(piece_tok, _Rows())
        n_pieces = max(0, (k.shape[1] - first_tok) // piece_tok)
        if not level.made or n_pieces > level.n_pieces:
            begin, end = (first_tok + n * piece_tok for n in (level.n_pieces, n_pieces))
            level.append(summarize(run_of(k, begin, end), piece_tok=piece_tok))
        if larger_tok is None or larger_tok == piece_tok:
            return Summaries(level.upto(n_pieces), piece_tok, first_tok)
        larger, times = self._levels.setdefault(larger_tok, _Rows()), larger_tok // piece_tok
        n_larger = n_pieces // times
        if not larger.made or n_larger > larger.n_pieces:
            larger.append(coarsen(level.upto(n_larger * times)[:, larger.n_pieces * times :], times=times))
        return Summaries(larger.upto(n_larger), larger_tok, first_tok)

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(level.bytes for level in self._levels.values())


class _Rows:
    """Landmarks ``[K, n_pieces, 2, D]`` of pieces of one size, with room for more."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self.n_pieces = 0

    @property
    def made(self) -> bool:
        """Whether anything was appended, be it of no pieces."""
        return self._rows is not None

    def upto(self, n_pieces: int) -> Tensor:
        """Those of the first pieces."""
        assert self._rows is not None
        return self._rows[:, :n_pieces]

    @property
    def bytes(self) -> int:
        return 0 if self._rows is None else self._rows.numel() * self._rows.element_size()

    def append(self, new: Tensor) -> None:
        """Those of the pieces that follow."""
        n_pieces = self.n_pieces + new.shape[1]
        if self._rows is None or self._rows.shape[1] < n_pieces:
            capacity = n_pieces if self._rows is None else n_pieces + n_pieces // 2
            rows = torch.empty(new.shape[0], capacity, *new.shape[2:], dtype=new.dtype, device=new.device)
            if self._rows is not None:
                rows[:, : self.n_pieces] = self._rows[:, : self.n_pieces]
            self._rows = rows
        self._rows[:, self.n_pieces : n_pieces] = new
        self.n_pieces = n_pieces
