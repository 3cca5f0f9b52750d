"""The cache of an offloaded layer on the device: slots for units of keys and values, and a table of what lies where."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp.cache.placement import Placement
from hipexp.cache.residency import Residency


class Pool:
    """Slots ``[capacity + n_sinks, heads of a list, unit_tok, D]`` for the keys or the values of a unit, and what lies in which.

    Units are numbered ``(unit * lists + list) * 2 + which``; those of the sinks come first and have their slots behind the others.
    """

    def __init__(self, placement: Placement, like: Tensor):
        K, _, D = like.shape
        self.unit_tok, self.lists = placement.unit_tok, K if placement.per_head else 1
        self.capacity, self.n_sinks = (tok // self.unit_tok * self.lists * 2 for tok in (placement.pool_tok, placement.sink_tok))
        self.slots = like.new_empty(self.capacity + self.n_sinks, K // self.lists, self.unit_tok, D)
        self.residency = Residency(self.capacity, placement.policy, like.device)

    @property
    def rows(self) -> Tensor:
        """The slots as rows ``[*, D]``."""
        return self.slots.view(-1, self.slots.shape[3])

    @property
    def bytes(self) -> int:
        """Bytes of slots and table."""
        return self.slots.nbytes + self.residency.table.nbytes

    @property
    def sink_tok(self) -> int:
        """Tokens that have slots of their own."""
        return self.n_sinks // (2 * self.lists) * self.unit_tok

    def n_numbers(self, end: int) -> int:
        """How many numbers behind those of the sinks the units of tokens before ``end`` have, 1 at least."""
        return max(1, -(-end // self.unit_tok) * self.lists * 2 - self.n_sinks)

    def bases(self, begin: Tensor, end: Tensor) -> Tensor:
        """Numbers of the keys, ascending and each once, of all units of the runs from ``begin`` to ``end`` ``[K or 1, n]``."""
        first = begin // self.unit_tok
        n = (((end - 1) // self.unit_tok - first) + 1).masked_fill(end <= begin, 0)
        run = torch.repeat_interleave(n.flatten())
        inside = torch.arange(len(run), device=run.device) - (n.flatten().cumsum(0) - n.flatten())[run]
        unit = first.flatten()[run] + inside
        if self.lists == 1:
            return unit.unique() * 2
        lists = torch.arange(self.lists, device=run.device)
        number = unit * self.lists + run // n.shape[1] if len(n) > 1 else (unit.unique()[:, None] * self.lists + lists).flatten()
        return number.unique() * 2

    def number(self, which: int, token: Tensor, head: Tensor) -> Tensor:
        """Numbers of the units of ``token`` ``[k or 1, n]``: ``[k, n]`` where every head has its own, else as ``token``."""
        unit = token // self.unit_tok
        return ((unit * self.lists + head if self.lists > 1 else unit) * 2) + which

    def has(self, number: Tensor) -> Tensor:
        """Whether units with these numbers are there."""
        table, unit = self.residency.table, number - self.n_sinks
        if not len(table):
            return unit < 0
        return (unit < 0) | ((unit < len(table)) & (table[unit.clamp(0, len(table) - 1)] >= 0))

    def place(self, number: Tensor, token: Tensor, head: Tensor) -> Tensor:
        """Rows ``[k, n]`` of ``token`` in units that are there."""
        of_sinks, table = number < self.n_sinks, self.residency.table
        slot = number + self.capacity
        if not bool(of_sinks.all()):
            slot = torch.where(of_sinks, slot, table[(number - self.n_sinks).clamp(min=0)])
        inside = 0 if self.lists > 1 else head
        return (slot * self.slots.shape[1] + inside) * self.unit_tok + token % self.unit_tok

    def keep_sinks(self, begin: int, k: Tensor, v: Tensor) -> None:
        """Put what is new of the sinks into their slots; ``k`` and ``v`` ``[K, n, D]`` are of the tokens from ``begin`` on."""
        n = min(k.shape[1], self.sink_tok - begin)
        token = torch.arange(begin, begin + n, device=k.device)
        sinks = self.slots[self.capacity :].view(-1, self.lists, 2, *self.slots.shape[1:])
        for which, new in enumerate((k, v)):
            sinks[token // self.unit_tok, :, which, :, token % self.unit_tok] = (
                new[:, :n].unflatten(0, (self.lists, -1)).permute(2, 0, 1, 3)
            )
