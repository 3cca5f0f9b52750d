"""Summaries of one sequence's keys in one layer, for stages with ``representative: bounds``."""

from __future__ import annotations

import torch
from hipexp_kernels import Summaries, summarize
from hipexp_kernels.paged import KV, run_of
from torch import Tensor

PIECE_TOK = 64  # tokens of a piece, where chunks are not smaller


class KeySummaries:
    """Landmarks of whole pieces; every piece is summarized once, when it is first asked for after its last key was appended."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._n_pieces = 0
        self._grid = (0, 0)

    def upto(self, k: KV, first_tok: int, piece_tok: int) -> Summaries:
        """Of all whole pieces of ``piece_tok`` keys of ``k`` ``[K, T, D]``, which has grown at its end only, from ``first_tok`` on.

        Raises ValueError for another ``first_tok`` or ``piece_tok`` than before.
        """
        if self._rows is not None and self._grid != (first_tok, piece_tok):
            begin, size = self._grid
            raise ValueError(f"keys were summarized in pieces from {begin} by {size} tokens; one cache serves one pipeline")
        self._grid = first_tok, piece_tok
        n_pieces = max(0, (k.shape[1] - first_tok) // piece_tok)
        if self._rows is None or n_pieces > self._n_pieces:
            begin, end = (first_tok + n * piece_tok for n in (self._n_pieces, n_pieces))
            new = summarize(run_of(k, begin, end), piece_tok=piece_tok)
            self._append(new, n_pieces)
        assert self._rows is not None
        return Summaries(self._rows[:, :n_pieces], piece_tok, first_tok)

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._rows is None else self._rows.numel() * self._rows.element_size()

    def _append(self, new: Tensor, n_pieces: int) -> None:
        if self._rows is None or self._rows.shape[1] < n_pieces:
            capacity = n_pieces if self._rows is None else n_pieces + n_pieces // 2
            rows = torch.empty(new.shape[0], capacity, *new.shape[2:], dtype=new.dtype, device=new.device)
            if self._rows is not None:
                rows[:, : self._n_pieces] = self._rows[:, : self._n_pieces]
            self._rows = rows
        self._rows[:, self._n_pieces : n_pieces] = new
        self._n_pieces = n_pieces
