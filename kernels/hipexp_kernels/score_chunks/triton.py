"""Chunk scores on a GPU: a program for each tile of chunks, key/value head and query block; pooling aside, everything in registers.

Three kernels: descents of one query row (decode) and of several, and the scan of ``exact``, ``grid`` and ``bounds``.
A NaN among the probed keys of a chunk becomes its score.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from hipexp_kernels.dispatch import gpu, require_triton_can
from hipexp_kernels.paged import KV, Box, Paged, Places, in_parts
from hipexp_kernels.rope import ScoreRotation
from hipexp_kernels.score_chunks.probes import probe_step
from hipexp_kernels.score_chunks.runs import probed_runs
from hipexp_kernels.score_chunks.triton_descent import _descend_one_row, _descend_rows
from hipexp_kernels.score_chunks.triton_scan import _scan
from hipexp_kernels.score_chunks.triton_tile import RAW_KEYS, Angles, Keys, Lists, Sizes
from hipexp_kernels.score_chunks.vectorized import score_chunks as vectorized
from hipexp_kernels.summarize import Summaries
from hipexp_kernels.triton_paged import pages_of, pages_types

# What to tune: rows of keys in flight in each program, the warps that share them, and the registers of a thread (fewer let more programs
# run side by side). Without that bound ptxas saves registers by waiting for one key before it asks for the next. Keys that are rotated
# take more of them.
ONE_ROW = dict(keys=64, warps=4, registers=128, registers_rotated=168, stages=1)  # keys: chunks times query heads
FEW_ROWS = dict(keys=64, warps=4, registers=128, registers_rotated=255, stages=1)  # keys: chunks; up to 16 rows
ROWS = FEW_ROWS | dict(registers=168)
# The scan: rows of keys or landmarks that are multiplied at a time with ``columns`` query rows. Up to so many ``tiles`` of them follow each
# other in a program, which loads and rotates its queries once, the next ones on their way (in ``stages``) while one is multiplied.
ONE_ROW_OF_KEYS = dict(keys=64, warps=4, registers=255, registers_rotated=255, stages=1, tiles=1, columns=64)
ONE_ROW_OF_LANDMARKS = ONE_ROW_OF_KEYS | dict(stages=3, tiles=8)
SCAN = dict(keys=64, warps=4, registers=255, registers_rotated=255, stages=3, tiles=16, columns=256)
SCAN_BEFORE_HOPPER = SCAN | dict(columns=64)
PROGRAMS_PER_SM = 4  # so many there shall be before one gets a second tile
# Where the heads of a group lie in tiles of one query row: in the dimension that Triton spreads over the lanes of a warp first, so that
# heads which probe the same key ask for it once, and a thread holds one head's query. Triton 3.7 turned that order round.
HEAD_AXIS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 1


def score_chunks(
    q: Tensor, k: KV, starts: Tensor, counts: Tensor, limits: Tensor, *,
    chunk_tok: int, representative: str, rotation: ScoreRotation | None, summaries: Summaries | None,
) -> Tensor:  # fmt: skip
    """See :func:`hipexp_kernels.score_chunks.score_chunks`. Nothing waits for the device, paged keys aside.

    A descent of one query row multiplies in fp32; all else in the dtype of the keys (fp32 without TF32), to which rotated queries and keys
    are rounded, and sums in fp32. A descent into paged keys does not know what it will ask for, and is ``vectorized``.
    """
    if isinstance(k, Paged) and representative == "descent":
        return vectorized(
            q, k, starts, counts, limits, chunk_tok=chunk_tok, representative=representative, rotation=rotation, summaries=summaries
        )
    require_triton_can("score_chunks", k)
    (H, N, R, D), (K, T, _), C = q.shape, k.shape, starts.shape[2]
    scores = torch.empty(K, N, C, dtype=torch.float32, device=k.device)
    if not scores.numel():
        return scores
    q, counts, limits = q.contiguous(), counts.contiguous(), limits.contiguous()
    starts = starts if starts.stride(2) == 1 else starts.contiguous()
    rotary = 2 * rotation.table.cos.shape[1] if rotation else D // 2 * 2
    mode = rotation.mode if rotation else "none"
    landmarks, first_tok = 0, None
    if summaries is not None and representative == "bounds":
        k, landmarks, first_tok = summaries.rows.flatten(1, 2), 2 * chunk_tok // summaries.piece_tok, summaries.first_tok
    n_sm, hopper = gpu(q.device)
    kernel, tuned, constexprs, options = launch(
        mode, R, H // K, D, rotary, chunk_tok, representative, landmarks, first_tok is not None, k.dtype.itemsize, hopper
    )
    n_tiles = triton.cdiv(C, constexprs["TILE"])
    lists, angles = Lists(starts, counts, limits), _angles(rotation, limits)
    sizes = Sizes(
        list_stride=starts.stride(0) if len(starts) > 1 else 0,
        block_stride=starts.stride(1) if starts.shape[1] > 1 else 0,
        count_stride=N if len(counts) > 1 else 0,
        N=N,
        C=C,
        T=T,
        trained_tok=rotation.trained_tok if rotation else 0,
        scan_window_tok=rotation.scan_window_tok if rotation else 0,
        first_tok=first_tok or 0,
    )
    if isinstance(k, Tensor):
        k = k if k.stride(2) == 1 else k.contiguous()
        more: dict = {}
        if kernel is _scan:
            tiles = max(1, min(tuned["tiles"], N * K * n_tiles // (PROGRAMS_PER_SM * n_sm)))
            n_tiles, more = triton.cdiv(n_tiles, tiles), dict(tiles=tiles, n_from=0, chunk_from=0, UNIT=0)
        kernel[(N, K, n_tiles)](q, Keys(k, k.stride(0), k.stride(1)), lists, angles, scores, *sizes, **more, **constexprs, **options)
        return scores
    tile, runs = constexprs["TILE"], probed_runs(starts, counts, limits, T, chunk_tok, representative)
    for ((first, last), (begin, end)), places in _places(k, runs, (n_tiles, N), tile):
        tiles = max(1, min(tuned["tiles"], last - first, (end - begin) * K * (last - first) // (PROGRAMS_PER_SM * n_sm)))
        at = dict(tiles=tiles, n_from=begin, chunk_from=first * tile, UNIT=places.slots.shape[2])
        grid = end - begin, K, triton.cdiv(last - first, tiles)
        kernel[grid](q, Keys(pages_of(places), 0, 0), lists, angles, scores, *sizes, **at, **constexprs, **options)
    return scores


def _places(k: Paged, runs: tuple[Tensor, Tensor], sizes: tuple[int, int], tile: int) -> Iterator[tuple[Box, Places]]:
    """The tiles of chunks, and the query blocks, whose keys fit on the device at once, and where these lie then.

    A score does not depend on what is scored beside it. Tiles come in order, as a program may write past the last one of its part.
    """

    def bring(part: Box, past: bool) -> Places | None:
        (first, last), (begin, end) = part
        found = k.bring(*(x[:, begin:end, first * tile : last * tile].flatten(1) for x in runs), past=past)
        return found[0] if found else None

    return in_parts(sizes, bring)


def _angles(rotation: ScoreRotation | None, unused: Tensor) -> Angles:
    """``unused``: a tensor to point at where nothing is rotated."""
    if rotation is None:
        return Angles(*[unused] * 5)
    table, others = rotation.table, (rotation.position, rotation.first, rotation.last)
    return Angles(*(x.contiguous() for x in (table.cos, table.sin, *others)))


def launch(
    mode: str, rows: int, group: int, dim: int, rotary: int, chunk_tok: int, representative: str, landmarks: int, listed: bool,
    itemsize: int, hopper: bool,
) -> tuple:  # fmt: skip
    """The kernel for ``rows`` query rows a block, what it was tuned to, its constexpr arguments and the compiler options.

    ``landmarks``: of a chunk; ``listed``: chunks with landmarks may be anywhere.
    ``itemsize``: bytes of a number of the keys; ``hopper``: the GPU is of that kind (:func:`dispatch.gpu`).
    """
    constexprs = dict(MODE=mode, GROUP=group, HALF=rotary // 2, REST=dim - rotary, CHUNK=chunk_tok)
    padded = max(16, triton.next_power_of_2(rotary // 2)) + (max(16, triton.next_power_of_2(dim - rotary)) if dim > rotary else 0)
    wide = triton.next_power_of_2(max(1, padded // 64))  # the registers hold fewer rows of more than 128 dimensions
    heavy = wide * (max(2, itemsize) // 2)  # and fewer that are multiplied in fp32,
    heavy *= 1 if heavy == 1 or mode in RAW_KEYS else 2  # above all if angles take registers too
    if representative in ("exact", "grid", "bounds"):
        step = 0 if landmarks else probe_step(representative, chunk_tok)
        kernel, each, tuned = _scan, landmarks or chunk_tok // step, SCAN if hopper else SCAN_BEFORE_HOPPER
        if rows == 1:
            tuned = ONE_ROW_OF_LANDMARKS if landmarks else ONE_ROW_OF_KEYS
        if mode not in RAW_KEYS:
            tuned = tuned | dict(stages=1, columns=min(64, tuned["columns"]))  # angles take shared memory and registers too
        together = min(each, tuned["keys"] // heavy)
        whole = itemsize == 2 and 2 * padded == rotary == dim  # products of tiles with padding, and of fp32, take more registers
        columns = min(max(16, triton.next_power_of_2(group * rows)), max(16, min(tuned["columns"], 256 if whole else 128) // heavy))
        tile = max(16 // together, tuned["keys"] // heavy // together, 1)
        constexprs |= dict(ROWS=rows, COLUMNS=columns, STEP=step, LISTED=listed, EACH=each, TOGETHER=together, TILE=tile)
    elif rows == 1:
        kernel, tuned = _descend_one_row, ONE_ROW
        constexprs |= dict(TILE=max(1, tuned["keys"] // wide // triton.next_power_of_2(group)), HEAD_AXIS=HEAD_AXIS)
    else:
        kernel, tuned = _descend_rows, FEW_ROWS if rows <= 16 else ROWS
        constexprs |= dict(ROWS=rows, TILE=max(16, tuned["keys"] // heavy))
    options = dict(num_warps=tuned["warps"] * (2 if rows > 1 and heavy > 2 else 1), num_stages=tuned["stages"])
    if torch.version.hip is None:
        options["maxnreg"] = tuned["registers" if mode in RAW_KEYS else "registers_rotated"]
    return kernel, tuned, constexprs, options


def aot_cases(dtype: str, dim: int, group: int, hopper: bool) -> Iterator[tuple[str, triton.JITFunction, dict, dict, dict]]:
    """What ``hipexp_kernels.aot`` compiles: name, kernel, types, constants, options."""
    types = dict(
        q=f"*{dtype}",
        keys=Keys(f"*{dtype}", "i32:16", "i32:16"),
        lists=Lists("*i64", "*i64", "*i64"),
        angles=Angles("*fp32", "*fp32", "*i64", "*i64", "*i64"),
        scores="*fp32",
    )
    modes = dict(descent=("relative", "rank", "dynamic"), grid=("relative",), exact=("relative",), bounds=("relative", "rank"))
    modes["bounds, listed"] = ("relative", "rank")
    rows_of = dict(exact=(1, 16, 64))
    for representative, mode, rows in ((r, mode, rows) for r in modes for mode in modes[r] for rows in rows_of.get(r, (1, 16))):
        scored_by, listed = representative.split(",")[0], "listed" in representative
        landmarks = (2 if listed else 16) if scored_by == "bounds" else 0  # in pieces of 32 tokens
        kernel, _, constants, options = launch(
            mode, rows, group, dim, dim, 256 if landmarks == 16 else 32, scored_by, landmarks, listed, 4 if dtype == "fp32" else 2, hopper
        )
        known, name = dict.fromkeys(kernel.arg_names, "i32") | types, f"{representative} {mode}, {rows} rows"
        yield name, kernel, known, constants | (dict(UNIT=0) if kernel is _scan else {}), options
        if (dtype, dim, rows) in (("bf16", 128, 1), ("bf16", 128, 16)) and representative in ("exact", "grid"):
            paged = Keys(pages_types(dtype), "i32:16", "i32:16")
            yield f"{name}, paged", kernel, known | dict(keys=paged), constants | dict(UNIT=8), options
