"""Rotary position embedding by explicit positions, in the half-split convention (dimension t pairs with t + R/2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeTable:
    """cos and sin by position, ``[P, R/2]`` in fp32, any attention factor included; ``R <= D`` dimensions are rotated."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def factor(self) -> Tensor:
        """The angles as complex numbers ``[P, R/2]``."""
        return torch.complex(self.cos, self.sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``R`` of the last dimension of ``x`` ``[..., D]`` by ``cos``/``sin`` ``[..., R/2]`` (broadcast)."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty(torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1]) + x.shape[-1:], dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


@dataclass(frozen=True)
class ScoreRotation:
    """Which positions pooled queries and probed keys get while chunks are scored.

    | mode          | query                               | key                                                                 |
    |---------------|-------------------------------------|---------------------------------------------------------------------|
    | `relative`    | scan window + 1 (left), + 0 (right) | 0: left raw                                                         |
    | `infllm`      | scan window                         | 0: left raw                                                         |
    | `rank`        | min(position, chunks + scan window) | the chunk's index in the stage's list (chunk-indexed)               |
    | `native`      | position                            | position                                                            |
    | `dynamic`     | position                            | further than ``trained_tok/4``: squeezed into the trained length    |
    | `self_extend` | position                            | far ones grouped by 16                                              |

    ``position`` ``[N, R]``: position of each pooled query (that of its first member). ``first`` and ``last`` ``[N]``: first and last
    query position of each block. ``table`` needs a row for every position that is asked for.
    """

    mode: str
    table: RopeTable
    trained_tok: int
    scan_window_tok: int
    position: Tensor
    first: Tensor
    last: Tensor

    GROUP = 16
    NEIGHBOUR_TOK = 8192
    ONE_ANGLE_A_CHUNK = ("relative", "infllm", "rank")  # all tokens of a chunk are rotated alike
    MODES = (*ONE_ANGLE_A_CHUNK, "native", "dynamic", "self_extend")

    @property
    def turns_keys(self) -> bool:
        """Whether probed keys are rotated; otherwise they are read as they are."""
        return self.mode not in ("relative", "infllm")

    def queries(self, q: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[H, N, R, D]`` rotated (fp32) for the left and for the right probe: one tensor where that makes no difference.

        ``counts`` ``[S, N]``: candidates of each block.
        """
        q = q.float()
        if not self.turns_keys:
            right = self._before_raw_keys(q, self.scan_window_tok)
            return (self._before_raw_keys(q, self.scan_window_tok + 1) if self.mode == "relative" else right), right
        at = self.position
        if self.mode == "rank":
            at = torch.minimum(at, counts[..., None] + self.scan_window_tok).repeat_interleave(len(q) // len(counts), 0)
        rotated = rotate(q, self.table.cos[at], self.table.sin[at])
        return rotated, rotated

    def _before_raw_keys(self, q: Tensor, row: int) -> Tensor:
        """``q`` at one position; it carries the attention factor of its raw keys too (cos of position 0 is the factor)."""
        rotated = rotate(q, self.table.cos[row], self.table.sin[row])
        rotated[..., : 2 * self.table.cos.shape[1]] *= self.table.cos[0, 0]
        return rotated

    def keys(self, token_SNC: Tensor, rank_C: Tensor) -> Tensor:
        """Positions of the probed tokens ``[S, N, C]`` of chunks ``[C]`` (ints, not below 0).

        Other shapes go as well where ``first`` and ``last`` with a last dimension of one broadcast against them.
        """
        first, last = self.first[:, None], self.last[:, None]
        if self.mode == "rank":
            return rank_C.expand(token_SNC.shape)
        if self.mode == "native":
            return token_SNC
        if self.mode == "dynamic":
            return dynamic_positions(token_SNC, first, last, self.trained_tok)
        near = min(self.NEIGHBOUR_TOK, self.trained_tok // 2)
        grouped = torch.div(token_SNC - first, self.GROUP, rounding_mode="floor") + first
        return torch.where((token_SNC > first - near) | (last < self.trained_tok), token_SNC, grouped).clamp(min=0)


def paired(x: Tensor, table: RopeTable, out: Tensor | None = None) -> Tensor:
    """``x`` ``[..., D]`` (fp32) as complex numbers ``[..., D/2]``: dimension ``t`` with the one it is rotated with, others two by two."""
    half = table.cos.shape[1]
    if 2 * half == x.shape[-1]:
        return torch.complex(x[..., :half], x[..., half:], out=out)
    z = torch.complex(x[..., :half], x[..., half : 2 * half])
    return torch.cat([z, torch.complex(x[..., 2 * half :: 2], x[..., 2 * half + 1 :: 2])], -1, out=out)


def turn(z: Tensor, factor: Tensor, scratch: bool = False) -> Tensor:
    """Rotate the first dimensions of paired ``z`` by complex factors ``[..., R/2]``: ``[..., D]`` in paired order.

    ``scratch``: ``z`` is overwritten.
    """
    if factor.shape[-1] < z.shape[-1]:
        factor = torch.cat([factor, factor.new_ones(*factor.shape[:-1], z.shape[-1] - factor.shape[-1])], -1)
    return torch.view_as_real(torch.mul(z, factor, out=z if scratch else None)).flatten(-2)


def dynamic_positions(token: Tensor, first: Tensor, last: Tensor, trained_tok: int) -> Tensor:
    """Positions of ``token`` for queries ``first``..``last``: the newest quarter of the trained length is kept, the rest squeezed.

    The span from 0 to ``first - trained_tok/4`` is mapped linearly onto a span of ``trained_tok * 3/4`` with the same end.
    """
    window = trained_tok // 4
    end = (first - window).clamp(min=1)
    squeezed = end - torch.div((end - token) * (trained_tok - window), end, rounding_mode="floor")
    squeezed = torch.maximum(squeezed, last - trained_tok)
    keep = (last < trained_tok) | (token >= last - window) | (token >= end) | (end <= trained_tok - window)
    return torch.where(keep, token, squeezed).clamp(min=0)


@dataclass(frozen=True)
class AttendRotation:
    """Which positions the final attention gives to queries and keys.

    ``streaming``: sinks, selected and window keys are numbered without gaps, the query last (as StreamingLLM);
    ``infllm``: sinks and selected keys all lie one window before the block; ``native``: true positions; ``dynamic``: cos and sin
    are three quarters those of ``streaming`` and one quarter those of the squeezed true positions (see
    :func:`dynamic_positions`). Window keys always keep their true distance.

    ``table`` needs a row for every position that is asked for: as many as a block attends to and has rows itself (sinks, selected,
    window, block), and for ``native`` and ``dynamic`` all of the sequence and a block.
    """

    mode: str
    table: RopeTable
    trained_tok: int

    def query(self, position: Any, first: Any, n_far: Any, window_tok: Any) -> Any:
        """Table rows, ints or tensors of them, of queries at ``position`` in a block that starts at ``first``.

        It attends to ``n_far`` keys before its window.
        """
        if self.mode == "streaming":
            return position - first + n_far + window_tok - 1
        if self.mode == "infllm":
            return position - first + window_tok
        return position

    def keys(self, token: Tensor, first: int, last: int, n_far: int, window_tok: int) -> Tensor:
        """Complex factors ``[n, R/2]`` of the keys ``token`` ``[n]``: ``n_far`` sinks and selected ones, then a run of window keys."""
        factor, device = self.table.factor, token.device
        if self.mode == "streaming":
            return factor[: len(token)]
        if self.mode == "native":
            return factor.index_select(0, token)
        packed = torch.arange(len(token), device=device)
        if self.mode == "infllm":
            return factor.index_select(0, (packed - n_far + 1).clamp(min=0))
        if self.mode == "dynamic":
            near = torch.where(packed < n_far, (packed + first - window_tok + 1 - n_far).clamp(min=0), token)
            far = dynamic_positions(token, torch.tensor(first, device=device), torch.tensor(last, device=device), self.trained_tok)
            far = torch.where(packed < n_far, far, token)
            return 0.75 * factor.index_select(0, near) + 0.25 * factor.index_select(0, far)
        raise ValueError(f"attention rotation {self.mode!r} is unknown; use streaming, infllm, native or dynamic")
