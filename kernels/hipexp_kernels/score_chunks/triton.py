"""Chunk scores on a GPU: a program for each tile of chunks, key/value head and query block; pooling aside, everything in registers.

Three kernels. Descents of one query row (decode) wait for keys, not for arithmetic: every query head of the group walks all chunks of the
tile at once, and products are sums on the ordinary cores. Descents of several rows (prefill) take the heads one after the other and
multiply on the tensor cores. The scan reads every key that it probes (``exact``, ``grid``), or every landmark (``bounds``), once for all
rows and heads of the group.

Dimensions are held as the first halves of the rotated pairs, their second halves, and the rest, each padded to a power of two.
A NaN among the probed keys of a chunk becomes its score.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from hipexp_kernels.dispatch import gpu, require_triton_can
from hipexp_kernels.rope import ScoreRotation
from hipexp_kernels.score_chunks.probes import probe_step
from hipexp_kernels.summarize import Summaries

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
RAW_KEYS = ("none", "relative", "infllm")  # modes that leave keys as they are


def score_chunks(
    q: Tensor, k: Tensor, starts: Tensor, counts: Tensor, limits: Tensor, *,
    chunk_tok: int, representative: str, rotation: ScoreRotation | None, summaries: Summaries | None,
) -> Tensor:  # fmt: skip
    """See :func:`hipexp_kernels.score_chunks.score_chunks`. Nothing waits for the device.

    A descent of one query row multiplies in fp32; all else in the dtype of the keys (fp32 without TF32), to which rotated queries and keys
    are rounded, and sums in fp32.
    """
    require_triton_can("score_chunks", k)
    (H, N, R, D), (K, T, _), C = q.shape, k.shape, starts.shape[2]
    scores = torch.empty(K, N, C, dtype=torch.float32, device=k.device)
    if not scores.numel():
        return scores
    q, counts, limits = q.contiguous(), counts.contiguous(), limits.contiguous()
    k = k if k.stride(2) == 1 else k.contiguous()
    starts = starts if starts.stride(2) == 1 else starts.contiguous()
    rotary = 2 * rotation.table.cos.shape[1] if rotation else D // 2 * 2
    mode = rotation.mode if rotation else "none"
    landmarks = 0
    if summaries is not None and representative == "bounds":
        k, landmarks = summaries.rows.flatten(1, 2), 2 * chunk_tok // summaries.piece_tok
    n_sm, hopper = gpu(k.device)
    kernel, tuned, constexprs, options = launch(mode, R, H // K, D, rotary, chunk_tok, representative, landmarks, k.element_size(), hopper)
    n_tiles, more = triton.cdiv(C, constexprs["TILE"]), {}
    if kernel is _scan:
        more["tiles"] = tiles = max(1, min(tuned["tiles"], N * K * n_tiles // (PROGRAMS_PER_SM * n_sm)))
        n_tiles = triton.cdiv(n_tiles, tiles)
    kernel[(N, K, n_tiles)](
        q, k, starts, counts, limits, scores, *_rotation_arguments(rotation), k.stride(0), k.stride(1),
        starts.stride(0) if len(starts) > 1 else 0, starts.stride(1) if starts.shape[1] > 1 else 0, N if len(counts) > 1 else 0,
        N, C, T, **more, **constexprs, **options,
    )  # fmt: skip
    return scores


def _rotation_arguments(rotation: ScoreRotation | None) -> tuple:
    if rotation is None:
        return None, None, None, None, None, 0, 0
    table = rotation.table
    ints = rotation.position.contiguous(), rotation.first.contiguous(), rotation.last.contiguous()
    return table.cos.contiguous(), table.sin.contiguous(), *ints, rotation.trained_tok, rotation.scan_window_tok


def launch(
    mode: str, rows: int, group: int, dim: int, rotary: int, chunk_tok: int, representative: str, landmarks: int, itemsize: int,
    hopper: bool,
) -> tuple:  # fmt: skip
    """The kernel for ``rows`` query rows a block, what it was tuned to, its constexpr arguments and the compiler options.

    ``landmarks``: of a chunk; ``itemsize``: bytes of a number of the keys; ``hopper``: the GPU is of that kind (:func:`dispatch.gpu`).
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
        constexprs |= dict(ROWS=rows, COLUMNS=columns, STEP=step, EACH=each, TOGETHER=together, TILE=tile)
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
        q_ptr=f"*{dtype}", k_ptr=f"*{dtype}", starts_ptr="*i64", counts_ptr="*i64", limits_ptr="*i64", scores_ptr="*fp32",
        cos_ptr="*fp32", sin_ptr="*fp32", position_ptr="*i64", first_ptr="*i64", last_ptr="*i64",
        k_stride_h="i32:16", k_stride_t="i32:16",
    )  # fmt: skip
    modes = dict(descent=("relative", "rank", "dynamic"), grid=("relative",), exact=("relative",), bounds=("relative", "rank"))
    rows_of = dict(exact=(1, 16, 64))
    for representative, mode, rows in ((r, mode, rows) for r in modes for mode in modes[r] for rows in rows_of.get(r, (1, 16))):
        landmarks = 8 if representative == "bounds" else 0
        kernel, _, constants, options = launch(
            mode, rows, group, dim, dim, 256 if landmarks else 32, representative, landmarks, 4 if dtype == "fp32" else 2, hopper
        )
        yield f"{representative} {mode}, {rows} rows", kernel, dict.fromkeys(kernel.arg_names, "i32") | types, constants, options


# Of the integers only the strides of the keys say something about alignment; the others would only bring more variants.
_PLAIN = ["starts_stride_s", "starts_stride_n", "counts_stride_s", "N", "C", "T", "trained_tok", "scan_window_tok"]


@triton.jit(do_not_specialize=_PLAIN)
def _descend_one_row(
    q_ptr,  # [H, N, 1, D]
    k_ptr,  # [K, T, D]
    starts_ptr,  # [S or 1, N or 1, C]
    counts_ptr,  # [S, N]
    limits_ptr,  # [N]
    scores_ptr,  # [K, N, C] fp32
    cos_ptr,  # [P, HALF] fp32
    sin_ptr,
    position_ptr,  # [N, 1]
    first_ptr,  # [N]
    last_ptr,  # [N]
    trained_tok,
    scan_window_tok,
    k_stride_h,
    k_stride_t,
    starts_stride_s,
    starts_stride_n,
    counts_stride_s,
    N,
    C,
    T,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_AXIS: tl.constexpr,
):
    n, kv, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rank = tile * TILE + tl.arange(0, TILE)
    scores_ptr += (kv * N + n).to(tl.int64) * C
    count = tl.load(counts_ptr + kv * counts_stride_s + n)
    if tile * TILE >= count:
        tl.store(scores_ptr + rank, tl.full([TILE], float("-inf"), tl.float32), mask=rank < C)
        return
    starts_ptr += kv.to(tl.int64) * starts_stride_s + n.to(tl.int64) * starts_stride_n
    low, size, present = _chunks(starts_ptr, rank, count, _limit(limits_ptr, n, T), CHUNK)
    first, last = _block(first_ptr, last_ptr, n, MODE)
    k_ptr += kv.to(tl.int64) * k_stride_h

    # Tiles are [heads, chunks, dimensions], or with ``HEAD_AXIS`` 1 [chunks, heads, dimensions].
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    head = tl.minimum(tl.arange(0, HEADS), GROUP - 1)  # padding repeats the last one
    row = tl.expand_dims((kv * GROUP + head) * N + n, 1 - HEAD_AXIS)[:, :, None]
    at = _query_position(position_ptr, n, 0, count, scan_window_tok, 1, MODE)
    r1, r2, r3 = _query(q_ptr, row, cos_ptr, sin_ptr, at, MODE, HALF, REST, 1)
    l1, l2, l3 = r1, r2, r3
    if MODE == "relative":
        l1, l2, l3 = _query(q_ptr, row, cos_ptr, sin_ptr, at + 1, MODE, HALF, REST, 1)

    rank, present = tl.expand_dims(rank, HEAD_AXIS), tl.expand_dims(present, HEAD_AXIS)
    best = tl.full([TILE, HEADS] if HEAD_AXIS else [HEADS, TILE], float("-inf"), tl.float32)
    low = tl.broadcast_to(tl.expand_dims(low, HEAD_AXIS), best.shape)
    size = tl.broadcast_to(tl.expand_dims(size, HEAD_AXIS), best.shape)
    for depth in range(_depth(CHUNK)):
        half = size // 2
        left, right = low + half // 2, low + half + (size - half) // 2
        left_exists = present & (size > 1)
        right_exists = present & ((size > 1) | (depth == 0))  # a chunk of one token is probed once, as a right half
        # Both are on their way before either is waited for.
        a1, a2, a3 = _keys(k_ptr, left[:, :, None], k_stride_t, HALF, REST, 1)
        b1, b2, b3 = _keys(k_ptr, right[:, :, None], k_stride_t, HALF, REST, 1)
        at_left = _key_position(left, rank, count, first, last, trained_tok, MODE)
        a1, a2 = _turned_keys(a1, a2, cos_ptr, sin_ptr, at_left[:, :, None], MODE, HALF, 1)
        at_right = _key_position(right, rank, count, first, last, trained_tok, MODE)
        b1, b2 = _turned_keys(b1, b2, cos_ptr, sin_ptr, at_right[:, :, None], MODE, HALF, 1)
        left_score, right_score = tl.sum(l1 * a1 + l2 * a2, 2), tl.sum(r1 * b1 + r2 * b2, 2)
        if REST:
            left_score += tl.sum(l3 * a3, 2)
            right_score += tl.sum(r3 * b3, 2)
        best, go_left = _better(best, left_score, right_score, left_exists, right_exists)
        low, size = tl.where(go_left, low, low + half), tl.where(go_left, half, size - half)
    rank = tile * TILE + tl.arange(0, TILE)
    tl.store(scores_ptr + rank, _max(best, HEAD_AXIS), mask=rank < C)


@triton.jit(do_not_specialize=_PLAIN)
def _descend_rows(
    q_ptr,  # [H, N, ROWS, D]
    k_ptr,  # [K, T, D]
    starts_ptr,  # [S or 1, N or 1, C]
    counts_ptr,  # [S, N]
    limits_ptr,  # [N]
    scores_ptr,  # [K, N, C] fp32
    cos_ptr,  # [P, HALF] fp32
    sin_ptr,
    position_ptr,  # [N, ROWS]
    first_ptr,  # [N]
    last_ptr,  # [N]
    trained_tok,
    scan_window_tok,
    k_stride_h,
    k_stride_t,
    starts_stride_s,
    starts_stride_n,
    counts_stride_s,
    N,
    C,
    T,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    n, kv, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rank = tile * TILE + tl.arange(0, TILE)
    scores_ptr += (kv * N + n).to(tl.int64) * C
    count = tl.load(counts_ptr + kv * counts_stride_s + n)
    if tile * TILE >= count:
        tl.store(scores_ptr + rank, tl.full([TILE], float("-inf"), tl.float32), mask=rank < C)
        return
    starts_ptr += kv.to(tl.int64) * starts_stride_s + n.to(tl.int64) * starts_stride_n
    start, length, present = _chunks(starts_ptr, rank, count, _limit(limits_ptr, n, T), CHUNK)
    first, last = _block(first_ptr, last_ptr, n, MODE)
    k_ptr += kv.to(tl.int64) * k_stride_h

    COLUMNS: tl.constexpr = max(16, triton.next_power_of_2(ROWS))
    r = tl.minimum(tl.arange(0, COLUMNS), ROWS - 1)  # padding repeats the last one
    at = _query_position(position_ptr, n, r, count, scan_window_tok, ROWS, MODE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    for head in range(GROUP):
        row = (((kv * GROUP + head) * N + n) * ROWS + r)[:, None]
        r1, r2, r3 = _query_in(k_ptr.dtype.element_ty, q_ptr, row, cos_ptr, sin_ptr, at, MODE, HALF, REST, 16)
        l1, l2, l3 = r1, r2, r3
        if MODE == "relative":
            tl.debug_barrier()  # or ptxas turns both copies at once, and spills
            l1, l2, l3 = _query_in(k_ptr.dtype.element_ty, q_ptr, row, cos_ptr, sin_ptr, at + 1, MODE, HALF, REST, 16)
        low, size = start, length
        width = length  # the same number, but in the layout of the pointers, where ``size`` is in that of the products
        for depth in range(_depth(CHUNK)):
            half = width // 2
            left, right = low + half // 2, low + half + (width - half) // 2
            a1, a2, a3 = _keys(k_ptr, left[:, None], k_stride_t, HALF, REST, 16)
            if MODE == "none" or MODE == "relative" or MODE == "infllm":
                # Both are on their way before either is waited for.
                b1, b2, b3 = _keys(k_ptr, right[:, None], k_stride_t, HALF, REST, 16)
                left_score = _best_product(a1, a2, a3, l1, l2, l3, REST)
            else:
                # One after the other: angles take registers too.
                at_left = _key_position(left, rank, count, first, last, trained_tok, MODE)
                a1, a2 = _turned_keys(a1, a2, cos_ptr, sin_ptr, at_left[:, None], MODE, HALF, 16)
                left_score = _best_product(a1, a2, a3, l1, l2, l3, REST)
                b1, b2, b3 = _keys(k_ptr, right[:, None], k_stride_t, HALF, REST, 16)
                at_right = _key_position(right, rank, count, first, last, trained_tok, MODE)
                b1, b2 = _turned_keys(b1, b2, cos_ptr, sin_ptr, at_right[:, None], MODE, HALF, 16)
            right_score = _best_product(b1, b2, b3, r1, r2, r3, REST)
            best, go_left = _better(best, left_score, right_score, present & (size > 1), present & ((size > 1) | (depth == 0)))
            size = tl.where(go_left, size // 2, size - size // 2)
            # A gather changes the layout once; left to itself, Triton changes that of every pointer, with a barrier before each load.
            went_left = tl.gather(go_left.to(tl.int32), tl.arange(0, TILE), 0) == 1
            low, width = tl.where(went_left, low, low + half), tl.where(went_left, half, width - half)
    tl.store(scores_ptr + rank, best, mask=rank < C)


@triton.jit(do_not_specialize=[*_PLAIN, "tiles"])
def _scan(
    q_ptr,  # [H, N, ROWS, D]
    k_ptr,  # [K, T, D], or [K, pieces * 2, D]: landmarks
    starts_ptr,  # [S or 1, N or 1, C]
    counts_ptr,  # [S, N]
    limits_ptr,  # [N]
    scores_ptr,  # [K, N, C] fp32
    cos_ptr,  # [P, HALF] fp32
    sin_ptr,
    position_ptr,  # [N, ROWS]
    first_ptr,  # [N]
    last_ptr,  # [N]
    trained_tok,
    scan_window_tok,
    k_stride_h,
    k_stride_t,
    starts_stride_s,
    starts_stride_n,
    counts_stride_s,
    N,
    C,
    T,
    tiles,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    EACH: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILE: tl.constexpr,
):
    n, kv, begin = tl.program_id(0), tl.program_id(1), tl.program_id(2) * tiles * TILE
    scores_ptr += (kv * N + n).to(tl.int64) * C
    count = tl.load(counts_ptr + kv * counts_stride_s + n).to(tl.int32)
    live = tl.minimum(tl.maximum(count - begin + TILE - 1, 0) // TILE, tiles)  # tiles with chunks
    for i in range(live, tiles):
        rank = begin + i * TILE + tl.arange(0, TILE)
        tl.store(scores_ptr + rank, tl.full([TILE], float("-inf"), tl.float32), mask=rank < C)
    if live == 0:
        return
    starts_ptr += kv.to(tl.int64) * starts_stride_s + n.to(tl.int64) * starts_stride_n
    limit = _limit(limits_ptr, n, T)
    first, last = _block(first_ptr, last_ptr, n, MODE)
    k_ptr += kv.to(tl.int64) * k_stride_h
    key = tl.arange(0, TILE * TOGETHER)  # every chunk once for each of its keys that are multiplied together

    for column in range(0, GROUP * ROWS, COLUMNS):
        if GROUP * ROWS > COLUMNS:
            tl.debug_barrier()  # scores of the pass before are read again, by other threads
        at_column = tl.minimum(column + tl.arange(0, COLUMNS), GROUP * ROWS - 1)  # padding repeats the last one
        r = at_column % ROWS
        row = (((kv * GROUP + at_column // ROWS) * N + n) * ROWS + r)[:, None]
        at = _query_position(position_ptr, n, r, count, scan_window_tok, ROWS, MODE)
        q1, q2, q3 = _query_in(k_ptr.dtype.element_ty, q_ptr, row, cos_ptr, sin_ptr, at, MODE, HALF, REST, 16)
        for i in range(live):
            key_rank = begin + i * TILE + key // TOGETHER
            start, length, present = _chunks(starts_ptr, key_rank, count, limit, CHUNK)
            best = tl.full([TILE * TOGETHER], float("-inf"), tl.float32)
            for offset in range(0, EACH, TOGETHER):
                probe = offset + key % TOGETHER
                if STEP:
                    token = start + tl.minimum(STEP // 2 + probe * STEP, length - 1)
                else:
                    token = tl.minimum(key_rank, C - 1) * EACH + probe
                k1, k2, k3 = _keys(k_ptr, token[:, None], k_stride_t, HALF, REST, 16)
                at_key = _key_position(token, key_rank, count, first, last, trained_tok, MODE)
                k1, k2 = _turned_keys(k1, k2, cos_ptr, sin_ptr, at_key[:, None], MODE, HALF, 16)
                best = tl.maximum(best, _best_product(k1, k2, k3, q1, q2, q3, REST), propagate_nan=tl.PropagateNan.ALL)
            score = _max(tl.reshape(tl.where(present, best, float("-inf")), (TILE, TOGETHER)), 1)
            rank = begin + i * TILE + tl.arange(0, TILE)
            if column > 0:
                score = tl.maximum(score, tl.load(scores_ptr + rank, mask=rank < C), propagate_nan=tl.PropagateNan.ALL)
            tl.store(scores_ptr + rank, score, mask=rank < C)


@triton.constexpr_function
def _depth(chunk):
    """Halvings until one token is left; a chunk of one token is probed all the same."""
    return max(1, chunk.bit_length() - 1)


@triton.jit
def _limit(limits_ptr, n, T):
    return tl.minimum(tl.load(limits_ptr + n), T)


@triton.jit
def _chunks(starts_ptr, rank, count, limit, CHUNK: tl.constexpr):
    """First token and number of tokens, below ``limit``, of the chunks at ``rank``, and which of them there are.

    The others get token 0, to be read and forgotten: ptxas spreads loads that have a condition, so that each is waited for.
    """
    start = tl.load(starts_ptr + rank, mask=rank < count, other=0)
    present = (rank < count) & (start < limit)
    size = tl.where(present, tl.minimum(limit - start, CHUNK), 1)
    return tl.where(present, start, 0).to(tl.int32), size.to(tl.int32), present


@triton.jit
def _block(first_ptr, last_ptr, n, MODE: tl.constexpr):
    """First and last position of the query block, where the positions of keys depend on them."""
    if MODE == "dynamic" or MODE == "self_extend":
        first, last = tl.load(first_ptr + n).to(tl.int32), tl.load(last_ptr + n).to(tl.int32)
    else:
        first, last = 0, 0
    return first, last


@triton.jit
def _better(best, left_score, right_score, left_exists, right_exists):
    """The best probes so far, and where the left half stays (ties: right)."""
    left_score = tl.where(left_exists, left_score, float("-inf"))
    right_score = tl.where(right_exists, right_score, float("-inf"))
    best = tl.maximum(best, left_score, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(best, right_score, propagate_nan=tl.PropagateNan.ALL), left_score > right_score


@triton.jit
def _max(x, axis: tl.constexpr):
    """The maximum, NaN if there is one."""
    is_nan = tl.max((x != x).to(tl.int32), axis)
    return tl.where(is_nan == 1, float("nan"), tl.max(tl.where(x == x, x, float("-inf")), axis))


@triton.jit
def _best_product(k1, k2, k3, q1, q2, q3, REST: tl.constexpr):
    """Best product of every key over the query rows, in the dtype of the queries."""
    product = tl.dot(k1.to(q1.dtype), tl.trans(q1), input_precision="ieee")
    product = tl.dot(k2.to(q1.dtype), tl.trans(q2), product, input_precision="ieee")
    if REST:
        product = tl.dot(k3.to(q1.dtype), tl.trans(q3), product, input_precision="ieee")
    return tl.max(product, 1)


@triton.jit
def _query_position(position_ptr, n, r, count, scan_window_tok, ROWS: tl.constexpr, MODE: tl.constexpr):
    """Table rows of the query rows ``r`` of block ``n`` for the right probe; for the left one it is one more if keys stay raw."""
    if MODE == "none" or MODE == "relative" or MODE == "infllm":
        at = r * 0 + scan_window_tok
    else:
        at = tl.load(position_ptr + n * ROWS + r)
        if MODE == "rank":
            at = tl.minimum(at, count + scan_window_tok)
    return at


@triton.jit
def _key_position(token, rank, count, first, last, trained_tok, MODE: tl.constexpr):
    """Table rows of the keys ``token`` of the chunks ``rank`` of a list (:meth:`hipexp_kernels.rope.ScoreRotation.keys`)."""
    if MODE == "rank":
        at = token * 0 + tl.minimum(rank, count - 1)  # the table may have no more rows
    elif MODE == "dynamic":
        window = trained_tok // 4
        end = tl.maximum(first - window, 1)
        squeezed = tl.maximum(end - _quotient((end - token).to(tl.int64) * (trained_tok - window), end), last - trained_tok)
        keep = (last < trained_tok) | (token >= last - window) | (token >= end) | (end <= trained_tok - window)
        at = tl.maximum(tl.where(keep, token, squeezed), 0)
    elif MODE == "self_extend":
        near = tl.minimum(trained_tok // 2, 8192)
        grouped = ((token - first) >> 4) + first
        at = tl.maximum(tl.where((token > first - near) | (last < trained_tok), token, grouped), 0)
    else:
        at = token
    return at


@triton.jit
def _quotient(a, b):
    """``a // b`` (int32) of int64 ``a`` >= 0 and int32 ``b`` > 0, without the long division that GPUs lack."""
    b64, inverse = b.to(tl.int64), 1.0 / b.to(tl.float32)
    q = (a.to(tl.float32) * inverse).to(tl.int64)
    q += ((a - q * b64).to(tl.float32) * inverse).to(tl.int64)
    rest = a - q * b64
    return (q + (rest >= b64).to(tl.int64) - (rest < 0).to(tl.int64)).to(tl.int32)


@triton.jit
def _load(ptr, at, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr):
    """First halves, second halves and rest of the rows that begin at ``at`` ``[..., 1]``, 0 in padding; ``MIN``: least width of a tile."""
    first, second = _columns(ptr + at, HALF, MIN), _columns(ptr + at + HALF, HALF, MIN)
    if REST:
        rest = _columns(ptr + at + 2 * HALF, REST, MIN)
    else:
        rest = first  # never used
    return first, second, rest


@triton.jit
def _columns(ptr, N: tl.constexpr, MIN: tl.constexpr):
    """``N`` numbers from each of the pointers ``[..., 1]`` on."""
    WIDTH: tl.constexpr = max(MIN, triton.next_power_of_2(N))
    t = tl.arange(0, WIDTH)
    if N == WIDTH:
        x = tl.load(ptr + t)
    else:
        x = tl.load(ptr + t, mask=t < N, other=0.0)
    return x


@triton.jit
def _turned(first, second, cos_ptr, sin_ptr, at, factor, HALF: tl.constexpr, MIN: tl.constexpr):
    """Both halves in fp32, rotated to the table rows ``at`` ``[..., 1]`` and multiplied by ``factor``."""
    at = at.to(tl.int64) * HALF
    cos, sin = _columns(cos_ptr + at, HALF, MIN) * factor, _columns(sin_ptr + at, HALF, MIN) * factor
    first, second = first.to(tl.float32), second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _query(q_ptr, row, cos_ptr, sin_ptr, at, MODE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr):
    """Queries ``row`` ``[..., 1]`` in fp32, rotated to the table rows ``at``; before raw keys they carry the keys' attention factor too."""
    first, second, rest = _load(q_ptr, row.to(tl.int64) * (2 * HALF + REST), HALF, REST, MIN)
    first, second, rest = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
    if MODE != "none":
        factor = 1.0
        if MODE == "relative" or MODE == "infllm":
            factor = tl.load(cos_ptr)  # cos of position 0
        first, second = _turned(first, second, cos_ptr, sin_ptr, at, factor, HALF, MIN)
    return first, second, rest


@triton.jit
def _query_in(
    dtype: tl.constexpr, q_ptr, row, cos_ptr, sin_ptr, at, MODE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr
):
    """The same for rows with positions ``at`` of the same number, rounded to ``dtype``."""
    first, second, rest = _query(q_ptr, row, cos_ptr, sin_ptr, at[:, None], MODE, HALF, REST, MIN)
    return first.to(dtype), second.to(dtype), rest.to(dtype)


@triton.jit
def _keys(k_ptr, token, stride_t, HALF: tl.constexpr, REST: tl.constexpr, MIN: tl.constexpr):
    """Raw keys ``token`` ``[..., 1]``."""
    return _load(k_ptr, token.to(tl.int64) * stride_t, HALF, REST, MIN)


@triton.jit
def _turned_keys(first, second, cos_ptr, sin_ptr, at, MODE: tl.constexpr, HALF: tl.constexpr, MIN: tl.constexpr):
    """Keys at the table rows ``at`` ``[..., 1]``, in fp32; as they are if the strategy leaves keys raw."""
    if MODE == "rank" or MODE == "native" or MODE == "dynamic" or MODE == "self_extend":
        first, second = _turned(first, second, cos_ptr, sin_ptr, at, 1.0, HALF, MIN)
    return first, second
