"""Which tokens a scan reads, for keys that have to be brought first."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.score_chunks.probes import probe_step


def probed_runs(starts: Tensor, counts: Tensor, limits: Tensor, n_tok: int, chunk_tok: int, representative: str) -> tuple[Tensor, Tensor]:
    """Where the runs of tokens begin and end that ``exact`` or ``grid`` probe, ``[S, N, C, runs of a chunk]``.

    An end that is not above its beginning stands for no run. See :func:`hipexp_kernels.score_chunks.score_chunks`; ``n_tok``: keys.
    """
    limits = limits.clamp(max=n_tok)[:, None]
    there = (torch.arange(starts.shape[2], device=starts.device) < counts[..., None]) & (starts < limits)
    start = starts.masked_fill(~there, 0)
    end = torch.minimum(start + chunk_tok, limits).masked_fill(~there, 0)
    step = probe_step(representative, chunk_tok)
    if step == 1:
        return start[..., None], end[..., None]
    probes = torch.arange(step // 2, chunk_tok, step, device=starts.device)
    token = torch.minimum(start[..., None] + probes, end[..., None] - 1)
    return token.clamp(min=0), token + 1
