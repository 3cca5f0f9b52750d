"""Dynamic NTK: dense attention whose RoPE base grows with the text (NTK-aware scaling, as in YaRN, arXiv 2309.00071, section 3).

Behind the trained length L the base is multiplied by ``(n / L)^(D / (D - 2))`` at length ``n``: the slowest angle then turns as far as it
did at L, the fastest stays. All keys are rotated anew for each ``n``. So that neither later tokens nor the way a prompt is cut change a
result, ``n`` is not the length of the prompt but where the query's block of ``QUERIES`` ends, counted from L on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hipexp_kernels import merge_lse
from hipexp_kernels.attend_blocks.dense import attend_all
from hipexp_kernels.rope import rotate
from torch import Tensor

from hipexp.attention.method import EVERYTHING, DenseMethod
from hipexp.attention.rope import RopeTables

QUERIES = 256


@dataclass
class Ntk(DenseMethod):
    """It has no parameters."""

    splits = True

    def exact_tok(self, tables: RopeTables | None) -> int:
        return tables.trained_tok if tables else EVERYTHING

    def attend(self, q: Tensor, k: Tensor, v: Tensor, begin: int, tables: RopeTables | None, scale: float, softcap: float | None) -> Tensor:
        (K, T, _), trained_tok = k.shape, tables.trained_tok if tables else 0
        out, first = torch.empty_like(q), begin
        while first < T:
            length = first + QUERIES - (first - trained_tok) % QUERIES
            end = min(length, T)
            rows = q[:, first - begin : end - begin].unflatten(0, (K, -1)).flatten(1, 2)
            n = end - first
            keys = k[:, :end]
            if tables:
                cos, sin = _angles(tables, length, end)
                G = rows.shape[1] // n
                rows = rotate(rows.float(), cos[first:].repeat(G, 1), sin[first:].repeat(G, 1)).to(q.dtype)
                keys = rotate(keys.float(), cos, sin).to(k.dtype)
            causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().repeat(rows.shape[1] // n, 1)
            parts = [attend_all(rows, keys[:, first:], v[:, first:end], scale, softcap, causal)]
            if first:
                parts.append(attend_all(rows, keys[:, :first], v[:, :first], scale, softcap))
            made = merge_lse([part[0] for part in parts], [part[1] for part in parts])[0]
            out[:, first - begin : end - begin] = made.view(K, -1, n, q.shape[2]).flatten(0, 1)
            first = end
        return out


def _angles(tables: RopeTables, length: int, n: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[n, R/2]`` of the first ``n`` positions, with the base of a text of ``length`` tokens."""
    if length <= tables.trained_tok:
        table = tables.upto(n)
        return table.cos[:n], table.sin[:n]
    table = tables.upto(2)
    factor, turn = torch.hypot(table.cos[0], table.sin[0]), torch.atan2(table.sin[1], table.cos[1])  # attention factor, angle of a token
    half, stretch = len(turn), length / tables.trained_tok
    turn = turn * stretch ** (-torch.arange(half, device=turn.device) / max(1, half - 1))  # as another base does to powers of it
    angle = torch.arange(n, device=turn.device)[:, None] * turn
    return factor * angle.cos(), factor * angle.sin()
