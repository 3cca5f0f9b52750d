"""Keys or values of all heads as rows of one matrix, so that one ``index_select`` gathers for every head; memory for what is gathered."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

from hipexp_kernels.paged import KV, Paged
from hipexp_kernels.rope import RopeTable, paired

_HELD = threading.local()  # what each thread has


def scratch(purpose: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of ``shape`` that the next call for the same ``purpose`` uses again: new memory costs more than what is written into it.

    On the device of ``like``, in its number format if ``dtype`` is None. As much as was ever asked for is held.
    """
    held: dict[tuple, Tensor] = _HELD.__dict__.setdefault("buffers", {})
    key = purpose, dtype or like.dtype, like.device
    if key not in held or held[key].numel() < prod(shape):
        with torch.inference_mode(False):  # usable within and outside
            held[key] = torch.empty(prod(shape), dtype=dtype or like.dtype, device=like.device)
    return held[key][: prod(shape)].view(shape)


def convert(x: Tensor, table: RopeTable | None, purpose: str | None = None) -> Tensor:
    """Raw keys or queries ``[..., D]`` in fp32; if they will be rotated, as complex numbers (see :func:`hipexp_kernels.rope.paired`).

    ``purpose``: of the memory for complex numbers, which the next call uses again; new memory if it is None.
    """
    if table is None:
        return x.float()
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return paired(x.float(), table, out=scratch(purpose, shape, x, torch.complex64) if purpose else None)


class Rows:
    """Tokens ``[K, T, D]`` as rows ``[*, D]``: a view, if every head's tokens lie one after the other; those not at hand are asked for.

    ``purpose``: of the memory for what is gathered (see :func:`scratch`).
    """

    def __init__(self, x: KV, purpose: str):
        K, T, D = x.shape
        self.n_tok, self.purpose = T, purpose
        self.paged = x if isinstance(x, Paged) else None
        if isinstance(x, Paged):
            self.heads = torch.arange(K, device=x.device)
            return
        if x.stride(2) != 1 or x.stride(1) != D or x.stride(0) % D:
            x = x.contiguous()
        head = x.stride(0) // D
        self.rows = x.as_strided(((K - 1) * head + T, D), (D, 1))
        self.heads = head * torch.arange(K, device=x.device)  # the row of each head's first token

    def gather(self, token: Tensor, heads: slice = slice(None)) -> Tensor:
        """Rows ``[K, ..., D]`` at ``token`` ``[K or 1, ...]``, in memory that the next call uses again."""
        if self.paged is not None:
            n_heads, D = len(self.heads[heads]), self.paged.shape[2]
            like = torch.empty(0, dtype=self.paged.dtype, device=self.paged.device)
            return self.paged.gather(token, heads, scratch(self.purpose, (n_heads, *token.shape[1:], D), like))
        row = token + self.heads[heads].view(-1, *[1] * (token.ndim - 1))
        out = scratch(self.purpose, (row.numel(), self.rows.shape[1]), self.rows)
        return torch.index_select(self.rows, 0, row.flatten(), out=out).view(*row.shape, -1)


class KeyRows(Rows):
    """Raw keys in fp32; if they will be rotated (``table``), as complex numbers (see :func:`hipexp_kernels.rope.paired`).

    ``once``: all keys that are at hand are converted now, otherwise each time what was gathered.
    """

    def __init__(self, k: KV, table: RopeTable | None, once: bool, purpose: str):
        self.table, self.once = table, once and isinstance(k, Tensor)
        super().__init__(self.convert(k) if once and isinstance(k, Tensor) else k, purpose)

    def convert(self, x: Tensor, reuse: bool = False) -> Tensor:
        """Any keys or queries ``[..., D]`` in that form; ``reuse``: complex numbers in memory that the next such call uses again."""
        return convert(x, self.table, f"{self.purpose}, paired" if reuse else None)

    def gather(self, token: Tensor, heads: slice = slice(None)) -> Tensor:
        keys = super().gather(token, heads)
        return keys if self.once else self.convert(keys, reuse=True)
