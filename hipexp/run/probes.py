"""What a GPU and its link to the host can do, measured before anything is tuned: rates, launches, selections.

A probe is a row ``{what, value, unit}``; times are the shortest of a few tries, rates in GB/s (10^9). Needs torch and Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from hipexp_kernels.dispatch import gpu
from hipexp_kernels.gather_kv.triton import gather_kv
from torch import Tensor

from hipexp.run.timing import seconds

HOST_BYTES = 1 << 30  # in pinned memory
L2_BYTES = 16 << 20  # stays in the cache of any GPU with 32 MB or more
REPEATS = 5
CHAIN = 100  # launches, one after another
TOKEN_BYTES = 256  # a key of 128 dimensions in bf16
GATHERED_BYTES = 64 << 20  # at most

Row = dict[str, Any]


def row(what: str, value: float | bool, unit: str = "") -> Row:
    return {"what": what, "value": value, "unit": unit}


@triton.jit
def _add_one(x):
    tl.store(x, tl.load(x) + 1)


@triton.jit
def _add_one_chained(x):
    tl.extra.cuda.gdc_wait()
    tl.store(x, tl.load(x) + 1)
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _barriers(arrived, n, LIMIT: tl.constexpr):
    """``n`` times all programs wait for each other; after ``LIMIT`` looks one goes on, and ``arrived[1]`` says so."""
    for i in range(n):
        tl.debug_barrier()
        seen = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
        target, looks = (i + 1) * tl.num_programs(0), 0
        while (seen < target) & (looks < LIMIT):
            seen = tl.atomic_add(arrived, 0, sem="acquire")
            looks += 1
        if seen < target:
            tl.store(arrived + 1, 1)


@triton.jit
def _read(x, out, n, rounds, TILE: tl.constexpr):
    """Sum of all that this program's share of ``x`` holds, ``rounds`` times over."""
    total = tl.zeros([TILE], tl.float32)
    for r in range(rounds):
        for begin in range(tl.program_id(0) * TILE, n, tl.num_programs(0) * TILE):
            # another address in every round, so that no round is taken for the one before
            at = (begin + r * TILE) % n + tl.arange(0, TILE)
            total += tl.load(x + at, cache_modifier=".cg")
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def link(device: torch.device, n_bytes: int = HOST_BYTES) -> list[Row]:
    """Copies by the copy engine between pinned memory and the GPU."""
    host = torch.ones(n_bytes // 4, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    both = (("host to device", partial(there.copy_, host)), ("device to host", partial(host.copy_, there)))
    return [
        row(f"{what}, copied", n_bytes / seconds(partial(copy, non_blocking=True), device, REPEATS) / 1e9, "GB/s") for what, copy in both
    ]


def pinned_gathers(device: torch.device, n_bytes: int = HOST_BYTES, gathered: int = GATHERED_BYTES) -> list[Row]:
    """``gather_kv`` from pinned memory, runs in random order: by bytes of a run and number of programs; then within a CUDA graph."""
    pages = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.arange(n_bytes // 4, dtype=torch.int32, out=pages.view(torch.int32))  # all differ: runs in wrong places show
    rows = []
    for run_tok in (1, 8, 128, 1024):
        run = run_tok * TOKEN_BYTES
        runs, n = pages.view(-1, run), max(1, min(gathered // run, 1 << 16))
        blocks = torch.randperm(len(runs))[:n].to(device)
        out = torch.empty(n, run, dtype=torch.uint8, device=device)
        for programs in (4, 8, 16, 32):
            gather = partial(gather_kv, runs, blocks, out, programs=programs)
            rate = out.nbytes / seconds(gather, device, REPEATS) / 1e9
            rows.append(row(f"host to device, gathered by {run} B, {programs} programs", rate, "GB/s"))
    replay = captured(gather, device)
    out.zero_()
    replay()
    return [*rows, row("pinned memory is read within a CUDA graph", torch.equal(out.cpu(), runs[blocks.cpu()]))]


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A CUDA graph of a call, to be replayed; on a CPU the call itself."""
    if device.type == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(device: torch.device) -> list[Row]:
    """What one more kernel in a CUDA graph costs, alone and launched while the one before still runs (programmatic dependent launch)."""
    x = torch.zeros(1, device=device)
    makers: list[tuple[str, Any, dict]] = [("a kernel in a graph", _add_one, {})]
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        makers.append(("a kernel in a graph, dependent launch", _add_one_chained, {"launch_pdl": True}))
    rows = []
    for what, kernel, options in makers:
        times = []
        for n in (CHAIN, 2 * CHAIN):

            def chain(kernel=kernel, options=options, n=n) -> None:
                for _ in range(n):
                    kernel[(1,)](x, **options)

            replay = captured(chain, device)
            x.zero_()
            replay()
            if float(x) != n:
                raise RuntimeError(f"{what}: {n} launches in a chain added {float(x):.0f}")
            times.append(seconds(replay, device, REPEATS))
        rows.append(row(what, (times[1] - times[0]) / CHAIN * 1e6, "us"))
    return rows


def grid_barrier(device: torch.device, limit: int = 1 << 14) -> list[Row]:
    """What it costs all programs of a kernel, one a multiprocessor, to wait for each other."""
    n_programs = gpu(device)[0] if device.type == "cuda" else 1
    options = {"launch_cooperative_grid": True} if device.type == "cuda" else {}
    arrived = torch.zeros(2, dtype=torch.int32, device=device)

    def wait(n: int = CHAIN) -> None:
        arrived[:1].zero_()  # what stands behind it stays, once it is set
        _barriers[(n_programs,)](arrived, n, LIMIT=limit, **options)

    long, short = seconds(wait, device, REPEATS), seconds(lambda: wait(1), device, REPEATS)
    if int(arrived[1]):
        raise RuntimeError("a program waited in vain for the others")
    return [row("a barrier of all programs", (long - short) / (CHAIN - 1) * 1e6, "us")]


def cached_reads(device: torch.device, n_bytes: int = L2_BYTES, rounds: int = 256) -> list[Row]:
    """Reading what is in the L2 cache, again and again."""
    tile, n = 1024, n_bytes // 4
    x = torch.ones(n, device=device)
    n_programs = 8 * gpu(device)[0]
    out = torch.empty(n_programs, device=device)
    time = seconds(lambda: _read[(n_programs,)](x, out, n, rounds, TILE=tile), device, REPEATS)
    if float(out.double().sum()) != n * rounds:
        raise RuntimeError(f"{n * rounds} numbers were to be read, not {float(out.double().sum()):.0f}")
    return [row("read from the L2 cache", n_bytes * rounds / time / 1e9, "GB/s")]


def selections(device: torch.device) -> list[Row]:
    """``torch.topk`` at sizes of a decode step."""
    rows = []
    for n in (4096, 16384):
        scores = torch.randn(n, device=device)
        for k in (128, 1024):

            def select(scores: Tensor = scores, k: int = k) -> None:
                for _ in range(CHAIN):
                    torch.topk(scores, k)

            rows.append(row(f"torch.topk, {k} of {n}", seconds(captured(select, device), device, REPEATS) / CHAIN * 1e6, "us"))
    return rows


PROBES = (link, pinned_gathers, launches, grid_barrier, cached_reads, selections)
