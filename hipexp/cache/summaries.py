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
        self._room_tok = self._known_tok = 0

    def reserve(self, room_tok: int) -> None:
        """Make room for ``room_tok`` keys, once and for all: a CUDA graph reads the same memory in all its replays.

        From now on :meth:`upto` is asked for all that room, however many keys there are; :meth:`catch_up` says how many.
        """
        self._room_tok = room_tok
        for size, level in self._levels.items():
            level.reserve(self._n_pieces(room_tok, size))

    def catch_up(self, k: KV, n_tok: int) -> None:
        """Under :meth:`reserve`: the first ``n_tok`` keys of ``k`` ``[K, room, D]`` are there; summarize what was not."""
        self._known_tok = n_tok
        for size in list(self._levels):
            self.upto(k, *self._grid, size)

    def upto(self, k: KV, first_tok: int, piece_tok: int, larger_tok: int | None = None) -> Summaries:
        """Of all whole pieces of ``piece_tok`` keys of ``k`` ``[K, T, D]``, which has grown at its end only, from ``first_tok`` on.

        ``larger_tok``: of pieces of so many keys instead, a multiple of ``piece_tok``, made from the landmarks of those.
        Raises ValueError for another ``first_tok`` or ``piece_tok`` than before.
        """
        if self._levels and self._grid != (first_tok, piece_tok):
            begin, size = self._grid
            raise ValueError(f"keys were summarized in pieces from {begin} by {size} tokens; one cache serves one pipeline")
        self._grid = first_tok, piece_tok
        level = self._level(piece_tok)
        n_tok = self._known_tok if self._room_tok else k.shape[1]
        n_pieces = self._n_pieces(n_tok, piece_tok)
        if not level.made or n_pieces > level.n_pieces:
            begin, end = (first_tok + n * piece_tok for n in (level.n_pieces, n_pieces))
            level.append(summarize(run_of(k, begin, end), piece_tok=piece_tok))
        if larger_tok is None or larger_tok == piece_tok:
            return Summaries(level.upto(self._n_pieces(k.shape[1], piece_tok)), piece_tok, first_tok)
        larger, times = self._level(larger_tok), larger_tok // piece_tok
        n_larger = n_pieces // times
        if not larger.made or n_larger > larger.n_pieces:
            larger.append(coarsen(level.upto(n_larger * times)[:, larger.n_pieces * times :], times=times))
        return Summaries(larger.upto(self._n_pieces(k.shape[1], piece_tok) // times), larger_tok, first_tok)

    def _level(self, piece_tok: int) -> _Rows:
        if piece_tok not in self._levels:
            self._levels[piece_tok] = _Rows(self._n_pieces(self._room_tok, piece_tok))
        return self._levels[piece_tok]

    def _n_pieces(self, n_tok: int, piece_tok: int) -> int:
        """Whole pieces of so many keys."""
        return max(0, (n_tok - self._grid[0]) // piece_tok)

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(level.bytes for level in self._levels.values())


class _Rows:
    """Landmarks ``[K, n_pieces, 2, D]`` of pieces of one size, with room for more: for ``room`` pieces from the start."""

    def __init__(self, room: int) -> None:
        self._rows: Tensor | None = None
        self._room, self.n_pieces = room, 0

    def reserve(self, room: int) -> None:
        """Have room for so many pieces in all."""
        self._room = room
        if self._rows is not None:
            self._grow(self._rows[:, :0], room)

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
        self._grow(new, n_pieces if self._rows is None else n_pieces + n_pieces // 2, n_pieces)
        assert self._rows is not None
        self._rows[:, self.n_pieces : n_pieces] = new
        self.n_pieces = n_pieces

    def _grow(self, like: Tensor, capacity: int, needed: int | None = None) -> None:
        """Room for ``capacity`` pieces, unless there is enough for those that are ``needed``."""
        if self._rows is not None and self._rows.shape[1] >= (capacity if needed is None else needed):
            return
        rows = torch.empty(like.shape[0], max(capacity, self._room), *like.shape[2:], dtype=like.dtype, device=like.device)
        if self._rows is not None:
            rows[:, : self.n_pieces] = self._rows[:, : self.n_pieces]
        self._rows = rows
