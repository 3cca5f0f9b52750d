"""Keys and values of which a cache holds some, in slots in no order, and all else is NaN: what is read and was not asked for shows."""

import random

import torch
from hipexp_kernels.paged import Paged, Places


class Scattered(Paged):
    """``x`` ``[K, T, D]`` of units of ``unit`` tokens; a cache with room for ``room`` units, and the newest tokens, from ``begin`` on."""

    def __init__(self, x, which, *, unit, per_head, sink, begin, room=10**9, seed=0):
        self.x, self.which, self.unit, self.room = x, which, unit, room
        self.shape, self.dtype, self.device = tuple(x.shape), x.dtype, x.device
        self.lists = len(x) if per_head else 1
        self.begin, self.n_sinks = max(1, begin // unit) * unit, sink // unit * self.lists * 2
        self.rng, self.parts, self.past = random.Random(seed), 0, 0
        self.newest = torch.full((len(x), x.shape[1] + 5, x.shape[2]), torch.nan, dtype=x.dtype, device=x.device)
        self.newest[:, : max(0, x.shape[1] - self.begin)] = x[:, self.begin :]

    def bring(self, begin, end, *others, past=False):
        asked = set()
        for row, (begins, ends) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
            for one, other in zip(begins, ends, strict=True):
                for token in range(max(0, one), min(other, self.begin)):
                    heads = range(self.lists) if len(begin) == 1 else [row if self.lists > 1 else 0]
                    asked |= {token // self.unit * self.lists + head for head in heads}
        members = (self, *others)
        numbers = {2 * base + x.which for base in asked for x in members if 2 * base >= self.n_sinks}
        if len(numbers) > self.room and not past:
            return None
        self.parts, self.past = self.parts + 1, self.past + (len(numbers) > self.room)
        K, _, D = self.shape
        n = len(numbers) + 3
        slots = torch.full((n + self.n_sinks, K // self.lists, self.unit, D), torch.nan, dtype=self.dtype, device=self.device)
        table = torch.full((max(1, -(-self.begin // self.unit) * self.lists * 2 - self.n_sinks),), -1, dtype=torch.int32)
        places = dict(zip(sorted(numbers), self.rng.sample(range(n), len(numbers)), strict=True))
        for number in numbers | {s for s in range(self.n_sinks) if s // 2 in asked}:
            if number >= self.n_sinks:
                table[number - self.n_sinks] = places[number]
            of = next((x for x in members if x.which == number % 2), None)
            unit, head = divmod(number // 2, self.lists)
            rows = of.x[:, unit * self.unit : min((unit + 1) * self.unit, self.begin)] if of else None
            if rows is not None:
                slots[places.get(number, number + n), :, : rows.shape[1]] = rows if self.lists == 1 else rows[head : head + 1]
        return tuple(Places(slots, table.to(self.device), x.newest, self.begin, x.which, self.lists, self.n_sinks, n) for x in members)

    def gather(self, token, heads, out):
        x = self.x[heads]
        return out.copy_(x[torch.arange(len(x), device=x.device).view(-1, *[1] * (token.ndim - 1)), token.expand(len(x), *token.shape[1:])])

    def run(self, begin, end):
        return self.x[:, begin:end]

    def by(self, reader):
        return self
