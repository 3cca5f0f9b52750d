"""Score every candidate chunk of a pruning stage for a block of queries."""

from __future__ import annotations

from torch import Tensor

from hipexp_kernels.dispatch import choose, require
from hipexp_kernels.rope import KeyRotation
from hipexp_kernels.score_chunks.reference import score_chunks as reference
from hipexp_kernels.score_chunks.vectorized import score_chunks as vectorized

REPRESENTATIVES = ("descent", "exact")


def score_chunks(
    q_left: Tensor,
    q_right: Tensor,
    k: Tensor,
    starts: Tensor,
    counts: Tensor,
    limits: Tensor,
    *,
    chunk_tok: int,
    representative: str = "descent",
    rotation: KeyRotation | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return ``[H, N, C]`` fp32 scores, ``-inf`` where a row has no such chunk.

    ``q_left``, ``q_right`` ``[H, N, R, D]``: rotated queries for the left and the right probe of a halving (the same
    tensor if the strategy makes no difference). ``k`` ``[K, T, D]``: raw keys. Chunk ``c`` of block ``n`` holds the tokens
    from ``starts[s, n, c]`` on, ``chunk_tok`` of them but none at or after ``limits[n]`` or ``T``; only the first
    ``counts[s, n]`` are candidates. ``starts`` is ``[S, N, C]``, or ``[1, 1, C]`` if all blocks look at the same list.
    ``rotation`` rotates the probed keys; None leaves them raw.

    ``descent``: a chunk is halved until one token is left; the centres of both halves are probed (best dot product over
    the rows), the better half stays (ties: right); the score is the best probe on the path (InfiniteHiP, arXiv
    2502.08910, algorithm 1, with centres as in HiP, arXiv 2406.09827). A chunk of one token is probed as a right half.
    ``exact``: the best token of the chunk, probed as a right half.
    ``chunk_tok`` is a power of two. Raises ``ValueError`` if it is not, and on shapes that do not match.
    """
    H, N, _, D = q_left.shape
    S = starts.shape[0]
    require(q_right.shape == q_left.shape, f"score_chunks: q_left {tuple(q_left.shape)} and q_right {tuple(q_right.shape)} differ")
    require(
        k.ndim == 3 and k.shape[-1] == D and H % k.shape[0] == 0,
        f"score_chunks: k {tuple(k.shape)} does not go with q {tuple(q_left.shape)}",
    )
    require(S in (1, k.shape[0]) and starts.shape[1] in (1, N), f"score_chunks: starts {tuple(starts.shape)} do not go with {N} blocks")
    require(
        counts.shape == (S, N) and limits.shape == (N,),
        f"score_chunks: counts {tuple(counts.shape)} and limits {tuple(limits.shape)} must be {(S, N)} and {(N,)}",
    )
    require(chunk_tok > 0 and chunk_tok & (chunk_tok - 1) == 0, f"score_chunks: chunk_tok={chunk_tok} must be a power of two")
    require(representative in REPRESENTATIVES, f"representative={representative!r} is unknown; use {' or '.join(REPRESENTATIVES)}")
    run = choose(impl, {"reference": reference, "vectorized": vectorized})
    limits = limits.clamp(max=k.shape[1])
    return run(q_left, q_right, k, starts, counts, limits, chunk_tok=chunk_tok, representative=representative, rotation=rotation)
