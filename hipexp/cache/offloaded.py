"""Keys and values of one sequence in one layer that are kept off the device, with a cache on it: same results, number for number.

On the device are

* the newest tokens, side by side: the window and up to a page, while a prompt is read also the part of it that is being read;
* a pool of slots, each for the keys or the values of a unit (a chunk of the last stage), and the sinks, which never leave it.

Everything else is in the tiers below (:mod:`hipexp.cache.tiers`), where a page is written once, as soon as it is whole. What a stage or
attention asks for is fetched when its list is final: a table says what lies in which slot, a policy what makes room.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from hipexp_kernels.paged import KV, Paged, Places
from torch import Tensor

from hipexp.cache.placement import Placement
from hipexp.cache.pool import Pool
from hipexp.cache.tiers import Disk, Moved, Tiers
from hipexp.cache.traffic import AHEAD, WRITE, Traffic, TrafficLog

KEYS, VALUES = 0, 1


class OffloadedStore:
    """A ``KVStore`` whose tokens are mostly elsewhere. ``hold``: while it is set, everything that is appended stays on the device as well.

    ``ahead``: what reads :meth:`expect`ed units in the background; the store shuts it down when it is closed.

    Raises ValueError for a ``placement`` without room for a unit in the pool.
    """

    def __init__(self, placement: Placement, disk: Disk | None = None, ahead: ThreadPoolExecutor | None = None):
        if placement.pool_tok < placement.unit_tok:
            raise ValueError(
                f"device_tok={placement.device_tok} leaves no room for a unit of {placement.unit_tok} tokens beside the window"
            )
        self.placement, self.disk = placement, disk
        self._ahead, self._coming = ahead, _Coming()
        self._turn = threading.Lock()  # to use the tiers
        self.length = 0
        self.decoding = self.hold = False
        self.traffic = TrafficLog()
        self._expected_tok = 0
        self._begin = 0  # of the newest tokens, which lie on the device
        self._newest: list[Tensor] = []  # keys and values [K, room, D] from there on
        self._pool: Pool | None = None
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
        self._newest, self._pool = [], None
        with ExitStack() as closing:  # both, whatever one of them raises
            if self._tiers is not None:
                closing.callback(self._tiers.close)
            if self._ahead is not None:
                closing.callback(self._ahead.shutdown)

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

    def expect(self, starts: Tensor, counts: Tensor, chunk_tok: int) -> None:
        """Read in the background the keys that are not here of the first ``counts`` ``[S]`` chunks at ``starts`` ``[S, n]``.

        Whoever asks for them later finds them read, or waits for the rest. Without ``ahead``, or if they do not fit the pool, nothing is
        done.
        """
        if self._ahead is None or self._pool is None or self._tiers is None:
            return
        pool = self._pool
        inside = torch.arange(0, chunk_tok, self.placement.unit_tok, device=starts.device)
        token = (starts[..., None] + inside).masked_fill(
            torch.arange(starts.shape[1], device=starts.device)[:, None] >= counts[:, None, None], -1
        )
        token = token.flatten(1)
        head = torch.arange(len(token), device=token.device)[:, None]
        number = pool.number(KEYS, token, head)[(token >= self.placement.sink_tok) & (token < self._begin)]
        missing = number[~pool.has(number)].unique()
        if 0 < len(missing) <= pool.capacity:
            traffic = self.traffic.of("decode" if self.decoding else "prefill", AHEAD)
            self._coming = _Coming(missing, self._ahead.submit(self._read_ahead, missing, traffic))

    def wait(self) -> None:
        """Until nothing is being read in the background, so that all traffic is counted."""
        self._coming.done()

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
        with self._turn:
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
        """Have the units ``wanted``, numbers ``[n]`` with or without repetitions, none of the sinks, in the pool."""
        assert self._pool is not None
        pool = self._pool
        fetched = pool.residency.access(wanted - pool.n_sinks)
        traffic.hits += fetched.hits
        traffic.misses += len(fetched.missing)
        if not len(fetched.missing):
            return
        missing, slots, started = fetched.missing + pool.n_sinks, fetched.slots, time.perf_counter()
        try:
            came, data = self._coming.among(missing)
            if len(data):
                pool.slots.index_copy_(0, slots[came], data)
                missing, slots = missing[~came], slots[~came]
                traffic.stall_ms += (time.perf_counter() - started) * 1e3
            self._fetch(missing, pool.slots, slots, traffic)
        except BaseException:
            pool.residency.forget()  # the table has them in slots where they never came
            self._coming = _Coming()
            raise

    def _fetch(self, number: Tensor, slots: Tensor, place: Tensor, traffic: Traffic) -> None:
        """Copy units with these numbers ``[n]`` from the tiers into ``slots`` at ``place`` ``[n]``."""
        for which in (KEYS, VALUES):
            mine = (number % 2 == which).nonzero().flatten()
            if len(mine):
                started = time.perf_counter()
                data, moved = self._read(which, number[mine])
                slots.index_copy_(0, place[mine], data)
                self._count(traffic, moved, started)

    def _read_ahead(self, number: Tensor, traffic: Traffic) -> Tensor:
        """Keys of units, for which nobody waits: no stall is counted."""
        data, moved = self._read(KEYS, number)
        traffic.add(Traffic(h2d_bytes=moved.link_bytes, disk_read_bytes=moved.disk_bytes))
        return data

    def _read(self, which: int, number: Tensor) -> tuple[Tensor, Moved]:
        """Units ``[n, heads of a list, unit_tok, D]`` by number."""
        assert self._pool is not None and self._tiers is not None
        lists, listed = self._pool.lists, number // 2
        with self._turn:
            return self._tiers.read(which, listed // lists, listed % lists if lists > 1 else None)

    def _count(self, traffic: Traffic, moved: Moved, started: float) -> None:
        stall_ms = (time.perf_counter() - started) * 1e3
        traffic.add(Traffic(h2d_bytes=moved.link_bytes, disk_read_bytes=moved.disk_bytes, stall_ms=stall_ms))

    def _open(self, like: Tensor) -> tuple[Pool, Tiers]:
        of, (K, _, D) = self.placement, like.shape
        pool = Pool(of, like)
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
        with self._turn:
            moved = tiers.write(keys, values)
        written = self.traffic.of("decode" if self.decoding else "prefill", WRITE)
        written.d2h_bytes += moved.link_bytes
        written.disk_write_bytes += moved.disk_bytes
        raw = max(0, min(self.placement.sink_tok, last) - first)  # sinks never leave the device
        for rows in (keys, values):
            seen = tiers.round_trip(rows)
            if seen is not rows:
                rows[:, raw:] = seen[:, raw:]


@dataclass
class _Coming:
    """Keys of units that are read in the background: their numbers, ascending, and what is read, ``[n, heads of a list, unit_tok, D]``."""

    number: Tensor | None = None
    data: Future[Tensor] | None = None

    def among(self, missing: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the units ``missing`` ``[n]`` are coming, and those, waited for. Raises what the reading raised."""
        if self.number is None or self.data is None:
            return torch.zeros_like(missing, dtype=torch.bool), torch.empty(0)
        at = torch.searchsorted(self.number, missing).clamp(max=len(self.number) - 1)
        came = self.number[at] == missing
        return came, self.data.result()[at[came]]

    def done(self) -> None:
        """Wait."""
        if self.data is not None:
            self.data.exception()


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
