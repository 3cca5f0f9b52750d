"""Keep the best chunks of a list, in the order of the list, and cut them for the next stage."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.keep_top.reference import keep_top as reference
from hipexp_kernels.keep_top.vectorized import keep_top as vectorized


def keep_top(
    scores: Tensor,
    starts: Tensor,
    counts: Tensor,
    limits: Tensor,
    *,
    keep: int,
    lists: int,
    chunk_tok: int,
    next_tok: int,
    out: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the starts ``[lists, N, M]`` (ascending, -1 padded) of what is kept of every list, and how many there are ``[lists, N]``.

    ``scores`` ``[K, N, C]`` of the chunks of ``chunk_tok`` tokens that begin at ``starts`` (``[S, N, C]`` or ``[1, 1, C]``), of which the
    first ``counts[s, n]`` take part (``S`` is 1 or K). ``lists`` is 1 if all heads share one, made by their best scores, or K. The
    ``keep`` best chunks of each list stay, all if there are no more; ties go to the lower index. Each is cut into pieces of
    ``next_tok`` tokens (a divisor of ``chunk_tok``; the same leaves it whole); pieces that begin at or past ``limits[n]`` are left
    out. ``M`` is ``min(keep, C) * (chunk_tok // next_tok)``. ``out``: an earlier result that is not needed any more, other tensors than the
    arguments; it is written over and returned if shapes and number formats are the same.

    A score that is not a number means that a query or a key is not finite: ``FloatingPointError``, except on a GPU, where nothing
    waits to look; there such a chunk counts as the best, so that what is attended to holds it if later stages keep it. Raises
    ``ValueError`` on a negative ``keep``, other ``lists`` and shapes that do not match.
    """
    require(
        scores.ndim == starts.ndim == 3 and starts.shape[1] in (1, scores.shape[1]) and starts.shape[2] == scores.shape[2],
        f"keep_top: scores {tuple(scores.shape)} do not go with starts {tuple(starts.shape)}",
    )
    K, N, _ = scores.shape
    require(
        starts.shape[0] in (1, K) and counts.shape == (starts.shape[0], N) and limits.shape == (N,),
        f"keep_top: scores {tuple(scores.shape)} do not go with counts {tuple(counts.shape)} and limits {tuple(limits.shape)}",
    )
    require(keep >= 0, f"keep_top: keep={keep} must not be negative")
    require(lists in (1, K) and lists >= starts.shape[0], f"keep_top: lists={lists} must be 1 or {K}, not below those of the starts")
    require(next_tok > 0 and chunk_tok % next_tok == 0, f"keep_top: next_tok={next_tok} must divide chunk_tok={chunk_tok}")
    run = choose(impl, {"reference": reference, "vectorized": vectorized, "triton": lazy("keep_top")}, scores.device)
    if run in (reference, vectorized):
        _refuse_nan(scores, counts)
    shapes = (lists, N, min(keep, scores.shape[2]) * (chunk_tok // next_tok)), (lists, N)
    if out and any(o.shape != shape or o.dtype != starts.dtype or not o.is_contiguous() for o, shape in zip(out, shapes, strict=True)):
        out = None
    return run(scores, starts, counts, limits, keep=keep, lists=lists, chunk_tok=chunk_tok, next_tok=next_tok, out=out)


def _refuse_nan(scores: Tensor, counts: Tensor) -> None:
    nan = scores.isnan()
    if bool(nan.any()) and bool((nan & (torch.arange(scores.shape[-1], device=scores.device) < counts[..., None])).any()):
        raise FloatingPointError("keep_top: a score is NaN, so no chunk is better than another; a query or a key is not finite")
