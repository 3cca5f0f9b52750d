"""Lists of their own for the query heads of one key/value head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hipexp_kernels.paged import KV


def each_member(
    attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: KV, v: KV, blocks: Tensor, counts: Tensor, *rest: Any, **more: Any
) -> tuple[Tensor, Tensor]:
    """``attend`` for lists ``blocks`` ``[H, N, M]`` of every query head: one call for the first heads of all groups, one for the second, ….

    In each a key/value head has one query head and its list. Keys and values are read where they are. See
    :func:`hipexp_kernels.attend_blocks.attend_blocks`.
    """
    G = len(q) // len(k)
    made = [attend(q[g::G], k, v, blocks[g::G], counts[g::G], *rest, **more) for g in range(G)]
    out, lse = (torch.stack(some, 1).flatten(0, 1) for some in zip(*made, strict=True))
    return out, lse
