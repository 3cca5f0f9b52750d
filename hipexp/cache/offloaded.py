"""Keys and values of one sequence in one layer that are kept off the device, with a cache on it: same results, number for number.

On the device are

* the newest tokens, side by side: the window and up to a page, while a prompt is read also the part of it that is being read;
* a pool of slots, each for the keys or the values of a unit (a chunk of the last stage), and the sinks, which never leave it.

Everything else is in the tiers below (:mod:`hipexp.cache.tiers`), where a page is written once, as soon as it is whole. What a stage or
attention asks for is fetched when its list is final: a table says what lies in which slot, a policy what makes room.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hipexp_kernels.paged import KV, Paged, Places
from torch import Tensor

from hipexp.cache.residency import Residency
from hipexp.cache.tiers import Disk, Moved, Tiers
from hipexp.cache.traffic import WRITE, Traffic, TrafficLog

KEYS, VALUES = 0, 1


@dataclass(frozen=True)
class Placement:
    """Where the keys and values of a layer go; sizes in tokens.

    ``unit_tok``: of a unit, which all heads share or (``per_head``) each has for itself; ``page_tok``: of a page, in whole units.
    ``device_tok``: sinks, window, a page and the pool, keys and values. ``host_tok``: in host memory, None if all; what is beyond goes to
    disk. ``format`` and ``policy`` as in ``Offload``.
    """

    unit_tok: int
    per_head: bool
    sink_tok: int
    window_tok: int
    page_tok: int
    device_tok: int
    host_tok: int | None = None
    format: str = "auto"
    policy: str = "clock"

    @property
    def newest_tok(self) -> int:
        """The most newest tokens that stay on the device between two steps."""
        return self.window_tok + self.page_tok

    @property
    def pool_tok(self) -> int:
        """Tokens for which the pool has room, keys and values."""
        return self.device_tok - self.sink_tok - self.newest_tok


class OffloadedStore:
    """A ``KVStore`` whose tokens are mostly elsewhere. ``hold``: while it is set, everything that is appended stays on the device as well.

    Raises ValueError for a ``placement`` without room for a unit in the pool.
    """

    def __init__(self, placement: Placement, disk: Disk | None = None):
        if placement.pool_tok < placement.unit_tok:
            raise ValueError(
                f"device_tok={placement.device_tok} leaves no room for a unit of {placement.unit_tok} tokens beside the window"
            )
        self.placement, self.disk = placement, disk
        self.length = 0
        self.decoding = self.hold = False
        self.traffic = TrafficLog()
        self._expected_tok = 0
        self._begin = 0  # of the newest tokens, which lie on the device
        self._newest: list[Tensor] = []  # keys and values [K, room, D] from there on
        self._pool: _Pool | None = None
        self._tiers: Tiers | None = None

    def reserve(self, tokens: int, like: Tensor) -> None:
        self._expected_tok = tokens

    def append(self, k: Tensor, v: Tensor) -> None:
        begin, end = self.length, self.length + k.shape[1]
        if self._pool is None or self._tiers is None:
            self._pool, self._tiers = self._open(k)
        self._make_room(begin, end, like=k)
        for rows, new in zip(self._newest, (k, v), strict=True):
            rows[:, begin - self._begin : end - self._begin] = new
        self.length = end
        if begin < self.placement.sink_tok:
            self._pool.keep_sinks(begin, k, v)
        self._write_pages(self._tiers)

    def view(self) -> tuple[KV, KV]:
        if not self._newest:
            raise ValueError("the store is empty: append keys and values before viewing them")
        if self._begin == 0:
            keys, values = (rows[:, : self.length] for rows in self._newest)
            return keys, values
        return PagedRows(self, KEYS), PagedRows(self, VALUES)

    def settle(self) -> None:
        if not self.hold and self._newest and self._newest[0].shape[1] > self.placement.newest_tok:
            self._move(self._kept_from(self.length), self.placement.newest_tok)

    def close(self) -> None:
        if self._tiers is not None:
            self._tiers.close()
        self._newest, self._pool = [], None

    @property
    def bytes(self) -> int:
        pool, scales = self._pool.bytes if self._pool else 0, self._tiers.device_bytes if self._tiers else 0
        return pool + scales + sum(rows.nbytes for rows in self._newest)

    @property
    def host_bytes(self) -> int:
        """Bytes allocated in host memory."""
        return self._tiers.host_bytes if self._tiers else 0

    @property
    def disk_bytes(self) -> int:
        """Bytes of the file on disk."""
        return self._tiers.disk_bytes if self._tiers else 0

    def run(self, which: int, begin: int, end: int, reader: str) -> Tensor:
        """Keys or values ``[K, end - begin, D]`` of tokens that follow each other, for a ``reader``."""
        newest = self._newest[which]
        if begin >= self._begin:
            return newest[:, begin - self._begin : end - self._begin]
        out = newest.new_empty(newest.shape[0], end - begin, newest.shape[2])
        return self.gather(which, torch.arange(begin, end, device=newest.device)[None], slice(None), out, reader)

    def gather(self, which: int, token: Tensor, heads: slice, out: Tensor, reader: str) -> Tensor:
        """Keys or values at ``token`` ``[k or 1, ...]`` of ``k`` heads, written into ``out`` ``[k, ..., D]``; what is missing is fetched.

        What the pool cannot hold at once is read past it.
        """
        newest = self._newest[which]
        K, room, D = newest.shape
        head, token = torch.arange(K, device=newest.device)[heads, None], token.reshape(len(token), -1)
        rows = out.view(-1, D)
        near = token >= self._begin
        n_near = int(near.sum())
        if n_near < near.numel():
            self._gather_far(which, token, near, head, rows, reader)
        if n_near:
            newest_rows = newest.view(K * room, D)
            place = (head * room + token - self._begin).flatten()
            if n_near == near.numel():
                torch.index_select(newest_rows, 0, place, out=rows)
            else:
                where = near.expand(len(head), -1).flatten().nonzero().flatten()
                rows.index_copy_(0, where, newest_rows.index_select(0, place[where]))
        return out

    def _gather_far(self, which: int, token: Tensor, near: Tensor, head: Tensor, rows: Tensor, reader: str) -> None:
        """Fill ``rows`` ``[k * n, D]`` from the pool, where ``token`` ``[k or 1, n]`` is not ``near``; what the others get is no matter.

        A request that the pool cannot hold at once is read past it, row by row, and leaves what it holds alone.
        """
        assert self._pool is not None
        pool, traffic = self._pool, self.traffic.of("decode" if self.decoding else "prefill", reader)
        number = pool.number(which, token, head).masked_fill(near, 0)
        asked = (~near & (token >= self.placement.sink_tok)).expand_as(number)
        wanted = torch.unique_consecutive(number[asked])
        if len(wanted) > pool.capacity:
            wanted = wanted.unique()
        if len(wanted) <= pool.capacity:
            self._bring(wanted, traffic)
            place = pool.place(number, token, head).masked_fill_(near, 0)
            torch.index_select(pool.rows, 0, place.flatten(), out=rows)
            return
        shape = len(head), token.shape[1]
        number, token, head, far = (x.expand(shape).flatten() for x in (number, token, head, ~near))
        self._read_past(which, number, token, head, far, rows, traffic)

    def _read_past(self, which: int, number: Tensor, token: Tensor, head: Tensor, far: Tensor, rows: Tensor, traffic: Traffic) -> None:
        """Fill ``rows`` ``[n, D]`` where ``far``: from the pool what is there, from the tiers the others, every row once."""
        assert self._pool is not None and self._tiers is not None
        pool, K = self._pool, self._newest[which].shape[0]
        there = pool.has(number)
        here = (far & there).nonzero().flatten()
        rows.index_copy_(0, here, pool.rows.index_select(0, pool.place(number[here], token[here], head[here])))
        elsewhere = (far & ~there).nonzero().flatten()
        started = time.perf_counter()
        missing, place = (token * K + head)[elsewhere].unique(return_inverse=True)
        data, moved = self._tiers.read_rows(which, missing // K, missing % K)
        rows.index_copy_(0, elsewhere, data[place])
        hits, misses = (len(number[where][number[where] >= pool.n_sinks].unique()) for where in (here, elsewhere))
        traffic.add(Traffic(hits=hits, misses=misses, uncached=1))
        self._count(traffic, moved, started)

    def bring(self, whiches: Sequence[int], begin: Tensor, end: Tensor, reader: str, past: bool) -> tuple[Places, ...] | None:
        """Have keys (0) or values (1), or both, of the runs from ``begin`` to ``end`` on the device; see :meth:`Paged.bring`."""
        assert self._pool is not None
        pool, newest = self._pool, self._newest[0]
        base = pool.bases(begin.clamp(min=pool.sink_tok), end.clamp(max=self._begin))
        wanted = torch.cat([base + which for which in whiches])
        traffic = self.traffic.of("decode" if self.decoding else "prefill", reader)
        if len(wanted) <= pool.capacity:
            self._bring(wanted, traffic)
            pool.residency.know(pool.n_numbers(self._begin))
            slots, table, sinks = pool.slots, pool.residency.table, pool.capacity
        elif past:
            slots, table = self._beside(wanted, traffic)
            sinks = len(wanted)
        else:
            return None
        rows = [self._newest[which] for which in whiches]
        assert all(x.shape == newest.shape for x in rows)
        return tuple(
            Places(slots, table, x, self._begin, which, pool.lists, pool.n_sinks, sinks) for x, which in zip(rows, whiches, strict=True)
        )

    def _beside(self, wanted: Tensor, traffic: Traffic) -> tuple[Tensor, Tensor]:
        """Slots and table for units ``wanted``, which the pool has no room for and which leave it alone; its sinks lie behind them."""
        assert self._pool is not None
        pool, n = self._pool, len(wanted)
        slots = pool.slots.new_empty(n + pool.n_sinks, *pool.slots.shape[1:])
        slots[n:] = pool.slots[pool.capacity :]
        there = pool.has(wanted)
        here, elsewhere = there.nonzero().flatten(), (~there).nonzero().flatten()
        if len(here):
            slots.index_copy_(0, here, pool.slots.index_select(0, pool.residency.table[wanted[here] - pool.n_sinks]))
        traffic.add(Traffic(hits=len(here), misses=len(elsewhere), uncached=1))
        self._fetch(wanted[elsewhere], slots, elsewhere, traffic)
        table = torch.full((pool.n_numbers(self._begin),), -1, dtype=torch.int32, device=slots.device)
        table[wanted - pool.n_sinks] = torch.arange(n, dtype=torch.int32, device=slots.device)
        return slots, table

    def _bring(self, wanted: Tensor, traffic: Traffic) -> None:
        """Have the units ``wanted``, distinct numbers and none of the sinks, in the pool."""
        assert self._pool is not None
        pool = self._pool
        fetched = pool.residency.access(wanted - pool.n_sinks)
        traffic.hits += fetched.hits
        traffic.misses += len(fetched.missing)
        try:
            self._fetch(fetched.missing + pool.n_sinks, pool.slots, fetched.slots, traffic)
        except BaseException:
            pool.residency.forget()  # the table has them in slots where they never came
            raise

    def _fetch(self, number: Tensor, slots: Tensor, place: Tensor, traffic: Traffic) -> None:
        """Copy units with these numbers ``[n]`` from the tiers into ``slots`` at ``place`` ``[n]``."""
        assert self._pool is not None and self._tiers is not None
        pool = self._pool
        for which in (KEYS, VALUES):
            mine = (number % 2 == which).nonzero().flatten()
            if len(mine):
                started, listed = time.perf_counter(), number[mine] // 2
                data, moved = self._tiers.read(which, listed // pool.lists, listed % pool.lists if pool.lists > 1 else None)
                slots.index_copy_(0, place[mine], data)
                self._count(traffic, moved, started)

    def _count(self, traffic: Traffic, moved: Moved, started: float) -> None:
        stall_ms = (time.perf_counter() - started) * 1e3
        traffic.add(Traffic(h2d_bytes=moved.link_bytes, disk_read_bytes=moved.disk_bytes, stall_ms=stall_ms))

    def _open(self, like: Tensor) -> tuple[_Pool, Tiers]:
        of, (K, _, D) = self.placement, like.shape
        pool = _Pool(of, like)
        tiers = Tiers(
            kv_heads=K, head_dim=D, page_tok=of.page_tok, unit_tok=of.unit_tok, dtype=like.dtype, format=of.format,
            host_pages=None if of.host_tok is None else of.host_tok // of.page_tok, disk=self.disk, device=like.device,
            expect_pages=self._expected_tok // of.page_tok,
        )  # fmt: skip
        return pool, tiers

    def _kept_from(self, position: int) -> int:
        """Where the newest tokens begin that a query at ``position`` needs: with a page, no later than its window."""
        return max(self._begin, (position - self.placement.window_tok) // self.placement.page_tok * self.placement.page_tok)

    def _make_room(self, begin: int, end: int, like: Tensor) -> None:
        room = self._newest[0].shape[1] if self._newest else 0
        if end - self._begin <= room:
            return
        keep_from = self._begin if self.hold else self._kept_from(begin)
        needed = end - keep_from
        if self.hold:
            needed = max(needed, self._expected_tok, room + room // 2)
        if not self._newest:
            self._newest = [like.new_empty(like.shape[0], 0, like.shape[2]) for _ in range(2)]
        self._move(keep_from, max(needed, self.placement.newest_tok))

    def _move(self, keep_from: int, room: int) -> None:
        """Keep the newest tokens from ``keep_from`` on, in memory for ``room`` of them."""
        for i, rows in enumerate(self._newest):
            moved = rows.new_empty(rows.shape[0], room, rows.shape[2])
            moved[:, : self.length - keep_from] = rows[:, keep_from - self._begin : self.length - self._begin]
            self._newest[i] = moved
        self._begin = keep_from

    def _write_pages(self, tiers: Tiers) -> None:
        """Write the pages that have become whole. What readers of a lossy format will see is what they see from now on."""
        page_tok, first = self.placement.page_tok, tiers.pages * self.placement.page_tok
        last = self.length // page_tok * page_tok
        if last == first:
            return
        keys, values = (rows[:, first - self._begin : last - self._begin] for rows in self._newest)
        moved = tiers.write(keys, values)
        written = self.traffic.of("decode" if self.decoding else "prefill", WRITE)
        written.d2h_bytes += moved.link_bytes
        written.disk_write_bytes += moved.disk_bytes
        raw = max(0, min(self.placement.sink_tok, last) - first)  # sinks never leave the device
        for rows in (keys, values):
            seen = tiers.round_trip(rows)
            if seen is not rows:
                rows[:, raw:] = seen[:, raw:]


class _Pool:
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


class PagedRows(Paged):
    """The keys or the values of an :class:`OffloadedStore` as operations read them."""

    def __init__(self, store: OffloadedStore, which: int, reader: str = ""):
        like = store._newest[which]
        self.shape, self.dtype, self.device = (like.shape[0], store.length, like.shape[2]), like.dtype, like.device
        self._store, self._which, self._reader = store, which, reader

    def gather(self, token: Tensor, heads: slice, out: Tensor) -> Tensor:
        return self._store.gather(self._which, token, heads, out, self._reader)

    def run(self, begin: int, end: int) -> Tensor:
        return self._store.run(self._which, begin, end, self._reader)

    def bring(self, begin: Tensor, end: Tensor, *others: Paged, past: bool = False) -> tuple[Places, ...] | None:
        whiches = [x._which for x in (self, *others) if isinstance(x, PagedRows) and x._store is self._store]
        if len(whiches) != 1 + len(others):
            raise ValueError("keys and values that are brought together must be of one store")
        return self._store.bring(whiches, begin, end, self._reader, past)

    def by(self, reader: str) -> Paged:
        return PagedRows(self._store, self._which, reader)
