"""Plain statement of the selection: sort by score, then by index; take the first; put them back in order; cut them."""

import torch
from torch import Tensor


def keep_top(
    scores: Tensor, starts: Tensor, counts: Tensor, limits: Tensor, *,
    keep: int, lists: int, chunk_tok: int, next_tok: int, out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    K, N, C = scores.shape
    S, starts = starts.shape[0], starts.expand(-1, N, C)
    found = torch.full((lists, N, min(keep, C) * (chunk_tok // next_tok)), -1, dtype=torch.int64)
    kept = torch.zeros(lists, N, dtype=torch.int64)
    for s in range(lists):
        heads, source = (range(K) if lists == 1 else [s]), min(s, S - 1)
        for n in range(N):
            row = [max(float(scores[h, n, c]) for h in heads) for c in range(int(counts[source, n]))]
            best = sorted(sorted(range(len(row)), key=lambda c: (-row[c], c))[:keep])
            pieces = [int(starts[source, n, c]) + piece for c in best for piece in range(0, chunk_tok, next_tok)]
            pieces = [start for start in pieces if start < limits[n]]
            found[s, n, : len(pieces)] = torch.tensor(pieces, dtype=torch.int64)
            kept[s, n] = len(pieces)
    return (out[0].copy_(found), out[1].copy_(kept)) if out else (found, kept)
