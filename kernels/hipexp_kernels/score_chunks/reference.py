"""Plain statement of chunk scoring: one head, one block, one chunk at a time, in fp32."""

from dataclasses import replace

import torch
from torch import Tensor

from hipexp_kernels.rope import ScoreRotation, rotate
from hipexp_kernels.score_chunks.probes import probe_step
from hipexp_kernels.summarize import Summaries


def score_chunks(
    q: Tensor, k: Tensor, starts: Tensor, counts: Tensor, limits: Tensor, *,
    chunk_tok: int, representative: str, rotation: ScoreRotation | None, summaries: Summaries | None,
) -> Tensor:  # fmt: skip
    (H, N, _, _), K = q.shape, k.shape[0]
    S, C, group = starts.shape[0], starts.shape[2], H // K
    starts, k = starts.expand(S, N, C), k.float()
    q_left, q_right = rotation.queries(q, counts) if rotation else (q.float(), q.float())
    scores = torch.full((K, N, C), float("-inf"))
    for h in range(H):
        s = h // group if S > 1 else 0
        for n in range(N):

            def probe(token: int, queries: Tensor, rank: int, h=h, n=n) -> float:
                return product(k[h // group, token], token, queries, rank, h, n)

            def product(key: Tensor, token: int, queries: Tensor, rank: int, h=h, n=n) -> float:
                if rotation and rotation.turns_keys:
                    at = int(position_of(rotation, token, rank, n))
                    key = rotate(key, rotation.table.cos[at], rotation.table.sin[at])
                return float((queries[h, n] @ key).max())

            for c in range(int(counts[s, n])):
                left = int(starts[s, n, c])
                right = min(left + chunk_tok, int(limits[n]), k.shape[1])
                if left >= right:
                    continue
                if representative == "descent":
                    score = descend(left, right, lambda t, q, c=c: probe(t, q, c), q_left, q_right)
                elif representative == "bounds":
                    assert summaries is not None
                    pieces = chunk_tok // summaries.piece_tok
                    piece = c * pieces if summaries.first_tok is None else (left - summaries.first_tok) // summaries.piece_tok
                    landmarks = summaries.rows[h // group, piece : piece + pieces].flatten(0, 1).float()
                    score = max(product(landmark, left, q_right, c) for landmark in landmarks)
                else:
                    step = probe_step(representative, chunk_tok)
                    tokens = (min(left + offset + step // 2, right - 1) for offset in range(0, chunk_tok, step))
                    score = max(probe(token, q_right, c) for token in tokens)
                scores[h // group, n, c] = max(scores[h // group, n, c], score)
    return scores


def position_of(rotation: ScoreRotation, token: int, rank: int, n: int) -> Tensor:
    """Position of one probed token for block ``n``."""
    one = replace(rotation, first=rotation.first[n : n + 1], last=rotation.last[n : n + 1])
    return one.keys(torch.tensor([[[token]]]), torch.tensor([rank]))


def descend(left: int, right: int, probe, q_left: Tensor, q_right: Tensor) -> float:
    """Best probe on the way down to a single token of ``[left, right)``."""
    if right - left == 1:
        return probe(left, q_right)
    best = float("-inf")
    while right - left > 1:
        centre = (left + right) // 2
        score_left, score_right = probe((left + centre) // 2, q_left), probe((centre + right) // 2, q_right)
        left, right = (left, centre) if score_left > score_right else (centre, right)
        best = max(best, score_left, score_right)
    return best
