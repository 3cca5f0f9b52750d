"""The operations once more, from their definitions, in numpy and double precision, sharing no code with the package.

Rotations are complex numbers, positions plain integers, selections masks over all tokens.
"""

import math

import numpy as np
import torch
from hipexp_kernels.rope import RopeTable

BASE, FACTOR = 1000.0, 1.25  # an attention factor other than 1, as YaRN has one


def frequencies(rotary):
    return BASE ** (-np.arange(rotary // 2) / (rotary // 2))


def rope_table(rows, rotary):
    angle = torch.from_numpy(np.arange(rows)[:, None] * frequencies(rotary))
    return RopeTable((FACTOR * angle.cos()).float(), (FACTOR * angle.sin()).float())


def turned(x, phase):
    """``x`` with its first numbers multiplied, as complex pairs (t, t + half), by ``phase`` ``[..., half]``."""
    half = phase.shape[-1]
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * phase
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)


def phase(position, rotary):
    return FACTOR * np.exp(1j * np.asarray(position)[..., None] * frequencies(rotary))


def squeezed(i, first, last, trained):
    """Position of key ``i`` under dynamic extension."""
    window = trained // 4
    origin = first - window
    if last < trained or i >= last - window or i >= origin or origin <= trained - window:
        return i
    return max(origin - math.floor((origin - i) * (trained - window) / origin), last - trained, 0)


def probe_position(mode, i, rank, first, last, trained):
    if mode == "rank":
        return rank
    if mode == "dynamic":
        return squeezed(i, first, last, trained)
    if mode == "self_extend" and last >= trained and i <= first - min(8192, trained // 2):
        return max(0, first - math.ceil((first - i) / 16))
    return i


KEYS_STAY = (None, "relative", "infllm")


def query_positions(mode, position, n_chunks, scan):
    """For the left and the right probe."""
    if mode == "relative":
        return np.full(len(position), scan + 1), np.full(len(position), scan)
    if mode == "infllm":
        return (np.full(len(position), scan),) * 2
    if mode == "rank":
        return (np.minimum(position, n_chunks + scan),) * 2
    return position, position


GRID_PROBES = {1: 1, 2: 2, 4: 4, 8: 8, 16: 8, 32: 8, 64: 8, 128: 8, 256: 16, 512: 16, 1024: 16}


def turned_landmark(x, mode, c, rotary):
    return turned(x, phase(c, rotary)) if mode == "rank" else x


def landmarks(piece):
    """Both landmarks of the keys ``[n, D]`` of a piece."""
    mean = sum(piece) / len(piece)
    far = max(piece, key=lambda key: sum((key - mean) ** 2))
    return mean, 0.6 * mean + 0.4 * far


def coarse_landmarks(pieces):
    """The two landmarks of a piece made of pieces, given theirs."""
    mean = sum(first for first, _ in pieces) / len(pieces)
    farthest = max((first + (second - first) / 0.4 for first, second in pieces), key=lambda key: ((key - mean) ** 2).sum())
    return mean, mean + 0.25 * (farthest - mean)


def score_chunks(
    q, k, starts, counts, limits, chunk_tok, representative, mode=None, rotary=0, trained=0, scan=0, position=None, first=None, last=None,
    landmarks=None,
):  # fmt: skip
    """Scores ``[K, N, C]`` and, for each, the smallest margin of a decision on its paths."""
    H, N = q.shape[:2]
    K, C = len(k), starts.shape[2]
    scores, margins = np.full((K, N, C), -np.inf), np.full((K, N, C), np.inf)
    for h, n, c in np.ndindex(H, N, C):
        g = h // (H // K)
        s, b = g % len(starts), n % starts.shape[1]
        begin, end = int(starts[s, b, c]), min(int(starts[s, b, c]) + chunk_tok, int(limits[n]), k.shape[1])
        if c >= counts[s, n] or begin >= end:
            continue
        left = right = q[h, n]
        if mode:
            at = query_positions(mode, np.asarray(position[n]), int(counts[s, n]), scan)
            left, right = (turned(q[h, n], phase(p, rotary)) for p in at)
        if mode in ("relative", "infllm"):  # the raw key's attention factor
            left, right = (turned(rows, phase(0, rotary)) for rows in (left, right))

        def best_row(rows, i, g=g, n=n, c=c):
            key = k[g, i]
            if mode not in KEYS_STAY:
                key = turned(key, phase(probe_position(mode, i, c, int(first[n]), int(last[n]), trained), rotary))
            return max(np.dot(row, key) for row in rows)

        path, margin = [], np.inf
        if representative == "exact":
            path = [best_row(right, i) for i in range(begin, end)]
        elif representative == "grid":
            part = chunk_tok // GRID_PROBES[chunk_tok]
            path = [best_row(right, min(begin + i * part + part // 2, end - 1)) for i in range(GRID_PROBES[chunk_tok])]
        elif representative == "bounds":
            path = [max(np.dot(row, turned_landmark(x, mode, c, rotary)) for row in right) for x in landmarks[g][c]]
        elif end - begin == 1:
            path = [best_row(right, begin)]
        else:
            while end - begin > 1:
                middle = begin + (end - begin) // 2
                path += [best_row(left, begin + (middle - begin) // 2), best_row(right, middle + (end - middle) // 2)]
                margin = min(margin, abs(path[-1] - path[-2]))
                begin, end = (begin, middle) if path[-2] > path[-1] else (middle, end)
        scores[g, n, c], margins[g, n, c] = max(scores[g, n, c], *path), min(margins[g, n, c], margin)
    return scores, margins


def keep_top(row, keep):
    """Indices whose rank (better scores first, then lower indices) is below ``keep``."""
    beaten_by = [sum(other > mine or (other == mine and j < i) for j, other in enumerate(row)) for i, mine in enumerate(row)]
    return [i for i, rank in enumerate(beaten_by) if rank < keep]


def attended(n_keys, block_starts, position, first, sink_tok, window_tok, block_tok, exact):
    """Tokens before the window's edge and tokens after it, for one query, as ascending arrays."""
    i = np.arange(n_keys)
    chosen = np.isin(i, [start + t for start in block_starts for t in range(block_tok)]) | (i < sink_tok) | bool(exact)
    far = chosen & (i <= first - window_tok)
    near = (i > first - window_tok) & (i <= position)
    return i[far], i[near]


def attend_blocks(
    q, k, v, blocks, counts, first, exact, block_tok, sink_tok, window_tok, scale, mode=None, rotary=0, trained=0, softcap=None
):
    """Output and log-sum-exp; NaN in the rows at or past the end. Keys are numbered backwards from the query (the published form)."""
    H, N, Q, _ = q.shape
    group, T = H // len(k), k.shape[1]
    out, lse = np.full(q.shape, np.nan), np.full((H, N, Q), np.nan)
    for h, n, r in np.ndindex(H, N, Q):
        p0, p = int(first[n]), int(first[n]) + r
        if p >= T:
            continue
        s = {1: 0, len(k): h // group, H: h}[len(blocks)]
        far, near = attended(T, blocks[s, n, : counts[s, n]], p, p0, sink_tok, window_tok, block_tok, exact[n])
        tokens = np.concatenate([far, near])
        keys, query = k[h // group, tokens], q[h, n, r]
        if mode:
            rule = "native" if exact[n] else mode
            query = turned(query, phase(p, rotary))
            far_phase = far_phases(rule, far, p0, p0 + Q - 1, window_tok, rotary, trained)
            keys = turned(keys, np.concatenate([far_phase, phase(near, rotary)]))
        logits = keys @ query * scale
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        lse[h, n, r] = np.log(weights.sum()) + logits.max()
        out[h, n, r] = weights @ v[h // group, tokens] / weights.sum()
    return out, lse


def far_phases(rule, far, first, last, window_tok, rotary, trained):
    """Phases of the keys before the window, for a query and window keys that keep their true positions."""
    if rule == "native":
        return phase(far, rotary)
    if rule == "infllm":
        return phase(np.full(len(far), first - window_tok), rotary)
    packed = phase(first - window_tok + 1 - len(far) + np.arange(len(far)), rotary)
    if rule == "streaming":
        return packed
    return 0.75 * packed + 0.25 * phase(np.array([squeezed(i, first, last, trained) for i in far.tolist()]), rotary)
