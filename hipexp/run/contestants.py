"""Dense attention as fast as this machine can do it: what every speed figure of attention alone is measured against.

A contestant does one layer of one sequence: decode takes ``q`` ``[H, D]``, prefill ``q`` ``[H, Q, D]`` (the last ``Q`` of ``T`` tokens,
``Q = T`` for a whole prompt), both ``k``, ``v`` ``[K, T, D]``, rotated already; it returns the shape of ``q``. None of them
materialises a mask or copies keys per query head, except those of the newest ``Q`` tokens. The denominator of a speedup is the
fastest of them: ``fastest(time_alternating(...))``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hipexp_kernels import attend_blocks, merge_lse
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hipexp.report.tables import markdown_table
from hipexp.run.environment import describe_environment
from hipexp.run.latency import quantile

LOG = logging.getLogger("hipexp")
FLEX_BLOCK_TOK = 128
TILE_LOGITS = 1 << 24  # logits of a tile of the matmul prefill: 64 MiB in fp32
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


# -- decode ------------------------------------------------------------------------------------------------------------------------


def decode_contestants(device: torch.device) -> list[Contestant]:
    """Attention of one query ``[H, D]`` over all keys.

    A key/value head's query heads are rows of one product, so keys are read once; ``enable_gqa`` does that on a GPU only.
    """
    common = [Contestant("matmuls packed", _decode_matmuls), Contestant("flex packed", _decode_flex, missing_compiler)]
    if device.type == "cpu":
        return [Contestant("sdpa packed", _decode_sdpa), *common]
    packed = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    return [
        *(Contestant(f"sdpa {name} packed", partial(_decode_sdpa, backend=backend)) for name, backend in packed.items()),
        Contestant("sdpa flash gqa", _decode_flash_gqa),
        *common,
        Contestant("attend_blocks triton", _decode_own),
    ]


def _packed(q: Tensor, k: Tensor) -> Tensor:
    """Queries ``[H, ..., D]`` as rows ``[K, rows, D]`` of their key/value heads."""
    return q.reshape(k.shape[0], -1, q.shape[-1])


def _decode_sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    rows = _packed(q, k)[None]
    if backend is None:
        return F.scaled_dot_product_attention(rows, k[None], v[None])[0].view(q.shape)
    with sdpa_kernel(backend):  # refuses, rather than falling back
        return F.scaled_dot_product_attention(rows, k[None], v[None])[0].reshape(q.shape)


def _decode_flash_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]


def _decode_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (_packed(q, k) * q.shape[-1] ** -0.5) @ k.mT
    return (torch.softmax(logits, -1, dtype=torch.float32).to(v.dtype) @ v).view(q.shape)


def _decode_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(_packed(q, k)[None], k[None], v[None])[0].reshape(q.shape)


def _decode_own(q: Tensor, k: Tensor, v: Tensor, impl: str = "triton") -> Tensor:
    """Our kernel with nothing pruned: an endless window, by which it also decides over how many programs keys are split."""
    out, _ = attend_blocks(
        q.view(len(q), 1, 1, -1), k, v, *_nothing_selected(k.shape[1], q.device),
        block_tok=16, sink_tok=0, window_tok=1 << 30, scale=q.shape[-1] ** -0.5, impl=impl,
    )  # fmt: skip
    return out.view(q.shape)


@cache
def _nothing_selected(n_tok: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``blocks``, ``counts``, ``first`` and ``exact`` of the last query; made once, as a model's layers share them."""
    blocks, counts = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((1, 1, 0), (1, 1)))
    return blocks, counts, torch.full((1,), n_tok - 1, device=device), torch.ones(1, dtype=torch.bool, device=device)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for the exact shapes it meets; with ``fullgraph`` it fails rather than running uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 256  # lengths times geometries of a process
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def missing_compiler() -> str | None:
    """What ``torch.compile`` lacks for a CPU: it writes C++."""
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler"


# -- prefill -----------------------------------------------------------------------------------------------------------------------

Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def prefill_contestants(device: torch.device) -> list[Contestant]:
    """Causal attention of the last ``Q`` queries ``[H, Q, D]``: query ``r`` stands at position ``T - Q + r``."""
    if device.type == "cpu":
        return [
            Contestant("flash, prefix + diagonal", partial(_prefill_in_two, _flash_cpu)),
            Contestant("matmuls in tiles", _prefill_matmuls),
        ]
    return [
        Contestant("flash, lower right", _prefill_flash),
        Contestant("flash, prefix + diagonal", partial(_prefill_in_two, _flash)),
        Contestant("cudnn, prefix + diagonal", partial(_prefill_in_two, _cudnn)),
        Contestant("flex, lower right", _prefill_flex),
    ]


def _prefill_in_two(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything before the first query without a mask, the rest as a square, joined by log-sum-exp.

    For kernels whose ``is_causal`` means the upper left corner, or that refuse it when there are more keys than queries.
    """
    H, Q, _ = q.shape
    K, T, _ = k.shape
    own_k, own_v = (x[:, T - Q :].repeat_interleave(H // K, 0) for x in (k, v))
    own, own_lse = attend(q, own_k, own_v, True)
    if T == Q:
        return own
    far, far_lse = attend(_packed(q, k), k[:, : T - Q], v[:, : T - Q], False)
    return merge_lse([far.reshape(q.shape), own], [far_lse.reshape(H, Q), own_lse])[0]


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], is_causal=causal)
    return out[0], lse[0].float()


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q[None], k[None], v[None], is_causal=causal)
    return out[0], lse[0]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q[None], k[None], v[None], None, True, is_causal=causal)
    return out[0], lse.reshape(q.shape[:2])  # torch 2.9 gave it a last dimension of 1


def _prefill_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call. ``is_causal`` of this operator means the lower right corner; ``causal_lower_right`` of torch ends up here too.

    But that one, where flash attention cannot run, materialises a mask of ``Q * T`` for the math path. This one raises.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q[None], k[None], v[None], is_causal=True)[0][0]


def _prefill_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask's block table, which all layers of a model share, is made once for its shape and not timed."""
    mask = lower_right(q.shape[1], k.shape[1], q.device)
    return _compiled_flex()(q[None], k[None], v[None], block_mask=mask, enable_gqa=True)[0]


@cache
def lower_right(n_queries: int, n_tok: int, device: torch.device) -> Any:
    """The causal ``BlockMask`` of the last ``n_queries`` of ``n_tok`` tokens, counted out: torch would evaluate all ``Q * T`` entries."""
    from torch.nn.attention.flex_attention import BlockMask

    size, offset = FLEX_BLOCK_TOK, n_tok - n_queries
    begin = torch.arange(0, n_queries, size, device=device)
    block = torch.arange(-(-n_tok // size), device=device)
    last = (begin + size).clamp(max=n_queries) - 1 + offset  # newest key that a row of the block sees
    full = (begin + offset + 1) // size  # blocks that its first row sees to their end
    partial_blocks = (full[:, None] + block).clamp(max=len(block) - 1)
    every = block.expand(len(begin), -1)
    counts = [x.to(torch.int32)[None, None] for x in (last // size + 1 - full, full)]
    lists = [x.to(torch.int32).contiguous()[None, None] for x in (partial_blocks, every)]

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + offset

    return BlockMask.from_kv_blocks(
        counts[0], lists[0], counts[1], lists[1], BLOCK_SIZE=size, mask_mod=sees, seq_lengths=(n_queries, n_tok)
    )  # fmt: skip


def _prefill_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As many queries at a time as keep the logits in bounds; later queries of a tile are masked in its last columns."""
    H, Q, D = q.shape
    T = k.shape[1]
    step, out = max(1, TILE_LOGITS // (H * T)), torch.empty_like(q)
    for begin in range(0, Q, step):
        tile = q[:, begin : begin + step]
        n = tile.shape[1]
        seen = T - Q + begin + n
        logits = ((_packed(tile, k) * D**-0.5) @ k[:, :seen].mT).view(H, n, seen)
        logits[:, :, seen - n :].masked_fill_(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
        weight = torch.softmax(logits, -1, dtype=torch.float32).to(v.dtype)
        out[:, begin : begin + n] = (_packed(weight, k) @ v[:, :seen]).view(tile.shape)
    return out


# -- timing ------------------------------------------------------------------------------------------------------------------------


def runnable(contestants: Sequence[Contestant], inputs: tuple) -> tuple[list[Contestant], dict[str, str]]:
    """Those that run on these inputs, after running each once (and compiling it), and why the others do not."""
    able, reasons = [], {}
    for contestant in contestants:
        reason = contestant.missing()
        if reason is None:
            try:
                contestant.run(*inputs)
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
    read = min(_seconds(reduce, device, repeats) for reduce in (source.sum, source.amax))
    copy = _seconds(lambda: target.copy_(source), device, repeats)
    return {"read": n_bytes / read / 1e9, "copy": 2 * n_bytes / copy / 1e9}


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The shortest time of a call, the first one left out."""
    best = float("inf")
    for number in range(repeats + 1):
        if device.type == "cpu":
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
        else:
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            started.record()
            call()
            ended.record()
            torch.cuda.synchronize(device)
            seconds = started.elapsed_time(ended) / 1e3
        if number:
            best = min(best, seconds)
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


# -- results -----------------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table: a column for every key, numbers with four digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return markdown_table(names, [[_cell(row.get(name)) for name in names] for row in rows])


def _cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def write_rows(stem: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write ``<stem>.json``, with ``about`` beside the ``rows``, and ``<stem>.md``, the rows alone."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps({"about": about, "rows": list(rows)}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(table(rows) + "\n", encoding="utf-8")
