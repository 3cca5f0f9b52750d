"""Bytes that the attention of one layer takes for itself, counted from what its operations allocate; nothing is computed or held here.

Every number below is a tensor of :mod:`hipexp.attention.layer`, of a method, or of an operation of ``hipexp_kernels``, named where it is
counted. On a CPU (``vectorized``) queries, and often keys, exist as complex numbers of 8 bytes for every two; Triton's kernels keep such
things in registers. Letters as everywhere: ``X = H · Q · D`` numbers in the queries of a call, ``K · T · D`` in the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hipexp_kernels.attend_blocks.dense import FEW_ROWS
from hipexp_kernels.score_chunks.probes import probe_step
from hipexp_kernels.score_chunks.vectorized import FLOATS, WHOLE_TOK

from hipexp.attention.method import EVERYTHING, SelectingMethod
from hipexp.attention.methods import make_method
from hipexp.attention.methods.hip import least_piece_tok, n_first_candidates, piece_tok
from hipexp.config.schema import AttendRope, Heads, LayerPlan, PruneRope, Representative, Stage

INDEX, SINGLE = 8, 4  # bytes of an int64 and of an fp32 number; of a complex number that stands for two of them, as many a number
TURNING_KEYS = (PruneRope.chunk_indexed, PruneRope.native, PruneRope.dynamic, PruneRope.self_extend)


@dataclass(frozen=True)
class Shape:
    """Heads and number format of a layer; ``rotary``: dimensions that RoPE turns. ``triton``: its kernels run, not those for a CPU.

    ``paged``: keys and values are offloaded.
    """

    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    rotary: int
    triton: bool = False
    paged: bool = False
    softcap: bool = False

    @property
    def cast(self) -> int:
        """Bytes that a number takes in fp32 beside what it was, 0 if it is fp32 already."""
        return SINGLE if self.itemsize < SINGLE else 0

    @property
    def converted(self) -> int:
        """Bytes a number of queries or keys made ready to be multiplied: complex numbers, or without RoPE fp32."""
        return SINGLE if self.rotary else self.cast


@dataclass
class Footprint:
    """``transient``: the most bytes at once, besides queries, keys, values and the output's place.

    ``scratch``: memory by purpose and format that later calls use again, of every layer (:func:`hipexp_kernels.rows.scratch`).
    """

    transient: int = 0
    scratch: dict[str, int] = field(default_factory=dict)

    def hold(self, purpose: str, numbers: int, itemsize: int) -> None:
        """Scratch memory for so many numbers."""
        self.scratch[purpose] = max(self.scratch.get(purpose, 0), numbers * itemsize)

    def join(self, other: Footprint) -> None:
        """What both take, one after the other."""
        self.transient = max(self.transient, other.transient)
        for key, size in other.scratch.items():
            self.scratch[key] = max(self.scratch.get(key, 0), size)

    @property
    def scratch_bytes(self) -> int:
        return sum(self.scratch.values())


def dense(shape: Shape, n_queries: int, n_keys: int) -> Footprint:
    """Of :func:`hipexp.hf.dense.attend_dense`.

    On a CPU a part of a prompt holds ``7 · X`` numbers at once: its own keys and values for every query head, what the attentions over
    itself and over the prefix put out, and three of ``merge_lse``. A decode step in fp32 holds its logits twice.
    """
    H, K, D, it = shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize
    X = H * n_queries * D
    if shape.softcap:
        return _attend_vectorized(shape, _Call(n_queries, n_keys, 64, 0, n_keys, 0, 1, n_keys)) if not shape.triton else Footprint(it * X)
    if shape.triton:
        return Footprint(it * X + (2 * H * n_keys * D * it if it == SINGLE and n_queries > 1 else 0))
    if n_queries == 1:
        few = H // K <= FEW_ROWS and it == SINGLE
        return Footprint(2 * H * n_keys * it if few else it * X)
    own, lse = 3 * X * it, SINGLE * X // D
    return Footprint(own + lse if n_keys == n_queries else own + 4 * X * it + 4 * lse)


def prefill(plan: LayerPlan, shape: Shape, n_queries: int, n_keys: int) -> Footprint:
    """Of a part of a prompt, its last ``n_queries`` tokens of ``n_keys``, under a method that selects; see the module."""
    method = _selecting(plan)
    found = Footprint()
    exact = method.exact_tok(False)
    size, out_size = method.query_block_tok, method.attended_block_tok
    begin = n_keys - n_queries
    lists = shape.kv_heads if plan.heads is Heads.per_kv else 1
    M = 0
    if n_keys > exact and method.keep(False):
        listed, stages = _stages(plan, shape, plan.stages, n_queries, n_keys, lists)
        for stage in stages:
            found.join(stage)
        M = listed
    n_true = min(n_keys, exact) if begin < exact < EVERYTHING else n_keys if exact >= EVERYTHING else 0
    call = _Call(n_queries, n_keys, out_size, plan.sink_tok, plan.window_tok, M, lists if M else 1, n_true)
    attended = _attend_triton(shape, call) if shape.triton else _attend_vectorized(shape, call)
    padded = shape.heads * -(-n_queries // size) * size * shape.head_dim * shape.itemsize if n_queries % size else 0
    attended.transient += padded
    found.join(attended)
    return found


def decode(plan: LayerPlan, shape: Shape, n_keys: int) -> Footprint:
    """Of a decode step behind ``n_keys - 1`` tokens, the most a refresh of all stages takes; see :func:`held_bytes` for what stays."""
    method = _selecting(plan)
    found, lists = Footprint(), shape.kv_heads if plan.heads is Heads.per_kv else 1
    H, K, D, it = shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize
    if n_keys <= method.exact_tok(True):
        call = _Call(1, n_keys, 1, plan.sink_tok, plan.window_tok, 0, 1, n_keys)
        return _attend_triton(shape, call) if shape.triton else _attend_vectorized(shape, call)
    M = 0
    if method.keep(True):
        M, stages = _stages(plan, shape, plan.decode, 1, n_keys, lists)
        for stage in stages:
            found.join(stage)
    if shape.triton:
        return found
    attended = plan.sink_tok + M + plan.window_tok
    found.join(Footprint(2 * H * attended * SINGLE + H * D * SINGLE))
    if shape.rotary:
        found.hold("window keys, paired", K * plan.window_tok * D, SINGLE)
        found.hold("held keys", (plan.sink_tok + M) * D, it)
        found.hold("held keys, paired", (plan.sink_tok + M) * D, SINGLE)
    if shape.paged:
        for which in ("keys", "values"):
            found.hold(f"held {which}, all", K // lists * (plan.sink_tok + M) * D, it)
    return found


def held_bytes(plan: LayerPlan, shape: Shape, n_keys: int) -> int:
    """What decode steps of one sequence hold ready in a layer (:class:`hipexp_kernels.Held`), as long as there are ``n_keys`` keys.

    The window's keys with room for a quarter more, and keys and values of sinks and selection. Triton's kernels hold nothing.
    """
    method = _selecting(plan)
    if shape.triton or n_keys <= method.exact_tok(True):
        return 0
    row = shape.kv_heads * shape.head_dim * shape.itemsize
    window = plan.window_tok + plan.window_tok // 4 if shape.rotary else 0
    return row * (window + 2 * (plan.sink_tok + min(method.keep(True), n_keys)))


def summary_pieces(plan: LayerPlan, n_keys: int) -> Iterator[int]:
    """How many pieces of each size are summarized of ``n_keys`` keys (:class:`hipexp.cache.summaries.KeySummaries`), for ``bounds``."""
    scored = [stage for stage in (*plan.stages, *plan.decode) if stage.representative is Representative.bounds]
    if not scored or n_keys <= _selecting(plan).exact_tok(False):
        return
    for piece in {least_piece_tok(plan), *(piece_tok(plan, stage) for stage in scored)}:
        yield max(0, n_keys - plan.sink_tok) // piece


def table_rows(plan: LayerPlan, n_queries: int, n_keys: int) -> int:
    """Positions of which a layer asks for angles when it attends to ``n_keys`` keys, as in :meth:`LayerAttention._attend_rotation`."""
    method = _selecting(plan)
    size = min(method.attended_block_tok, n_queries)
    kept = max((method.keep(decoding) for decoding in (False, True) if method.exact_tok(decoding) < EVERYTHING), default=0)
    rows = min(plan.sink_tok + plan.window_tok + kept, n_keys) + 2 * size
    if plan.attend in (AttendRope.native, AttendRope.dynamic) or method.exact_tok(n_queries == 1) >= EVERYTHING:
        rows = max(rows, n_keys + size)
    if plan.stages and n_keys > method.exact_tok(False):
        for stage, n_chunks in _candidates(plan, plan.stages, n_keys):
            scan = max(0, plan.window_tok - plan.stages[0].chunk_tok)
            rows = max(rows, scan + n_chunks + 1 if stage.rope is PruneRope.chunk_indexed else scan + 2)
            if stage.rope in TURNING_KEYS[1:]:
                rows = max(rows, n_keys)
    return rows


@dataclass(frozen=True)
class _Call:
    """One call of ``attend_blocks``: queries in blocks of ``size``, ``M`` selected tokens in each of ``lists``, ``n_true`` exact keys."""

    n_queries: int
    n_keys: int
    size: int
    sink_tok: int
    window_tok: int
    M: int
    lists: int
    n_true: int

    @property
    def blocks(self) -> int:
        return -(-self.n_queries // self.size)


def _attend_triton(shape: Shape, call: _Call) -> Footprint:
    """Output and its log-sum-exp; the queries again where they are not side by side."""
    X = shape.heads * call.blocks * call.size * shape.head_dim
    return Footprint(X * shape.itemsize + SINGLE * X // shape.head_dim)


def _attend_vectorized(shape: Shape, call: _Call) -> Footprint:
    """Of :func:`hipexp_kernels.attend_blocks.vectorized.attend_blocks`: all that lives until the end, and the larger of its last two steps.

    Until the end: all keys, converted, where blocks will read as many (``once``); tokens of the selection; keys at true positions; queries,
    converted; their rows; the output. Then every block's own keys: queries turned, side by side, and an output. Or ``merge_lse``: that
    output and three more.
    """
    H, K, D, it = shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize
    N, T = call.blocks, call.n_keys
    X, keys = H * N * call.size * D, K * T * D
    once = not shape.paged and T <= N * (call.sink_tok + call.M + call.window_tok)
    selected = call.lists * N * call.M
    turned = SINGLE if shape.rotary else 0
    until_end = (
        (keys * shape.converted if once else 0) + X * shape.converted + selected * INDEX
        + K * call.n_true * D * (shape.converted + (it if shape.paged else 0))
        + 2 * X * it + SINGLE * X // D
    )  # fmt: skip
    aligned = turned if H > K else it if shape.cast else 0  # side by side for one product, and in the model's format
    own = X * (turned + aligned + it)
    merge = 4 * X * it + 4 * SINGLE * X // D
    found = Footprint(until_end + max(own, merge, 3 * selected))
    if once:
        found.transient = max(found.transient, keys * (shape.converted + (shape.cast if shape.rotary else 0)))
    tile = K // call.lists * (min(call.sink_tok, T) + call.M + min(call.window_tok, T)) * D
    gathered = max(tile if call.n_true < T else 0, K * N * call.size * D)
    if once and shape.converted:
        found.hold("attended keys, converted", gathered, SINGLE)
    else:
        found.hold("attended keys", gathered, it)
    found.hold("attended values", gathered, it)
    if not once and shape.rotary:
        found.hold("attended keys, paired", gathered, SINGLE)
    return found


def _candidates(plan: LayerPlan, stages: list[Stage], n_keys: int) -> Iterator[tuple[Stage, int]]:
    """Every stage with the length of the longest list that it scores."""
    first = stages[0].chunk_tok
    n = n_first_candidates(n_keys - 1, plan.sink_tok, max(0, plan.window_tok - first), first)
    for i, stage in enumerate(stages):
        yield stage, n
        following = stages[min(i + 1, len(stages) - 1)].chunk_tok
        n = min(stage.keep_tok // stage.chunk_tok, n) * (stage.chunk_tok // following)


def _stages(
    plan: LayerPlan, shape: Shape, stages: list[Stage], n_queries: int, n_keys: int, lists: int
) -> tuple[int, list[Footprint]]:  # fmt: skip
    """Tokens of the final selection, and what each stage takes: lists before it, queries, scores, then :func:`keep_top`."""
    H, K, D, it = shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize
    found, before, M, size = [], 0, 0, 1 if n_queries == 1 else stages[0].query_block_tok
    for i, (stage, C) in enumerate(_candidates(plan, stages, n_keys)):
        size = min(size, stage.query_block_tok) if n_queries > 1 else 1
        N = -(-n_queries // size)
        stride = min(stage.query_stride_tok, size)
        R = size // stride
        X, turns_keys = H * N * R * D, stage.rope in TURNING_KEYS and shape.rotary > 0
        pooled = X * SINGLE if stride > 1 else 0
        keep = min(stage.keep_tok // stage.chunk_tok, C)
        following = stages[min(i + 1, len(stages) - 1)].chunk_tok
        kept = lists * N * keep * (stage.chunk_tok // following)
        scores = K * N * C * SINGLE
        taken = Footprint(before + pooled + scores)
        descends = stage.representative is Representative.descent
        if shape.triton and not (shape.paged and descends):
            taken.transient += 0 if pooled else X * it
        else:  # a descent into paged keys is vectorized on a GPU too
            piece = piece_tok(plan, stage) if stage.representative is Representative.bounds else 0
            scored = _score_vectorized(shape, stage, N, R, C, n_keys, i == 0, piece, turns_keys)
            cut = lists * N * C
            best = 2 * cut * SINGLE + 4 * cut + 2 * cut * INDEX + lists * N * keep * INDEX
            pick = lists * N * keep * INDEX + kept * (INDEX + 3) + cut * SINGLE
            taken.transient += scored.transient if shape.triton else max(scored.transient, best, pick)
            taken.scratch = scored.scratch
        found.append(taken)
        M = keep * (stage.chunk_tok // following) * following
        before = kept * INDEX + scores
    return M, found


def _score_vectorized(
    shape: Shape, stage: Stage, N: int, R: int, C: int, n_keys: int, first: bool, piece: int, turns_keys: bool
) -> Footprint:  # fmt: skip
    """Of :func:`hipexp_kernels.score_chunks.vectorized.score_chunks`, besides the scores: queries turned, keys, a part in flight."""
    H, K, D, it = shape.heads, shape.kv_heads, shape.head_dim, shape.itemsize
    X, chunk, T, way, C = H * N * R * D, stage.chunk_tok, n_keys, stage.representative.value, max(1, C)
    ways = 2 if stage.rope is PruneRope.relative else 1
    found = Footprint(ways * X * SINGLE if shape.rotary else 0)
    if stage.rope is PruneRope.chunk_indexed and shape.rotary:
        found.transient += X // D * INDEX
        turning = X * SINGLE  # cos and sin of every query
    else:
        turning = 0
    if piece and first:
        each = 2 * chunk // piece
        width = max(1, min(C, FLOATS // (K * each * max(H // K * R, D))))
        step = max(1, min(N, FLOATS // (H * R * width * each)))
        found.hold("products", H * step * R * width * each, SINGLE)
        flight = K * width * each * D * ((SINGLE if turns_keys else 0) + shape.cast) + H * step * width * each * SINGLE
        found.transient += X * SINGLE + max(flight, turning)
        return found
    if piece:
        way, T, chunk = "exact", 2 * (n_keys // piece), 2 * chunk // piece
    step_tok = 0 if way == "descent" else probe_step(way, chunk)
    at_once = not step_tok and R == 1 and 1 < chunk <= WHOLE_TOK
    few = N == 1 and H // K * (2 if at_once else R) <= FEW_ROWS
    once = K * T <= H * N * C and not (shape.paged and not piece)
    probes = 1
    if step_tok:
        floats = max(H * R, D if few else K * D)
        probes = min(chunk // step_tok, max(1, FLOATS // floats))
        width = max(1, FLOATS // (chunk // step_tok * floats))
    else:
        width = max(64, FLOATS // (chunk * D if at_once and few else H * max(R, D)))
    step = max(1, min(N, width // C))
    width = min(width, C)
    heads = 1 if few else K if step_tok or at_once else H
    each = width * (chunk if at_once else probes)
    tokens = each if first and (step_tok or at_once) else step * each  # blocks share the first list
    if once and (turns_keys or shape.cast):
        found.hold("probed keys, complex" if turns_keys else "probed keys, fp32", heads * tokens * D, SINGLE)
    else:
        found.hold("probed keys", heads * tokens * D, it)
    if turns_keys and not once:
        found.hold("probed keys, paired", heads * tokens * D, SINGLE)
    products = H * R * (2 if at_once else 1) * step * each
    found.hold("products", products, SINGLE)
    flight = heads * tokens * (INDEX + (D * shape.cast if not once else 0)) + products // R * SINGLE * (1 if R > 1 else 0)
    if turns_keys:
        flight += tokens * D * SINGLE
    ready = K * T * D * (SINGLE if turns_keys else shape.cast) if once else 0
    found.transient += max(turning, ready + max(flight, K * T * D * shape.cast if once and turns_keys else 0))
    return found


def _selecting(plan: LayerPlan) -> SelectingMethod:
    method = make_method(plan)
    assert isinstance(method, SelectingMethod)
    return method
