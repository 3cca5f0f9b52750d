"""Plain statement of block-sparse attention: one query at a time, its keys as a list, in fp32."""

import torch
from torch import Tensor

from hipexp_kernels.rope import AttendRotation, rotate


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, *,
    block_tok: int, sink_tok: int, window_tok: int, scale: float, rotation: AttendRotation | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, N, Q, _ = q.shape
    K, T, _ = k.shape
    out, lse = torch.zeros_like(q), torch.full((H, N, Q), float("-inf"))
    for h in range(H):
        s = h * len(blocks) // H
        for n in range(N):
            start = int(first[n])
            edge = start - window_tok
            for r in range(min(Q, T - start)):
                position = start + r
                if exact[n]:
                    far, near = [], list(range(position + 1))
                else:
                    chosen = [int(b) + t for b in blocks[s, n, : counts[s, n]] for t in range(block_tok)]
                    far = [i for i in range(sink_tok) if i <= edge] + [i for i in chosen if i <= edge]
                    near = list(range(max(0, edge + 1), position + 1))
                tokens = torch.tensor(far + near)
                query, keys = q[h, n, r].float(), k[h // (H // K), tokens].float()
                if rotation is not None:
                    query, keys = _rotated(
                        rotation, query, keys, tokens, position, start, start + Q - 1, len(far), window_tok, bool(exact[n])
                    )
                logits = keys @ query * scale
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                out[h, n, r] = (torch.softmax(logits, 0) @ v[h // (H // K), tokens].float()).to(q.dtype)
                lse[h, n, r] = torch.logsumexp(logits, 0)
    return out, lse


def _rotated(
    rotation: AttendRotation,
    query: Tensor,
    keys: Tensor,
    tokens: Tensor,
    position: int,
    first: int,
    last: int,
    n_far: int,
    window_tok: int,
    exact: bool,
):
    if exact:
        rotation = AttendRotation("native", rotation.table, rotation.trained_tok)
    n_near_first = min(window_tok, first + 1)  # a window that reaches back to token 0 is shorter
    at = rotation.query(torch.tensor(position), first, n_far, n_near_first)
    factor = rotation.keys(tokens, first, last, n_far, window_tok)
    return rotate(query, rotation.table.cos[at], rotation.table.sin[at]), rotate(keys, factor.real, factor.imag)
