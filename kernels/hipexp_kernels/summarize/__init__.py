"""Summarize keys, piece by piece, once: what a stage with ``representative="bounds"`` reads instead of keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.summarize.reference import summarize as reference
from hipexp_kernels.summarize.vectorized import summarize as vectorized


@dataclass(frozen=True)
class Summaries:
    """Landmarks ``rows`` ``[K, P, 2, D]`` of consecutive pieces of ``piece_tok`` keys.

    ``first_tok``: the first key of the first piece, for chunks from anywhere behind it. None: chunks follow each other without gaps from
    there on, so that landmarks are read in one stream.
    """

    rows: Tensor
    piece_tok: int
    first_tok: int | None = None


def summarize(k: Tensor, *, piece_tok: int, impl: str = "auto") -> Tensor:
    """Return two landmarks ``[K, T // piece_tok, 2, D]`` of every whole piece of ``piece_tok`` raw keys ``k`` ``[K, T, D]``, in its dtype.

    The first is the mean of the piece. The second lies ``OUTLIER_SHARE`` of the way from it to the key that is farthest from it (ties:
    the first such key): a token unlike its neighbours leaves a trace that the mean would have drowned, but does not outshine whole
    pieces that are alike. Both turn as keys do: the landmarks of rotated keys are the rotated landmarks, if all keys of a piece are
    rotated by one angle; and what is added to all keys is added to both. Computed in fp32.

    ``piece_tok`` is a power of two. Raises ``ValueError`` if it is not.
    """
    require(k.ndim == 3, f"summarize: k {tuple(k.shape)} must be [key/value heads, tokens, dimension]")
    require(piece_tok > 0 and piece_tok & (piece_tok - 1) == 0, f"summarize: piece_tok={piece_tok} must be a power of two")
    return choose(impl, {"reference": reference, "vectorized": vectorized, "triton": lazy("summarize")}, k.device)(k, piece_tok=piece_tok)
