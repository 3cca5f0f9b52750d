"""Timing in turns, on a CPU or a GPU; what the machine is."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hipexp.config.compiler import missing_compiler
from hipexp.run.environment import describe_environment
from hipexp.run.latency import quantile

LOG = logging.getLogger("hipexp")
CPU_BYTES, GPU_BYTES = 1 << 29, 1 << 32  # buffers for the bandwidth, many times the caches
HEAD_START_CYCLES = 500_000  # a quarter of a millisecond, in which the host hands a graph over


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Contestant:
    """``run(q, k, v)`` computes attention. ``missing()`` says what the machine lacks for it, if anything.

    ``capture``: whether a CUDA graph of it may be tried; a failed try can leave torch's allocator in disorder.
    """

    name: str
    run: Callable[..., Tensor]
    missing: Callable[[], str | None] = _nothing
    capture: bool = True


def missing(package: str) -> str | None:
    """That a package is not installed, if it is not."""
    return None if find_spec(package) else f"{package} is not installed"


def runnable(contestants: Sequence[Contestant], layers: Sequence[tuple]) -> tuple[list[Contestant], dict[str, str]]:
    """Those that run on the inputs of every layer, after running each once (and compiling it), and why the others do not."""
    able, reasons = [], {}
    for contestant in contestants:
        reason = contestant.missing()
        if reason is None:
            try:
                for inputs in layers:
                    contestant.run(*inputs)
                if layers[0][0].is_cuda:
                    torch.cuda.synchronize()  # what goes wrong on the device shows here
            except Exception as error:  # of many kinds: no kernel, no compiler, no memory
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if reason is None:
            able.append(contestant)
        else:
            reasons[contestant.name] = reason
    return able, reasons


def time_alternating(
    contestants: Sequence[Contestant], layers: Sequence[tuple], rounds: int = 50, warmup: int = 2, graphs: bool = True
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per contestant: ``mean_ms``, ``median_ms``, ``p10_ms``, ``p90_ms`` of one layer, and whether ``graph`` was used.

    ``layers``: the inputs of each layer; give 8 or more, whose keys together exceed the cache. In every round each contestant has
    its turn. On a CPU that is one call, each with the next layer's inputs. On a GPU it is all layers one after another, as one replay of
    a CUDA graph where it can be captured, its time divided by their number: what starting a graph costs is shared by the layers, as
    in a model. What is not captured, everything with ``graphs=False``, is launched by the host, which its time includes. Inputs must
    stay where they are in memory.
    """
    if layers[0][0].device.type == "cpu":
        return _time_cpu(contestants, layers, rounds, warmup)
    return _time_gpu(contestants, layers, rounds, warmup, graphs)


def fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with the smallest mean."""
    return min(rows, key=lambda row: row["mean_ms"])


def _time_cpu(contestants: Sequence[Contestant], layers: Sequence[tuple], rounds: int, warmup: int) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    turn = 0
    for number in range(-warmup, rounds):
        for contestant in contestants:
            inputs = layers[turn % len(layers)]
            turn += 1
            begin = time.perf_counter()
            contestant.run(*inputs)
            if number >= 0:
                times[contestant.name].append((time.perf_counter() - begin) * 1e3)
    return [_row(name, values, graph=False, n_layers=len(layers)) for name, values in times.items()]


def _time_gpu(
    contestants: Sequence[Contestant], layers: Sequence[tuple], rounds: int, warmup: int, graphs: bool
) -> list[dict[str, Any]]:  # fmt: skip
    device = layers[0][0].device
    calls = [(contestant.name, *_captured(contestant, layers, graphs)) for contestant in contestants]
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name, _, _ in calls}
    for number in range(-warmup, rounds):
        for name, call, graph in calls:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)  # nobody's launches hide behind another's work
            if graph:
                torch.cuda._sleep(HEAD_START_CYCLES)
            pair[0].record()
            call()
            pair[1].record()
            if number >= 0:
                marks[name].append(pair)
    torch.cuda.synchronize(device)
    times = {name: [begin.elapsed_time(end) / len(layers) for begin, end in pairs] for name, pairs in marks.items()}
    return [_row(name, times[name], graph, len(layers)) for name, _, graph in calls]


def _captured(contestant: Contestant, layers: Sequence[tuple], graphs: bool = True) -> tuple[Callable[[], None], bool]:
    """A function that runs all layers, and whether it is a CUDA graph."""

    def run() -> None:
        for inputs in layers:
            contestant.run(*inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what happens on first use must not happen in the capture
        run()
    torch.cuda.current_stream().wait_stream(side)
    if not (graphs and contestant.capture):
        return run, False
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        LOG.warning("%s runs without a CUDA graph: %s", contestant.name, str(error).splitlines()[0])
        return run, False
    return graph.replay, True


def _row(name: str, times: list[float], graph: bool, n_layers: int) -> dict[str, Any]:
    return {
        "name": name,
        "mean_ms": sum(times) / len(times),
        "median_ms": quantile(times, 0.5),
        "p10_ms": quantile(times, 0.1),
        "p90_ms": quantile(times, 0.9),
        "graph": graph,
        "layers": n_layers,
        "rounds": len(times),
    }


# -- the machine -------------------------------------------------------------------------------------------------------------------


def memory_bandwidth(device: torch.device, n_bytes: int | None = None, repeats: int = 7) -> dict[str, float]:
    """GB/s (10^9) of the best try: ``read``, reducing a buffer of ``n_bytes`` with all threads; ``copy``, bytes read plus written."""
    n_bytes = n_bytes or (CPU_BYTES if device.type == "cpu" else GPU_BYTES)
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    read = min(seconds(reduce, device, repeats) for reduce in (source.sum, source.amax))
    copy = seconds(lambda: target.copy_(source), device, repeats)
    return {"read": n_bytes / read / 1e9, "copy": 2 * n_bytes / copy / 1e9}


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The shortest time of a call, the first one left out."""
    best = float("inf")
    for number in range(repeats + 1):
        if device.type == "cpu":
            begin = time.perf_counter()
            call()
            took = time.perf_counter() - begin
        else:
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            started.record()
            call()
            ended.record()
            torch.cuda.synchronize(device)
            took = started.elapsed_time(ended) / 1e3
        if number:
            best = min(best, took)
    return best


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a run records of its surroundings, and what decides times beside it: load, C++ compiler, the GPU and its clocks as found."""
    told = describe_environment() | {"load": [round(x, 2) for x in os.getloadavg()], "lacks": missing_compiler()}
    if device.type == "cpu":
        return told
    gpu = torch.cuda.get_device_properties(device)
    return told | {
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "l2_bytes": gpu.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "clocks": _clocks(),
    }


def _clocks() -> str | None:
    """Clocks now and at most, power limit and driver, as ``nvidia-smi`` tells them."""
    wanted = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv"], capture_output=True, text=True, check=True, timeout=20
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
