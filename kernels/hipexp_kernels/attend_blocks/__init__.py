"""Attention over sinks, selected blocks and a sliding window."""

from __future__ import annotations

from torch import Tensor

from hipexp_kernels.attend_blocks.held import Held
from hipexp_kernels.attend_blocks.reference import attend_blocks as reference
from hipexp_kernels.attend_blocks.vectorized import attend_blocks as vectorized
from hipexp_kernels.dispatch import choose, lazy, require
from hipexp_kernels.paged import KV, whole
from hipexp_kernels.rope import AttendRotation


def attend_blocks(
    q: Tensor,
    k: KV,
    v: KV,
    blocks: Tensor,
    counts: Tensor,
    first: Tensor,
    exact: Tensor,
    *,
    block_tok: int,
    sink_tok: int,
    window_tok: int,
    scale: float,
    rotation: AttendRotation | None = None,
    softcap: float | None = None,
    held: Held | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output ``[H, N, Q, D]`` and its log-sum-exp ``[H, N, Q]`` (fp32).

    ``q`` ``[H, N, Q, D]`` raw queries: row ``r`` of block ``n`` stands at position ``first[n] + r``; ``first[n] < T``, rows
    at or past ``T`` are padding, their output is undefined. ``k``, ``v`` ``[K, T, D]`` raw keys and values, both as
    tensors or both :class:`hipexp_kernels.paged.Paged`.
    ``blocks`` ``[S, N, M]``: ascending, unique starts of selected blocks of ``block_tok`` tokens, none below ``sink_tok``;
    the first ``counts[s, n]`` count. One list serves all heads (``S`` 1), or each key/value head (``K``) or query head (``H``) has its
    own. With ``edge = first[n] - window_tok`` a query at ``p`` attends to the sinks ``i < sink_tok, i <= edge``, the selected tokens
    ``i <= edge`` and the window ``edge < i <= p``: every key once.
    Blocks with ``exact[n]`` (bools, or ints) attend to all keys ``i <= p`` at their true positions instead.
    ``rotation`` says how positions become angles; None leaves queries and keys as they are (layers without RoPE).
    ``softcap`` bounds the logits to ``softcap * tanh(logit / softcap)``. ``held``: what the steps before made, which ``vectorized`` does
    not make again for one block of one query: the window's keys, and without ``rotation`` or with ``streaming`` sinks and the same
    selection; ``clear`` it when another is selected. The others need no such thing. Raises ``ValueError`` on shapes that do not match.
    """
    H, N, _, D = q.shape
    S = blocks.shape[0]
    require(
        k.shape == v.shape and len(k.shape) == 3 and k.shape[-1] == D and H % k.shape[0] == 0,
        f"attend_blocks: k {tuple(k.shape)} and v {tuple(v.shape)} do not go with q {tuple(q.shape)}",
    )
    require(
        S in (1, k.shape[0], H) and blocks.shape[1] == N and counts.shape == (S, N),
        f"attend_blocks: blocks {tuple(blocks.shape)} and counts {tuple(counts.shape)} do not go with {N} query blocks",
    )
    require(first.shape == exact.shape == (N,), f"attend_blocks: first {tuple(first.shape)} and exact {tuple(exact.shape)} must be {(N,)}")
    run = choose(impl, {"reference": reference, "vectorized": vectorized, "triton": lazy("attend_blocks")}, q.device)
    if run is reference:
        k, v = whole(k), whole(v)
    sizes = dict(block_tok=block_tok, sink_tok=sink_tok, window_tok=window_tok)
    more = dict(held=held) if run is vectorized else {}
    return run(q, k, v, blocks, counts, first, exact, **sizes, **more, scale=scale, rotation=rotation, softcap=softcap)
