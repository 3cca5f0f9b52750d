"""Score every candidate chunk of a pruning stage for a block of queries."""

from __future__ import annotations

from torch import Tensor

from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.paged import KV, whole
from hipexp_kernels.rope import ScoreRotation
from hipexp_kernels.score_chunks.reference import score_chunks as reference
from hipexp_kernels.score_chunks.vectorized import score_chunks as vectorized
from hipexp_kernels.summarize import Summaries

REPRESENTATIVES = ("descent", "grid", "exact", "bounds")


def score_chunks(
    q: Tensor,
    k: KV,
    starts: Tensor,
    counts: Tensor,
    limits: Tensor,
    *,
    chunk_tok: int,
    representative: str = "descent",
    rotation: ScoreRotation | None = None,
    summaries: Summaries | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return ``[K, N, C]`` fp32 scores, ``-inf`` where a row has no such chunk.

    ``q`` ``[H, N, R, D]``: raw pooled queries. ``k`` ``[K, T, D]``: raw keys, a tensor or
    :class:`hipexp_kernels.paged.Paged`. Chunk ``c`` of block ``n`` holds the tokens
    from ``starts[s, n, c]`` on, ``chunk_tok`` of them but none at or after ``limits[n]`` or ``T``; only the first
    ``counts[s, n]`` are candidates. ``starts`` is ``[S, N, C]``, or ``[1, 1, C]`` if all blocks look at the same list.
    ``rotation`` says how positions become angles; None leaves queries and keys as they are. The score of a chunk is the best over
    the query heads of a key/value head.

    ``descent``: a chunk is halved until one token is left; the centres of both halves are probed (best dot product over
    the rows), the better half stays (ties: right), for every query head by itself; the score is the best probe on the path
    (InfiniteHiP, arXiv 2502.08910, algorithm 1, with centres as in HiP, arXiv 2406.09827). A chunk of one token is probed as a
    right half.
    ``grid``: the best of 8 evenly spaced tokens (of 16 from chunks of 256 on, in general as many as a descent probes; all, if there are
    no more), each the centre of its part of the chunk, or the last token of a chunk that ends before it. Probed as right halves.
    ``exact``: the best token of the chunk, probed as a right half.
    ``bounds``: the best landmark of ``summaries`` (see :func:`hipexp_kernels.summarize`) in the chunk, probed as a right half; no key is
    read. No chunk is cut short, each begins where a piece does, and no piece is missing. For summaries without ``first_tok`` the chunks
    follow each other without gaps from their first token on, and ``starts`` is ``[1, 1, C]``. Strategies that give the tokens of a chunk
    different positions are refused.
    Products are in fp32; on a GPU all but those of a descent of one row are in the number format of ``k``, summed in fp32.
    ``chunk_tok`` is a power of two. Raises ``ValueError`` if it is not, and on shapes that do not match.
    """
    H, N, _, D = q.shape
    S = starts.shape[0]
    require(
        len(k.shape) == 3 and k.shape[-1] == D and H % k.shape[0] == 0,
        f"score_chunks: k {tuple(k.shape)} does not go with q {tuple(q.shape)}",
    )
    require(S in (1, k.shape[0]) and starts.shape[1] in (1, N), f"score_chunks: starts {tuple(starts.shape)} do not go with {N} blocks")
    require(
        counts.shape == (S, N) and limits.shape == (N,),
        f"score_chunks: counts {tuple(counts.shape)} and limits {tuple(limits.shape)} must be {(S, N)} and {(N,)}",
    )
    require(chunk_tok > 0 and chunk_tok & (chunk_tok - 1) == 0, f"score_chunks: chunk_tok={chunk_tok} must be a power of two")
    require(representative in REPRESENTATIVES, f"representative={representative!r} is unknown; use {' or '.join(REPRESENTATIVES)}")
    if representative == "bounds":
        _require_summaries(k, starts, chunk_tok, rotation, summaries)
    require(
        rotation is None or rotation.mode in ScoreRotation.MODES,
        f"score rotation {rotation and rotation.mode!r} is unknown; use {', '.join(ScoreRotation.MODES)}",
    )
    run = choose(impl, {"reference": reference, "vectorized": vectorized, "triton": lazy("score_chunks")}, q.device)
    k = whole(k) if run is reference else k
    return run(q, k, starts, counts, limits, chunk_tok=chunk_tok, representative=representative, rotation=rotation, summaries=summaries)


def _require_summaries(k: KV, starts: Tensor, chunk_tok: int, rotation: ScoreRotation | None, summaries: Summaries | None) -> None:
    require(summaries is not None, "score_chunks: representative='bounds' needs summaries")
    assert summaries is not None
    (K, _, D), C, (rows, piece_tok) = k.shape, starts.shape[2], (summaries.rows, summaries.piece_tok)
    require(chunk_tok % piece_tok == 0, f"score_chunks: pieces of {piece_tok} tokens do not make up chunks of {chunk_tok}")
    listed = summaries.first_tok is not None
    require(
        rows.ndim == 4 and (rows.shape[0], *rows.shape[2:]) == (K, 2, D) and (listed or rows.shape[1] * piece_tok >= C * chunk_tok),
        f"score_chunks: summaries {tuple(rows.shape)} do not go with k {tuple(k.shape)} and {C} chunks of {chunk_tok // piece_tok} pieces",
    )
    require(
        listed or starts.shape[:2] == (1, 1),
        f"score_chunks: representative='bounds' needs starts [1, 1, C] where summaries have no first_tok, not {tuple(starts.shape)}",
    )
    require(
        rotation is None or rotation.mode in ScoreRotation.ONE_ANGLE_A_CHUNK,
        f"score_chunks: representative='bounds' does not go with score rotation {rotation and rotation.mode!r}, which turns the tokens "
        f"of a chunk by different angles; use {', '.join(ScoreRotation.ONE_ANGLE_A_CHUNK)}",
    )
