"""Summarize keys, piece by piece, once: what a stage with ``representative="bounds"`` reads instead of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.summarize.reference import OUTLIER_SHARE
from hipexp_kernels.summarize.reference import summarize as reference
from hipexp_kernels.summarize.vectorized import summarize as vectorized

COARSE_SHARE = 0.25  # of the way to the farthest key, from the mean of a piece that is made of pieces: that mean is shorter, so is this
FLOATS = 1 << 24  # of landmarks in flight while coarser ones are made


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


def coarsen(rows: Tensor, *, times: int) -> Tensor:
    """Return the landmarks ``[K, P // times, 2, D]`` of pieces that each are ``times`` of those of ``rows`` ``[K, P, 2, D]``.

    The first is the mean. The second lies ``COARSE_SHARE`` of the way from it to the farthest of the keys that the smaller pieces had
    as theirs (ties: the first), which is where their second landmark points. Computed in fp32.
    """
    require(rows.ndim == 4 and rows.shape[2] == 2, f"coarsen: rows {tuple(rows.shape)} must be [key/value heads, pieces, 2, dimension]")
    require(times > 0, f"coarsen: times={times} must be at least 1")
    K, P, _, D = rows.shape
    pieces = rows[:, : P // times * times].unflatten(1, (P // times, times))
    out = rows.new_empty(K, P // times, 2, D)
    step = max(1, FLOATS // max(1, K * times * 2 * D))
    for p in range(0, P // times, step):
        means, seconds = pieces[:, p : p + step].float().unbind(3)
        mean = means.mean(2, keepdim=True)
        deviation = means + (seconds - means) / OUTLIER_SHARE - mean
        farthest = torch.linalg.vector_norm(deviation, dim=-1).argmax(2)[..., None, None].expand(-1, -1, 1, D)
        out[:, p : p + step, :1] = mean
        out[:, p : p + step, 1:] = mean + COARSE_SHARE * deviation.gather(2, farthest)
    return out
