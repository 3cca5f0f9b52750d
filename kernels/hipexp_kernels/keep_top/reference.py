"""Plain statement of the selection: sort by score, then by index; take the first; put them back in order."""

import torch
from torch import Tensor


def keep_top(scores: Tensor, counts: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    index = torch.full((*counts.shape, keep), -1, dtype=torch.int64)
    kept = torch.zeros_like(counts)
    for s in range(counts.shape[0]):
        for n in range(counts.shape[1]):
            row = scores[s, n, : counts[s, n]].tolist()
            best = sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep])
            index[s, n, : len(best)] = torch.tensor(best, dtype=torch.int64)
            kept[s, n] = len(best)
    return index, kept
