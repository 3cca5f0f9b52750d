"""Exact attention of blocks of queries to every key, for methods that look at all of them, and lists of what they choose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hipexp_kernels.paged import whole
from hipexp_kernels.rope import rotate
from torch import Tensor

from hipexp.attention.method import Call
from hipexp.attention.rope import RopeTables
from hipexp.attention.selection import Selection
from hipexp.config.schema import PruneRope


class KeySums:
    """A number for each key of a sequence, ``sums`` ``[K, T]`` in fp32, which a method adds to as queries come."""

    def __init__(self) -> None:
        self.sums = torch.empty(0)

    @property
    def bytes(self) -> int:
        return self.sums.nbytes

    def grown(self, keys: Tensor) -> Tensor:
        """The sums of ``keys`` ``[K, T, D]``; those that are new have zero."""
        old, self.sums = self.sums, torch.zeros(keys.shape[:2], device=keys.device)
        if old.ndim > 1:
            self.sums[:, : old.shape[1]] = old
        return self.sums


def at_positions(x: Tensor, begin: int | Tensor, tables: RopeTables) -> Tensor:
    """Raw queries or keys ``[.., n, D]`` rotated to the true positions ``begin``, ``begin + 1``, … or to those of ``[.., n]`` (fp32)."""
    if isinstance(begin, Tensor):
        table = tables.upto(int(begin.max()) + 1)
        return rotate(x.float(), *(torch.embedding(angles, begin) for angles in (table.cos, table.sin)))
    table, end = tables.upto(begin + x.shape[-2]), begin + x.shape[-2]
    return rotate(x.float(), table.cos[begin:end], table.sin[begin:end])


def at_distance(q: Tensor, distance_tok: int, tables: RopeTables) -> Tensor:
    """Raw queries ``[.., D]`` rotated to lie so far behind raw keys (fp32); they carry the attention factor of both, cos of position 0."""
    table = tables.upto(distance_tok + 1)
    return rotate(q.float(), table.cos[distance_tok] * table.cos[0], table.sin[distance_tok] * table.cos[0])


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits bent to stay within ``softcap``, as Gemma-2 does; None: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def query_logits(call: Call, q: Tensor, keys: Tensor, begin: int, distance_tok: int | None) -> Tensor:
    """Logits ``[H, R, T]`` (fp32) of raw queries ``[H, R, D]`` at ``begin`` … over ``keys`` ``[K, T, D]``, -inf for keys behind a query.

    Scale, soft cap and RoPE are those of the ``call``. ``distance_tok`` None: ``keys`` are rotated already, and queries get their true
    positions. Else keys are raw and all count as lying so far before the query, which is known to a model at any length.
    """
    R, T = q.shape[1], keys.shape[1]
    q = at_positions(q, begin, call.tables) if distance_tok is None else at_distance(q, distance_tok, call.tables)
    out = torch.einsum("kgrd,ktd->kgrt", call.scale * q.unflatten(0, (len(keys), -1)), keys.float()).flatten(0, 1)
    out = capped(out, call.softcap)
    behind = torch.arange(begin, T, device=q.device) > begin + torch.arange(R, device=q.device)[:, None]
    out[..., begin:].masked_fill_(behind, -torch.inf)
    return out


def block_mass(call: Call, prune: PruneRope, distance_tok: int) -> Iterator[tuple[int, Tensor]]:
    """For every block its first position and the attention ``[H, T]`` that its queries give each key, summed over those that exist.

    By true positions if ``prune`` is ``native``, else at one distance.
    """
    keys, queries = whole(call.keys), call.queries
    native = prune is PruneRope.native
    keys = at_positions(keys, 0, call.tables) if native else keys
    for n in range(len(queries)):
        begin, q = queries.existing(n)
        logits = query_logits(call, q, keys[:, : begin + q.shape[1]], begin, None if native else distance_tok)
        yield queries.start + n * queries.size, torch.softmax(logits, -1).sum(1)


def chosen_blocks(marked: list[Tensor], block_tok: int, origin: int) -> Selection:
    """The selection of blocks that are ``marked``: for every query block bools ``[S, blocks]``, of the blocks from ``origin`` on."""
    counts = torch.stack([x.sum(-1) for x in marked], 1)
    blocks = torch.full((*counts.shape, int(counts.max())), -1, dtype=torch.int64, device=counts.device)
    for n, mine in enumerate(marked):
        for s, row in enumerate(mine):
            at = row.nonzero().flatten()
            blocks[s, n, : len(at)] = origin + at * block_tok
    return Selection(blocks, counts)


def keep_best(scores: Tensor, n: int) -> Tensor:
    """Which of ``scores`` ``[.., C]`` are the ``n`` best, of equals the first; never one of -inf."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True) & (scores > -torch.inf)
