"""Which tokens query blocks attend to, for keys and values that have to be brought first."""

from __future__ import annotations

import torch
from torch import Tensor


def attended_runs(
    blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, q_tok: int, *, block_tok: int, sink_tok: int, window_tok: int
) -> tuple[Tensor, Tensor]:
    """Where the runs of tokens begin and end, ``[S, N, M + 2]``: selected blocks, sinks, the window and the ``q_tok`` tokens of the block.

    An end that is not above its beginning stands for no run. See :func:`hipexp_kernels.attend_blocks.attend_blocks`.
    """
    first = first.long()
    near = (first - window_tok + 1).clamp(min=0).masked_fill(exact.bool(), 0)
    listed = torch.arange(blocks.shape[2], device=blocks.device) < counts[..., None]
    start = blocks.long().masked_fill(~listed, 0)
    stop = torch.minimum(start + block_tok, near[:, None]).masked_fill(~listed, 0)
    lists = (len(blocks), -1, -1)
    own = (
        torch.stack([torch.zeros_like(near), near], -1).expand(lists),
        torch.stack([near.clamp(max=sink_tok), first + q_tok], -1).expand(lists),
    )
    return torch.cat([start, own[0]], -1), torch.cat([stop, own[1]], -1)
