"""Many pieces at a time, few enough that they fit the processor's cache."""

import torch
from torch import Tensor

from hipexp_kernels.summarize.reference import OUTLIER_SHARE

FLOATS = 1 << 18  # of keys in flight


def summarize(k: Tensor, *, piece_tok: int) -> Tensor:
    K, T, D = k.shape
    pieces = k[:, : T // piece_tok * piece_tok].unflatten(1, (T // piece_tok, piece_tok))
    out = k.new_empty(K, T // piece_tok, 2, D)
    step = max(1, FLOATS // (K * piece_tok * D))
    for p in range(0, pieces.shape[1], step):
        part = pieces[:, p : p + step].float()
        mean = part.mean(2, keepdim=True)
        deviation = part - mean
        farthest = torch.linalg.vector_norm(deviation, dim=-1).argmax(2)[..., None, None].expand(-1, -1, 1, D)
        out[:, p : p + step, :1] = mean
        out[:, p : p + step, 1:] = mean + OUTLIER_SHARE * deviation.gather(2, farthest)
    return out
