"""One pass over a packed list of keys (sinks, selected blocks, window), the query heads of a key/value head in one tile.

Few queries: the list is split over programs, and the last of them to finish merges their results. Work follows the number of
keys a block attends to, never ``T``; nothing is read back by the host, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.attend_blocks import triton_decode
from hipexp_kernels.attend_blocks.members import each_member
from hipexp_kernels.attend_blocks.runs import attended_runs
from hipexp_kernels.attend_blocks.triton_tile import (
    Angles,
    Keys,
    Lists,
    Parts,
    Queries,
    Results,
    Sizes,
    _angle,
    _arrive,
    _finish,
    _key_angle,
    _keys_values,
    _logits,
    _merged,
    _piece,
    _pieces,
    _products,
    _query_angle,
    _span,
    _store,
    _store_part,
    _tokens,
    _turned,
    _update,
    padded,
)
from hipexp_kernels.dispatch import gpu, require, require_triton_can
from hipexp_kernels.paged import KV, Box, Paged, in_parts
from hipexp_kernels.rope import AttendRotation
from hipexp_kernels.triton_paged import _base, _row, pages_of, pages_types

MODES = ("streaming", "infllm", "native", "dynamic")
N_TICKETS = 65536


# -- the kernel --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "T", "M", "n_angles", "n_from"])
def _attend(
    queries, kv, lists, angles, results, parts, K, N, T, M, per_head, n_angles, scale, n_from,
    G: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, MODE: tl.constexpr, TRAINED: tl.constexpr,
    BLOCK_TOK: tl.constexpr, SINK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LIST_TILE: tl.constexpr,
    SHIFT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (G * Q + ROWS - 1) // ROWS
    sizes = Sizes(K, N, T, M, per_head, n_angles)
    program = tl.program_id(0)
    tile, split, group = program % TILES, program // TILES % SPLITS, program // (TILES * SPLITS)
    if UNIT > 0:
        group += n_from * sizes.K
    head, n = group % sizes.K, group // sizes.K
    list_at = head * sizes.per_head * sizes.N + n
    TURN_BACK: tl.constexpr = SHIFT & (Q == 1)
    local = (0.0, 0.0)
    if SHIFT:
        local = _angle(angles, sizes, tl.arange(0, KEYS), HALF)
    span = _span(lists, sizes, n, list_at, SINK, WINDOW, BLOCK_TOK, LIST_TILE)

    row = tile * ROWS + tl.arange(0, ROWS)
    r = row % Q
    q_at = (head * G + row // Q).to(tl.int64) * queries.head + n.to(tl.int64) * queries.block + r * queries.row
    q_raw = _pieces(queries.q, q_at, row < G * Q, D, HALF)
    q = q_raw
    if (HALF > 0) & (not TURN_BACK):
        q = _turned(q_raw, _query_angle(angles, sizes, 0, r, span, MODE, HALF))
    k, v = _keys_values(kv, UNIT)
    k_head, v_head = _base(k, kv.k_head, head, UNIT), _base(v, kv.v_head, head, UNIT)

    state = (tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, padded(D)], tl.float32))
    n_before = span.n_far + span.first - span.near
    n_shared = n_before + 1 if Q == 1 else n_before  # keys that all rows attend to; a single query is one of them
    share = ((n_shared + SPLITS - 1) // SPLITS + 15) // 16 * 16
    end = tl.minimum(n_shared, (split + 1) * share)
    for begin in range(split * share, end, KEYS):
        j = begin + tl.arange(0, KEYS)
        token, inside = _tokens(j, span, lists, sizes, list_at, BLOCK_TOK), j < end
        values = _piece(v_head, _row(v, kv.v_tok, token, head, UNIT, D), inside, 0, D)
        keys = _pieces(k_head, _row(k, kv.k_tok, token, head, UNIT, D), inside, D, HALF)
        if HALF > 0:
            keys = _turned(keys, _key_angle(angles, sizes, local, begin, token, span, MODE, Q, WINDOW, TRAINED, KEYS, SHIFT, HALF))
            if TURN_BACK:
                q = _turned(q_raw, _query_angle(angles, sizes, begin, tl.zeros([1], tl.int32), span, MODE, HALF))
        logits = _logits(_products(q, keys, D, HALF), scale, SOFTCAP)
        state = _update(state, tl.where(inside[None, :], logits, float("-inf")), values)

    if Q > 1:
        if split == SPLITS - 1:
            for begin in range(0, Q, KEYS):
                own = begin + tl.arange(0, KEYS)
                token, inside = span.first + own, (own < Q) & (span.first + own < sizes.T)
                values = _piece(v_head, _row(v, kv.v_tok, token, head, UNIT, D), inside, 0, D)
                keys = _pieces(k_head, _row(k, kv.k_tok, token, head, UNIT, D), inside, D, HALF)
                if HALF > 0:
                    at = n_before + begin
                    keys = _turned(keys, _key_angle(angles, sizes, local, at, token, span, MODE, Q, WINDOW, TRAINED, KEYS, SHIFT, HALF))
                logits = _logits(_products(q, keys, D, HALF), scale, SOFTCAP)
                state = _update(state, tl.where(inside[None, :] & (own[None, :] <= r[:, None]), logits, float("-inf")), values)

    out, lse = _finish(state)
    if SPLITS == 1:
        _store(results, out, lse, row, head, n, sizes.N, G, Q, D)
    else:
        _store_part(parts, out, lse, row, group * SPLITS + split, G * Q, D)
        if _arrive(parts, group, SPLITS * TILES):
            all_out, all_lse = _merged(parts, group, SPLITS, G * Q, AT_ONCE, D)
            _store(results, all_out, all_lse, tl.arange(0, triton.next_power_of_2(G * Q)), head, n, sizes.N, G, Q, D)


# -- launching ---------------------------------------------------------------------------------------------------------------------


class Tuning(NamedTuple):
    """``rows`` at most and ``keys`` of a tile, warps, stages (two for each tile of keys in flight: its list, then its rows).

    ``shift``: ``streaming`` angles come from a few rows of the table held in registers, not from a row for every key.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    shift: bool = True


PROGRAMS_PER_SM = 2  # keys are split until so many programs run
DECODE = Tuning(64, 64, 4, 5)
PREFILL = Tuning(128, 64, 8, 5)
PREFILL_BEFORE_HOPPER = Tuning(64, 32, 4, 3)
WIDE = Tuning(64, 32, 8, 3)  # heads of more than 128
FP32 = Tuning(32, 32, 8, 1)
PAGED_STAGES = 3  # at most: with more of them, what is under way for paged keys takes more registers than there are
MERGE_AT_ONCE = 8192  # numbers of the parts that the merging program holds at a time


def launch(
    G: int, Q: int, D: int, half: int, mode: str, M: int, n_groups: int, max_keys: int, itemsize: int, n_sm: int, hopper: bool
) -> tuple[dict, dict]:
    """Tile sizes (constexprs) and compiler options for a call.

    ``n_groups``: query blocks times key/value heads; ``max_keys``: what a block attends to at most, exact blocks left aside;
    ``itemsize``: bytes of a number; ``n_sm``: multiprocessors of the GPU; ``hopper``: it is of that kind (:func:`dispatch.gpu`).
    """
    n_rows = G * Q
    if itemsize == 4:
        tuning = FP32
    elif D > 128:
        tuning = WIDE
    elif n_rows <= DECODE.rows:
        tuning = DECODE
    else:
        tuning = PREFILL if hopper else PREFILL_BEFORE_HOPPER
    rows = min(padded(n_rows), tuning.rows)
    merge_rows = triton.next_power_of_2(n_rows)
    splits = 1
    if merge_rows <= 64:  # the program that merges holds all rows
        n_tiles = triton.cdiv(max_keys, tuning.keys)
        wanted = max(1, PROGRAMS_PER_SM * n_sm // max(1, n_groups * triton.cdiv(n_rows, rows)))
        splits = triton.cdiv(n_tiles, triton.cdiv(n_tiles, wanted))
    at_once = max(1, min(triton.next_power_of_2(splits), MERGE_AT_ONCE // (merge_rows * padded(D))))
    shift = tuning.shift and half > 0 and mode == "streaming"
    tile = dict(
        LIST_TILE=min(512, padded(M)), SHIFT=shift, ROWS=rows, KEYS=tuning.keys, SPLITS=splits, AT_ONCE=at_once,
    )  # fmt: skip
    stages = tuning.num_stages if hopper else min(3 if D <= 128 else 2, tuning.num_stages)  # what shared memory holds
    if half > 0 and not shift:  # the angles of the keys need shared memory too
        stages = min(3, stages) if hopper and D <= 128 else 1
    return tile, dict(num_warps=tuning.num_warps, num_stages=stages)


def kernel_for(G, Q, D, half, mode, M, block, sink, window, n_groups, itemsize, n_sm, hopper) -> tuple[Any, dict, dict]:
    """Kernel, tile sizes and compiler options for a call."""
    found = triton_decode.launch(G, D, half, mode, M, block, sink, window, n_groups, itemsize, n_sm) if Q == 1 else None
    if found:
        return triton_decode._attend_one, *found
    return _attend, *launch(G, Q, D, half, mode, M, n_groups, sink + M * block + window, itemsize, n_sm, hopper)


def for_pages(options: dict) -> dict:
    """Compiler options where keys are paged; they change no result."""
    return options | dict(num_stages=min(PAGED_STAGES, options["num_stages"]))


@cache
def tickets(device: torch.device) -> Tensor:
    """Counters that are 0 between calls. Calls on one device must not overlap: they belong on one stream."""
    require(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "attend_blocks: call it once before it is captured in a CUDA graph",
    )
    return torch.zeros(N_TICKETS, dtype=torch.int32, device=device)


def attend_blocks(
    q: Tensor, k: KV, v: KV, blocks: Tensor, counts: Tensor, first: Tensor, exact: Tensor, *,
    block_tok: int, sink_tok: int, window_tok: int, scale: float, rotation: AttendRotation | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    require_triton_can("attend_blocks", q)
    mode = rotation.mode if rotation else "none"
    require(mode in (*MODES, "none"), f"attention rotation {mode!r} is unknown; use {', '.join(MODES)}")
    H, N, Q, D = q.shape
    K, T, _ = k.shape
    S, _, M = blocks.shape
    sizes = dict(block_tok=block_tok, sink_tok=sink_tok, window_tok=window_tok)
    if S > K:
        return each_member(attend_blocks, q, k, v, blocks, counts, first, exact, **sizes, scale=scale, rotation=rotation, softcap=softcap)
    q = q if q.stride(-1) == 1 else q.contiguous()
    blocks, counts, first, exact = (x.contiguous() for x in (blocks, counts, first, exact))
    cos, sin = (rotation.table.cos.contiguous(), rotation.table.sin.contiguous()) if rotation else (first, first)
    half = cos.shape[1] if rotation else 0
    n_sm, hopper = gpu(q.device)
    kernel, tile, options = kernel_for(H // K, Q, D, half, mode, M, block_tok, sink_tok, window_tok, N * K, q.element_size(), n_sm, hopper)
    splits = tile["SPLITS"]
    out, lse = torch.empty((H, N, Q, D), dtype=q.dtype, device=q.device), torch.empty((H, N, Q), device=q.device)
    parts = Parts(out, lse, lse)  # not used
    if splits > 1:
        n_rows = N * H * Q * splits
        parts = Parts(torch.empty((n_rows, D), device=q.device), torch.empty(n_rows, device=q.device), tickets(q.device))
    n_tiles = triton.cdiv(H // K * Q, tile["ROWS"])
    runs = (blocks, counts, first, exact, Q)
    for begin, end, unit_tok, kv in _keys_of(k, v, N, runs, sizes):
        n = end - begin
        kernel[(splits, K, n) if kernel is triton_decode._attend_one else (n * K * splits * n_tiles,)](
            Queries(q, q.stride(0), q.stride(1), q.stride(2)),
            kv,
            Lists(blocks, counts, first, exact),
            Angles(cos, sin),
            Results(out, lse),
            parts,
            *Sizes(K, N, T, M, int(S > 1), cos.shape[0]),
            scale,
            begin,
            G=H // K, Q=Q, D=D, HALF=half, MODE=mode, TRAINED=rotation.trained_tok if rotation else 0,
            BLOCK_TOK=block_tok, SINK=sink_tok, WINDOW=window_tok, SOFTCAP=softcap or 0.0, UNIT=unit_tok,
            **tile,
            **(for_pages(options) if unit_tok else options),
        )  # fmt: skip
    return out, lse


def _keys_of(k: KV, v: KV, N: int, runs: tuple, sizes: dict) -> Iterator[tuple[int, int, int, Keys]]:
    """From which query block to which, and the keys and values that they read, brought if they are paged: all of them, or as many as fit.

    Blocks do not depend on each other, and tiles are cut as if there was one part. ``runs`` and ``sizes``: see :func:`attended_runs`.
    """
    if isinstance(k, Tensor) and isinstance(v, Tensor):
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        yield 0, N, 0, Keys(k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        return
    require(isinstance(k, Paged) and isinstance(v, Paged), "attend_blocks: keys and values must both be tensors or both paged")
    assert isinstance(k, Paged) and isinstance(v, Paged)
    keys, values = k, v
    begins, ends = attended_runs(*runs, **sizes)

    def bring(part: Box, past: bool) -> tuple | None:
        some = slice(*part[0])
        return keys.bring(begins[:, some].flatten(1), ends[:, some].flatten(1), values, past=past)

    for ((begin, end),), (of_keys, of_values) in in_parts((N,), bring):
        yield begin, end, of_keys.slots.shape[2], Keys(pages_of(of_keys), of_values.newest, 0, 0, 0, 0)


def aot_cases(dtype: str, dim: int, group: int, hopper: bool) -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What ``hipexp_kernels.aot`` compiles: name, kernel, types, constants, options. With ``3stage``'s sizes."""
    itemsize = 4 if dtype == "fp32" else 2
    pages, strides = pages_types(dtype), ["i64:16"] * 4
    for name, Q, N, exact in (("decode", 1, 1, "*i64"), ("prefill", 64, 512, "*i1")):
        types = dict(
            queries=Queries(f"*{dtype}", *["i64:16"] * 3),
            kv=Keys(f"*{dtype}", f"*{dtype}", *strides),
            lists=Lists("*i64", "*i64", "*i64", exact),
            angles=Angles("*fp32", "*fp32"),
            results=Results(f"*{dtype}", "*fp32"),
            parts=Parts("*fp32", "*fp32", "*i32"),
            **dict.fromkeys(("K", "N", "T", "M", "per_head", "n_angles", "n_from"), "i32"),
            scale="fp32",
        )
        for mode in ("streaming", "dynamic", "none"):
            half = 0 if mode == "none" else dim // 2
            kernel, tile, options = kernel_for(group, Q, dim, half, mode, 256, 8, 256, 1024, 8 * N, itemsize, 132, hopper)
            constants = dict(G=group, Q=Q, D=dim, HALF=half, MODE=mode, TRAINED=131072, BLOCK_TOK=8, SINK=256, WINDOW=1024, SOFTCAP=0.0)
            yield f"{name} {mode}", kernel, types, constants | tile | dict(UNIT=0), options
            if (dtype, dim, mode) == ("bf16", 128, "streaming"):
                yield (
                    f"{name} {mode}, paged",
                    kernel,
                    types | dict(kv=Keys(pages, f"*{dtype}", *strides)),
                    constants | tile | dict(UNIT=8),
                    for_pages(options),
                )
