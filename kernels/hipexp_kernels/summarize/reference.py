"""Plain statement of key summaries: one piece at a time, in fp32."""

import torch
from torch import Tensor

OUTLIER_SHARE = 0.4  # between a third and a half: less loses single tokens among like neighbours, more lets them crowd out the others


def summarize(k: Tensor, *, piece_tok: int) -> Tensor:
    K, T, D = k.shape
    out = torch.empty(K, T // piece_tok, 2, D)
    for h in range(K):
        for p in range(T // piece_tok):
            piece = k[h, p * piece_tok : (p + 1) * piece_tok].float()
            mean = piece.mean(0)
            farthest = piece[(piece - mean).square().sum(-1).argmax()]
            out[h, p] = torch.stack([mean, mean + OUTLIER_SHARE * (farthest - mean)])
    return out.to(k.dtype)
