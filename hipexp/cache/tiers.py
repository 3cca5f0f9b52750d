"""Pages of keys and values below the device: the first of a layer in host memory, the others in a file on disk.

Each page is written once and then read in units, the keys or the values of a few neighbouring tokens, of all heads or of one, or by single
tokens. What is read of one head is one run of bytes. It crosses the link as it is stored; scales of pages, where a format has them, stay on
the device. A GPU reads host memory itself, and nothing waits for it; where a layer has pages on disk, the CPU collects what is read.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import torch
from hipexp_kernels import gather_kv
from torch import Tensor

from hipexp.cache.formats import make_format
from hipexp.config.schema import ConfigError

PIECE_BYTES = 16 << 20  # packed at once: bounds what packing needs for itself
ROOM_BYTES = 8 << 20  # a file gets this much more room than it needs, or as much as it has already, so that it seldom grows
TOUCHED_BYTES = 64 << 20  # of mapped files, before they are let go: what is mapped counts as resident memory of the process
FAULT_BYTES = 64 << 10  # a fault maps this much around the byte that caused it (Linux)


class Moved(NamedTuple):
    """Bytes that a call moved, in the stored format: over the link with scales, and to or from the disk."""

    link_bytes: int
    disk_bytes: int


class Disk:
    """The disk tier of a process or a sequence: a file without a name for each :class:`Tiers`, gone with the process however it ends.

    ``limit_bytes``: what its files may hold together. Raises ConfigError for a folder in which no file can be made.
    """

    def __init__(self, folder: str | Path, limit_bytes: int | None = None) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._files: WeakSet[DiskFile] = WeakSet()
        self._touched = 0
        try:
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ConfigError(
                f"offload.disk_dir={folder} must be a folder in which files can be made ({error.strerror}); create it, or name another"
            ) from error

    @property
    def bytes(self) -> int:
        """Bytes written to its files and not freed."""
        return sum(file.bytes for file in self._files)

    def open(self) -> DiskFile:
        """A new, empty file."""
        file = DiskFile(self)
        self._files.add(file)
        return file

    def demand_room(self, more: int) -> None:
        """Raise OSError if ``more`` bytes are beyond the limit."""
        if self.limit_bytes is not None and self.bytes + more > self.limit_bytes:
            raise OSError(
                errno.EDQUOT,
                f"the disk tier holds {self.bytes} bytes and may hold {self.limit_bytes}: {more} more do not fit; "
                "raise offload.disk_bytes or offload.disk_tok, or choose a smaller offload.format",
            )

    def touch(self, runs: int, run_bytes: int) -> None:
        """Count bytes read through mappings, and let the mapped pages go now and then; the system's page cache keeps their data."""
        self._touched += runs * (run_bytes + FAULT_BYTES)
        if self._touched >= TOUCHED_BYTES:
            self._touched = 0
            for file in self._files:
                file.let_go()


class DiskFile:
    """A file that grows at its end, written by calls and read through a mapping. ``bytes``: written, and read by others from then on."""

    def __init__(self, disk: Disk) -> None:
        self.bytes = 0
        self.disk = disk
        self._file = tempfile.TemporaryFile(dir=disk.folder, buffering=0)
        self._room = 0
        self._map: mmap.mmap | None = None
        self._mapped = torch.empty(0, dtype=torch.uint8)

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    def reserve(self, more: int) -> None:
        """Make room for ``more`` bytes behind those written, so that no write finds the disk full. Raises OSError if there is none."""
        self._demand_whole()
        self.disk.demand_room(more)
        need = self.bytes + more
        if self._room >= need:
            return
        try:
            self._grow(need + min(ROOM_BYTES, self.bytes))
        except OSError:
            try:
                self._grow(need)
            except OSError as error:
                raise self._failure(error, more) from error

    def write(self, at: int, rows: Tensor) -> None:
        """Write uint8 ``rows`` of the CPU at byte ``at``, into room that was reserved. Raises OSError."""
        rest = memoryview(rows.numpy()).cast("B")
        while rest:
            try:
                n = os.pwrite(self.fileno(), rest, at)
            except OSError as error:
                raise self._failure(error, len(rest)) from error
            at, rest = at + n, rest[n:]

    def mapped(self) -> Tensor:
        """All that was written, uint8. Raises OSError if the file was cut: reading what is missing would end the process."""
        self._demand_whole()
        if self._mapped.numel() < self.bytes:
            self._map = mmap.mmap(self.fileno(), self._room)
            with torch.inference_mode(False):
                self._mapped = torch.frombuffer(self._map, dtype=torch.uint8)
        return self._mapped[: self.bytes]

    def let_go(self) -> None:
        """Take the mapped pages out of the process; they are mapped again when they are read."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Give the space back."""
        self._map, self._mapped = None, torch.empty(0, dtype=torch.uint8)  # unmapped with the last tensor that reads it
        self.bytes = self._room = 0
        self._file.close()

    def _grow(self, room: int) -> None:
        os.posix_fallocate(self.fileno(), self._room, room - self._room)
        self._room = room

    def _demand_whole(self) -> None:
        there = os.fstat(self.fileno()).st_size
        if there < self._room:
            raise OSError(
                errno.EIO,
                f"a file of the disk tier in {self.disk.folder} was cut to {there} of {self._room} bytes by somebody else: what it held is "
                "lost; run again, and leave the files of a running process alone",
            )

    def _failure(self, error: OSError, more: int) -> OSError:
        system = os.fstatvfs(self.fileno())
        free = system.f_bavail * system.f_frsize
        return OSError(
            error.errno,
            f"the disk tier in {self.disk.folder} could not take {more} bytes more ({error.strerror}; {free} are free); set "
            "offload.disk_dir to a folder with more room, or choose a smaller offload.format",
        )


class HostMemory:
    """Pages of bytes in one growing allocation, registered with CUDA if ``device`` is a GPU. ``most``: pages it may grow to."""

    def __init__(self, page_bytes: int, most: int, device: torch.device) -> None:
        self.pages = torch.empty(0, page_bytes, dtype=torch.uint8)
        self._most, self._device, self._pin = most, device, device.type == "cuda"

    def reserve(self, pages: int, expected: int = 0) -> None:
        """Make room for ``pages`` in all, ``expected`` if it is the first time, half as many again if not. Raises MemoryError."""
        there, page_bytes = self.pages.shape
        if there >= pages:
            return
        room = min(self._most, max(pages, there + there // 2 if there else expected))
        grown = allocate((room, page_bytes), torch.uint8, self._pin)
        grown[:there] = self.pages
        self.close()
        self.pages = grown

    def close(self) -> None:
        """Free the memory."""
        if self._pin and self.pages.numel():
            torch.cuda.synchronize(self._device)  # kernels may still read it
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self.pages.data_ptr())))
        self.pages = torch.empty(0, self.pages.shape[1], dtype=torch.uint8)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, pin: bool = False) -> Tensor:
    """Host memory, of which the system gives what is written to, or all at once if ``pin``. Raises MemoryError if it does not.

    It is registered by itself: torch's own allocator of pinned memory rounds up to powers of two.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        with torch.inference_mode(False):  # so that it can be written to in any mode
            memory = torch.empty(shape, dtype=dtype)
        if pin:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)))
    except (RuntimeError, MemoryError) as error:
        raise MemoryError(
            f"the host tier could not get {size} bytes for keys and values of one layer; make offload.host_tok smaller and give an "
            "offload.disk_dir, or choose a smaller offload.format"
        ) from error
    return memory


class Tiers:
    """Pages of one layer of one sequence: the first ``host_pages`` in host memory (None: all), the others in a file of ``disk``.

    A page holds ``page_tok`` tokens, of keys and of values, of all heads, in ``format``; a unit ``unit_tok`` tokens. ``device``: where
    readers are; host memory is registered with a GPU. ``expect_pages``: how many will come, if that is known: memory for them is taken at
    once. One thread at a time. Raises ConfigError for an unknown format.
    """

    def __init__(
        self,
        *,
        kv_heads: int,
        head_dim: int,
        page_tok: int,
        unit_tok: int,
        dtype: torch.dtype,
        format: str,
        host_pages: int | None,
        disk: Disk | None,
        device: torch.device | str = "cpu",
        expect_pages: int = 0,
    ) -> None:
        if unit_tok < 1 or page_tok % unit_tok:
            raise ValueError(f"unit_tok={unit_tok} must divide page_tok={page_tok}")
        self.pages = 0
        self.format = make_format(format, dtype, page_tok, head_dim)
        self._shape = kv_heads, page_tok, head_dim
        self._unit_tok, self._expect_pages = unit_tok, expect_pages
        self._page_bytes = 2 * kv_heads * page_tok * self.format.row_bytes
        self._host_pages, self._disk = sys.maxsize if host_pages is None else host_pages, disk
        self._device = torch.device(device)
        self._host = HostMemory(self._page_bytes, self._host_pages, self._device)
        self._scales = torch.empty(0, 2, kv_heads, device=self._device)
        self._file: DiskFile | None = None
        self._closed = False

    @property
    def host_bytes(self) -> int:
        """Bytes allocated in host memory."""
        return self._host.pages.numel()

    @property
    def device_bytes(self) -> int:
        """Bytes of scales, on the device."""
        return self._scales.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes written to the disk."""
        return 0 if self._file is None else self._file.bytes

    @torch.no_grad()
    def write(self, k: Tensor, v: Tensor) -> Moved:
        """Append whole pages: keys and values ``[K, n * page_tok, D]`` of any device. If it raises, nothing was appended.

        Raises MemoryError where host memory ends, OSError where the disk does, FloatingPointError for numbers that the format cannot hold.
        """
        new = self._new_pages(k, v)
        in_host = max(0, min(new, self._host_pages - self.pages))
        self._reserve(in_host, new - in_host)
        for first, last in (*self._pieces(0, in_host), *self._pieces(in_host, new)):
            both = torch.stack((self._paged(k, first, last), self._paged(v, first, last)), 1)
            rows, scales = self.format.pack(both)
            self._put(self.pages + first, rows.view(last - first, -1), scales)
        self.pages += new
        disk_bytes = (new - in_host) * self._page_bytes
        if self._file is not None:
            self._file.bytes += disk_bytes
        return Moved(new * self._page_bytes, disk_bytes)

    def read(self, which: int, units: Tensor, head: Tensor | None = None) -> tuple[Tensor, Moved]:
        """Keys (``which`` 0) or values (1) of units, int64 ``[n]`` in any order, of all heads or of one each, ``head`` ``[n]``.

        Returns ``[n, K, unit_tok, D]``, or ``[n, 1, unit_tok, D]``, in ``dtype``, on the device. Raises ValueError for what was not
        written (on a GPU that reads for itself nothing waits to look), OSError if the file was cut.
        """
        return self._read(which, units, head, self._unit_tok)

    def read_rows(self, which: int, token: Tensor, head: Tensor) -> tuple[Tensor, Moved]:
        """Keys or values ``[n, D]`` of single tokens ``[n]``, of one head each, ``[n]``. Otherwise as :meth:`read`."""
        rows, moved = self._read(which, token, head, 1)
        return rows[:, 0, 0], moved

    @torch.no_grad()
    def _read(self, which: int, units: Tensor, head: Tensor | None, unit_tok: int) -> tuple[Tensor, Moved]:
        reader = self._device if self._file is None else torch.device("cpu")
        units, head = units.to(reader), None if head is None else head.to(reader)
        K, page_tok, _ = self._shape
        self._demand_written(which, units, head, unit_tok)
        in_page = page_tok // unit_tok
        page, part = units // in_page, units % in_page
        heads = torch.arange(K, device=reader) if head is None else head[:, None]
        blocks = (2 * page + which)[:, None] * K + heads  # of a page's keys or values of one head
        rows, disk_bytes = self._gather((blocks * in_page + part[:, None]).flatten(), unit_tok * self.format.row_bytes)
        scales = self._scales.view(-1)[blocks.to(self._device)] if self.format.page_scales else None
        there = rows.to(self._device).view(*blocks.shape, unit_tok, self.format.row_bytes)
        return self.format.unpack(there, scales), Moved(rows.numel(), disk_bytes)

    @torch.no_grad()
    def round_trip(self, k: Tensor) -> Tensor:
        """What readers will see of keys or values ``[K, n * page_tok, D]``; the same tensor if the format is lossless."""
        if self.format.lossless:
            return k
        out = torch.empty_like(k, memory_format=torch.contiguous_format)
        for first, last in self._pieces(0, self._new_pages(k, k)):
            self._paged(out, first, last).copy_(self.format.unpack(*self.format.pack(self._paged(k, first, last))))
        return out

    def close(self) -> None:
        """Free memory and file; nothing can be read or written any more."""
        self._closed = True
        self._host.close()
        self._scales = self._scales[:0].clone()
        if self._file is not None:
            self._file.close()

    def _new_pages(self, k: Tensor, v: Tensor) -> int:
        self._demand_open()
        K, page_tok, D = self._shape
        fits = k.ndim == 3 and k.shape[::2] == (K, D) and not k.shape[1] % page_tok and k.dtype == self.format.dtype
        if not fits or v.shape != k.shape or v.dtype != k.dtype:
            raise ValueError(
                f"k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype} must both be [{K}, whole pages of {page_tok} tokens, {D}], "
                f"{self.format.dtype}"
            )
        return k.shape[1] // page_tok

    def _reserve(self, in_host: int, on_disk: int) -> None:
        if on_disk and self._disk is None:
            raise MemoryError(
                f"the host tier may hold {self._host_pages} pages of {self._shape[1]} tokens of a layer, and there is no disk tier for "
                f"{on_disk} more; make offload.host_tok (or host_bytes) larger, or give an offload.disk_dir"
            )
        if in_host:
            self._host.reserve(self.pages + in_host, self._expect_pages)
        self._reserve_scales(self.pages + in_host + on_disk)
        if on_disk and self._disk is not None:
            self._file = self._file or self._disk.open()
            self._file.reserve(on_disk * self._page_bytes)

    def _reserve_scales(self, pages: int) -> None:
        there = len(self._scales)
        if self.format.page_scales and there < pages:
            with torch.inference_mode(False):
                grown = torch.empty(
                    max(pages, there + there // 2 if there else self._expect_pages), *self._scales.shape[1:], device=self._device
                )
            grown[:there] = self._scales
            self._scales = grown

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Pages ``first`` to ``last`` in parts, none of which needs much memory while it is packed."""
        step = max(1, PIECE_BYTES // (2 * math.prod(self._shape) * 4))
        return ((at, min(last, at + step)) for at in range(first, last, step))

    def _paged(self, x: Tensor, first: int, last: int) -> Tensor:
        """Pages ``first`` to ``last`` ``[n, K, page_tok, D]`` of ``x`` ``[K, T, D]``, without a copy."""
        page_tok = self._shape[1]
        return x[:, first * page_tok : last * page_tok].unflatten(1, (-1, page_tok)).transpose(0, 1)

    def _put(self, page: int, rows: Tensor, scales: Tensor | None) -> None:
        """Write pages ``[n, bytes]`` from number ``page`` on, which lie in one tier."""
        if scales is not None:
            self._scales[page : page + len(rows)] = scales
        if page < self._host_pages:
            self._host.pages[page : page + len(rows)] = rows
        elif self._file is not None:
            self._file.write((page - self._host_pages) * self._page_bytes, rows.cpu())

    def _gather(self, runs: Tensor, run_bytes: int) -> tuple[Tensor, int]:
        """Runs of bytes by number, ``[n, run_bytes]`` on their device, and how many of the bytes came from the disk."""
        in_host = self._host.pages.view(-1, run_bytes)
        if self._file is None:
            return gather_kv(in_host, runs), 0
        first = self._host_pages * (self._page_bytes // run_bytes)  # of the file
        below, behind = (runs < first).nonzero().flatten(), (runs >= first).nonzero().flatten()
        order = torch.cat((below, behind))
        out = torch.empty(len(runs), run_bytes, dtype=torch.uint8)
        gather_kv(in_host, runs[below], out=out[: len(below)])
        gather_kv(self._file.mapped().view(-1, run_bytes), runs[behind] - first, out=out[len(below) :])
        self._file.disk.touch(len(behind), run_bytes)
        ascending = torch.arange(len(runs))
        if not torch.equal(order, ascending):  # as it is if all are in one tier, or the runs of the file come last
            out = out.index_select(0, torch.empty_like(order).index_copy_(0, order, ascending))
        return out, len(behind) * run_bytes

    def _demand_open(self) -> None:
        if self._closed:
            raise ValueError("these tiers were closed: their pages are gone")

    def _demand_written(self, which: int, units: Tensor, head: Tensor | None, unit_tok: int) -> None:
        self._demand_open()
        there = self.pages * (self._shape[1] // unit_tok)
        if which not in (0, 1) or units.ndim != 1 or not _within(units, there):
            raise ValueError(f"which={which} must be 0 (keys) or 1 (values), and units [n] from 0 to {there - 1}: no others were written")
        if head is not None and (head.shape != units.shape or not _within(head, self._shape[0])):
            raise ValueError(f"head {tuple(head.shape)} must name one of {self._shape[0]} heads for each of {len(units)} units")


def as_kept(x: Tensor, format: str, page_tok: int, sink_tok: int) -> Tensor:
    """Keys or values ``[K, T, D]`` as their readers see them: whole pages as ``format`` keeps them, but for the sinks."""
    K, T, D = x.shape
    sizes = {"kv_heads": K, "head_dim": D, "page_tok": page_tok, "unit_tok": page_tok}
    tiers = Tiers(**sizes, dtype=x.dtype, format=format, host_pages=None, disk=None, device=x.device)
    if tiers.format.lossless:
        return x
    kept, whole = x.clone(), T // page_tok * page_tok
    kept[:, sink_tok:whole] = tiers.round_trip(x[:, :whole])[:, sink_tok:]
    return kept


def _within(numbers: Tensor, end: int) -> bool:
    """Whether all are whole numbers from 0 to before ``end``, as far as nobody waits for a GPU to know."""
    if not numbers.numel() or numbers.is_cuda:
        return True
    least, most = numbers.aminmax()
    return bool(least >= 0) and bool(most < end)
