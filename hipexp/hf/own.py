"""Layers that keep the attention of their model: a sliding window, or keys that other layers use too.

The model's own function is called, row by row and for some queries at a time, so that a mask is as large as a block of queries times the
keys it sees, whatever the prompt's length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hipexp_kernels.paged import whole
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hipexp.hf.cache import SequenceLayer

QUERIES = 1024  # that are attended at a time
NOT_OURS = ("position_ids", "use_cache", "cache_position")  # what an attention function is told of the whole batch


@dataclass(frozen=True)
class OwnAttention:
    """The attention that a model had before, by the name of its implementation: ``sdpa``, ``eager``, …"""

    name: str

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        mask: Tensor | None,
        window_tok: int | None,
        scaling: float,
        positions: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Return ``[B, Q, H, D]`` of rotated queries ``[B, H, Q, D]``; ``key`` and ``value`` as an attention function of ours gets them.

        ``mask`` ``[B, T]`` marks left padding. ``window_tok``: keys that a query sees, its own among them; None: all before it.
        ``positions`` ``[B or 1, Q]``, if given, are checked. Raises ValueError for them and for other padding.
        """
        told = {name: what for name, what in more.items() if name not in NOT_OURS}
        rows = [row.store for row in key.rows] if isinstance(key, SequenceLayer) else None
        out = query.transpose(1, 2).new_zeros(query.shape[0], query.shape[2], *query.shape[1::2])
        for b, q in enumerate(query):
            k, v = (key[b], value[b]) if rows is None else map(whole, rows[b].view())
            total = k.shape[1] if rows is None else rows[b].length
            padding = left_padding(mask, b, total)
            real = total - padding
            cut = rows is None and window_tok is not None and total - q.shape[1] >= window_tok - 1
            k, v = k[:, max(0, k.shape[1] - real) :], v[:, max(0, v.shape[1] - real) :]
            skip = max(0, q.shape[1] - real)  # queries that are padding themselves
            if skip < q.shape[1]:
                if positions is not None:
                    check_positions(positions[b if len(positions) > 1 else 0, skip:], real - q.shape[1] + skip, padding, cut)
                out[b, skip:] = self._row(module, q[:, skip:], k, v, window_tok, scaling, told)
        return out

    def _row(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, window_tok: int | None, scaling: float, told: dict[str, Any]
    ) -> Tensor:
        function, parts, n = self._function(module), [], k.shape[1] - q.shape[1]
        for first in range(0, q.shape[1], QUERIES):
            end = min(first + QUERIES, q.shape[1])
            low = max(0, n + first + 1 - window_tok) if window_tok else 0
            seen = slice(low, n + end)
            mask = self._mask(module, end - first, n + end - low, n + first - low, window_tok, q)
            parts.append(function(module, q[None, :, first:end], k[None, :, seen], v[None, :, seen], mask, scaling=scaling, **told)[0][0])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _function(self, module: nn.Module) -> Callable[..., Any]:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.name, eager)

    def _mask(self, module: nn.Module, n_queries: int, n_keys: int, offset: int, window_tok: int | None, like: Tensor) -> Any:
        """What the implementation takes for a mask of queries from ``offset`` on, over keys from 0 on."""
        rule = sliding_window_causal_mask_function(window_tok) if window_tok else causal_mask_function
        return ALL_MASK_ATTENTION_FUNCTIONS[self.name](
            batch_size=1, q_length=n_queries, kv_length=n_keys, q_offset=offset, kv_offset=0, mask_function=rule, attention_mask=None,
            local_size=window_tok, allow_is_causal_skip=True, dtype=like.dtype, device=like.device, config=module.config,
        )  # fmt: skip


def left_padding(mask: Tensor | None, row: int, n_tok: int) -> int:
    """How many of the last ``n_tok`` columns of a row of a mask ``[B, T]`` are padding. Raises ValueError if it is not on the left."""
    if mask is None:
        return 0
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} must be [batch, tokens] and mark padding on the left; no other mask is supported"
        )
    own = mask[row, -n_tok:]
    padding = int((own.long().cumsum(0) == 0).sum())
    if not bool(own[padding:].all()):
        raise ValueError(f"attention_mask[{row}] masks tokens after the first real one; only padding on the left is supported")
    return padding


def check_positions(positions: Tensor, begin: int, padding: int, cut: bool = False) -> None:
    """Positions that are not ``begin``, ``begin + 1``, … (left padding counted or not) mean a cache or a packing that is not understood.

    ``cut``: a cache of transformers has dropped keys that no window sees, so ``begin`` is the least that is possible. Raises ValueError.
    """
    first, last = int(positions[0]), int(positions[-1])
    starts = first >= begin if cut else first in (begin, begin + padding)
    if not starts or last - first != len(positions) - 1 or bool((positions.diff() != 1).any()):
        raise ValueError(
            f"position_ids run from {first} to {last} for the {len(positions)} tokens from {begin} on; hipexp needs one sequence per row, "
            "in order, and a cache that holds its tokens and nothing else (no packing, no static cache)"
        )
