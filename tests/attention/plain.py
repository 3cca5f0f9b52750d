"""One query block under a pipeline, once more: lists of chunks, double precision; products and positions are ``brute``'s."""

import numpy as np
from hypothesis import assume

import brute
from hipexp.config.schema import Heads, PruneRope, Representative

CLOSE = 1e-5  # rounding may turn a closer decision: such an example says nothing
MODES = {PruneRope.chunk_indexed: "rank"}


def lists(plan, q, k):
    """Queries and keys of the heads that share a list."""
    if plan.heads is Heads.shared:
        return [(q, k)]
    return [(part, k[i : i + 1]) for i, part in enumerate(np.split(q, len(k)))]


def first_candidates(plan, stages, first):
    chunk = stages[0].chunk_tok
    scan = max(0, plan.window_tok - chunk)
    return [start for start in range(plan.sink_tok, first, chunk) if start <= first - scan]


def landmarks(plan, stage, k, chunks):
    """Those of every chunk ``[K][C]``: two for each piece of the stage's size, which is that of the shortest chunk that is summarized or 64
    tokens where it says none. Pieces that are longer than those of other stages are made from the landmarks of the shortest ones."""
    scored = [each for each in (*plan.stages, *plan.decode) if each.representative is Representative.bounds]
    usual = min(64, *(each.chunk_tok for each in scored))
    least, piece = min(each.piece_tok or usual for each in scored), stage.piece_tok or usual

    def of_piece(keys):
        fine = [brute.landmarks(keys[p : p + least]) for p in range(0, piece, least)]
        return fine[0] if piece == least else brute.coarse_landmarks(fine)

    return [[[x for p in range(c, c + stage.chunk_tok, piece) for x in of_piece(keys[p : p + piece])] for c in chunks] for keys in k]


def select(plan, stages, q, k, at, rotary, trained, memory=None, due=0):
    """Block starts for the query at position ``at`` of ``q`` ``[H, T, D]``; ``memory`` (decode): each stage's chunks, stage ``due`` runs first."""
    decode, scan = memory is not None, max(0, plan.window_tok - stages[0].chunk_tok)
    limit = at if decode else at // stages[0].query_block_tok * stages[0].query_block_tok
    chunks = memory[due] if due else first_candidates(plan, stages, limit)
    for i, stage in enumerate(stages[due:], due):
        if decode:
            memory[i] = chunks
        size, stride = (1, 1) if decode else (stage.query_block_tok, stage.query_stride_tok)
        first = at // size * size
        group = np.arange(first, min(first + size, q.shape[1]), stride)
        pooled = np.stack([q[:, g : min(g + stride, first + size)].mean(1) for g in group], 1)
        mode = None if stage.rope is PruneRope.none else MODES.get(stage.rope, stage.rope.value)
        scores, margins = brute.score_chunks(
            pooled[:, None], k, np.array(chunks, int)[None, None], np.array([[len(chunks)]]), np.array([limit]), stage.chunk_tok,
            stage.representative.value, mode, rotary, trained, scan, [group], [first], [first + size - 1],
            landmarks=stage.representative is Representative.bounds and landmarks(plan, stage, k, chunks),
        )  # fmt: skip
        best, keep = scores[:, 0].max(0), stage.keep_tok // stage.chunk_tok
        ranking = -np.sort(-best)
        assume(margins.min(initial=1) > CLOSE and (len(best) <= keep or ranking[keep - 1] - ranking[keep] > CLOSE))
        chunks = [chunks[c] for c in brute.keep_top(best, keep)]
        if i + 1 < len(stages):
            pieces = range(0, stage.chunk_tok, stages[i + 1].chunk_tok)
            chunks = [start + piece for start in chunks for piece in pieces if start + piece < limit]
    return chunks


def attend(plan, stages, q, k, v, first, size, chosen, exact, rotary, trained, scale, softcap):
    """Output of the queries ``first`` … that exist, at most ``size`` ``[H, n, D]``; ``chosen``: block starts of every list."""
    blocks = np.full((len(chosen), 1, max(map(len, chosen))), -1)
    for s, own in enumerate(chosen):
        blocks[s, 0, : len(own)] = own
    missing = max(0, first + size - q.shape[1])
    rows = np.pad(q[:, first : first + size], ((0, 0), (0, missing), (0, 0)))
    out, _ = brute.attend_blocks(
        rows[:, None], k, v, blocks, (blocks >= 0).sum(-1), [first], [exact], stages[-1].chunk_tok, plan.sink_tok, plan.window_tok, scale,
        plan.attend.value if stages[-1].rope is not PruneRope.none else None, rotary, trained, softcap,
    )  # fmt: skip
    return out[:, 0, : size - missing]
