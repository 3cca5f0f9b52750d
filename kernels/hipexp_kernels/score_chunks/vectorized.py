"""All chunks of a few query blocks in lockstep: gather the probed keys, multiply, keep the better half.

Blocks are taken in groups whose keys and products fit the processor's cache, in buffers that every probe uses again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hipexp_kernels.rope import ScoreRotation, rotate, turn
from hipexp_kernels.rows import KeyRows, scratch
from hipexp_kernels.score_chunks.probes import probe_step
from hipexp_kernels.summarize import Summaries

FLOATS = 1 << 20  # of gathered keys or products in flight: 4 MiB, found best on two cores with 0.5 MiB of L2 each
NONE = float("-inf")


def score_chunks(
    q: Tensor, k: Tensor, starts: Tensor, counts: Tensor, limits: Tensor, *,
    chunk_tok: int, representative: str, rotation: ScoreRotation | None, summaries: Summaries | None,
) -> Tensor:  # fmt: skip
    if summaries is not None and representative == "bounds":
        return _compare(q, summaries, starts[0, 0], counts, limits.clamp(max=k.shape[1]), chunk_tok, rotation)
    H, N, R, D = q.shape
    K, T, _ = k.shape
    C, limits = starts.shape[2], limits.clamp(max=T)
    q_left, q_right = rotation.queries(q, counts) if rotation else (q, q)
    scores = torch.full((K, N, C), NONE, device=k.device)
    keys = KeyRows(k, rotation.table if rotation and rotation.turns_keys else None, once=K * T <= H * N * C, purpose="probed keys")
    width = max(64, FLOATS // (H * max(R, D)))  # chunks at a time
    step = max(1, min(N, width // max(1, C)))  # blocks at a time
    products = scratch("products", (H * step * R * min(width, C),), k, torch.float32)
    for n in range(0, N, step):
        part = slice(n, n + step)
        left = _Probe(q_left[:, part], keys, _of_blocks(rotation, part), products)
        right = left if q_right is q_left else _Probe(q_right[:, part], keys, left.rotation, products)
        candidates = int(counts[:, part].amax())
        for c in range(0, candidates, width):
            rank = torch.arange(c, min(c + width, candidates), device=k.device)
            listed = (starts if starts.shape[1] == 1 else starts[:, part])[..., c : c + len(rank)]
            present = (rank < counts[:, part, None]) & (listed < limits[part, None])
            if not present.any():
                continue
            start, size = _bounds(listed, present, limits[part], chunk_tok, T)
            best = (
                _descend(left, right, start, size, rank, chunk_tok)
                if representative == "descent"
                else _scan(right, start, size, rank, chunk_tok, probe_step(representative, chunk_tok))
            )
            scores[:, part, c : c + len(rank)] = best.amax(2).masked_fill_(~present, NONE)
    return scores


def _bounds(starts: Tensor, present: Tensor, limits: Tensor, chunk_tok: int, n_keys: int) -> tuple[Tensor, Tensor | int]:
    """First token ``[S, n or 1, 1, C]`` and size of every chunk: one number if no chunk is cut short. Absent ones become readable."""
    cut = present & (starts + chunk_tok > limits[:, None])
    if not cut.any():
        return starts.clamp(0, n_keys - chunk_tok)[:, :, None], chunk_tok
    last = limits[:, None].clamp(min=1) - 1
    start = torch.minimum(starts.clamp(min=0), last)
    return start[:, :, None], (last + 1 - start).clamp(max=chunk_tok)[:, :, None]


def _descend(left: _Probe, right: _Probe, start: Tensor, size: Tensor | int, rank: Tensor, chunk_tok: int) -> Tensor:
    if chunk_tok == 1:
        return right(start, rank)
    best = None
    for _ in range(chunk_tok.bit_length() - 1):
        half = size // 2
        score_left, score_right = left(start + half // 2, rank), right(start + half + (size - half) // 2, rank)
        if isinstance(size, Tensor):  # a chunk that is down to one token stays there; one that never had two is probed as a right half
            score_left.masked_fill_(size <= 1, NONE)
            if best is not None:
                score_right.masked_fill_(size <= 1, NONE)
        better = torch.maximum(score_left, score_right)
        best = better if best is None else torch.maximum(best, better)
        go_left = score_left > score_right
        start = torch.where(go_left, start, start + half)
        size = torch.where(go_left, half, size - half) if isinstance(size, Tensor) else half
    return best


def _scan(right: _Probe, start: Tensor, size: Tensor | int, rank: Tensor, chunk_tok: int, step: int) -> Tensor:
    best = None
    for offset in range(step // 2, chunk_tok, step):
        inside = torch.clamp(size - 1, max=offset) if isinstance(size, Tensor) else offset
        score = right(start + inside, rank)
        best = score if best is None else torch.maximum(best, score)
    assert best is not None
    return best


def _compare(
    q: Tensor, summaries: Summaries, starts: Tensor, counts: Tensor, limits: Tensor, chunk_tok: int, rotation: ScoreRotation | None
) -> Tensor:
    """Products of all landmarks with the query rows of a few blocks at a time."""
    (H, N, R, D), C, K = q.shape, len(starts), len(summaries.rows)
    q = (rotation.queries(q, counts)[1] if rotation else q.float()).view(K, H // K, N, R, D).transpose(1, 2).reshape(K, N, -1, D)
    scores = torch.full((K, N, C), NONE, device=q.device)
    each = 2 * chunk_tok // summaries.piece_tok  # landmarks of a chunk
    width = max(1, min(C, FLOATS // (K * each * max(H // K * R, D))))  # chunks at a time
    step = max(1, min(N, FLOATS // (H * R * width * each)))  # blocks at a time
    products = scratch("products", (H * step * R * width * each,), q)
    for c in range(0, int(counts.amax()) if C else 0, width):
        rank = torch.arange(c, min(c + width, C), device=q.device)
        landmarks = summaries.rows.flatten(1, 2)[:, c * each : (c + len(rank)) * each].float()
        if rotation and rotation.turns_keys:
            at = rank.repeat_interleave(each)
            landmarks = rotate(landmarks, rotation.table.cos[at], rotation.table.sin[at])
        for n in range(0, N, step):
            part = slice(n, n + step)
            present = (rank < counts[:, part, None]) & (starts[c : c + len(rank)] < limits[part, None])
            if not present.any():
                continue
            rows = q[:, part].flatten(1, 2)
            found = products[: K * rows.shape[1] * len(rank) * each].view(K, rows.shape[1], -1)
            torch.bmm(rows, landmarks.transpose(1, 2), out=found)
            best = found.view(K, -1, q.shape[2], len(rank) * each).amax(2)
            scores[:, part, c : c + len(rank)] = best.unflatten(2, (len(rank), each)).amax(3).masked_fill_(~present, NONE)
    return scores


class _Probe:
    """Scores of probed keys under the queries ``[H, n, R, D]`` of some blocks."""

    def __init__(self, q: Tensor, keys: KeyRows, rotation: ScoreRotation | None, products: Tensor):
        self.keys, self.rotation, self.products = keys, rotation if rotation and rotation.turns_keys else None, products
        q = keys.convert(q)
        q = torch.view_as_real(q).flatten(-2) if q.is_complex() else q
        self.q = q.unflatten(0, (len(keys.heads), -1)).transpose(1, 2).contiguous()

    def __call__(self, token: Tensor, rank: Tensor) -> Tensor:
        """Best product over the rows, ``[K, n, G, C]``, with the keys at ``token`` ``[K or 1, n or 1, G or 1, C]`` of chunks ``rank``."""
        K, n, G, R, D = self.q.shape
        if self.rotation:
            at = rank if self.rotation.mode == "rank" else self.rotation.keys(token, rank)
            token = token.expand(-1, at.shape[1] if at.ndim > 1 else -1, -1, -1)
            assert self.keys.table is not None, "keys that are rotated come with a table"
            factor = self.keys.table.factor.index_select(0, at.flatten()).unflatten(0, at.shape)
            keys = turn(self.keys.gather(token), factor, scratch=True)
        else:
            keys = self.keys.gather(token)
        batch, C = keys.shape[:3].numel(), token.shape[3]
        rows = self.q.view(batch, -1, D)  # those that look at the same keys go into one product
        products = self.products[: batch * rows.shape[1] * C].view(batch, -1, C)
        torch.bmm(rows, keys.view(batch, C, D).transpose(1, 2), out=products)
        return products.view(-1, R, C).amax(1).view(K, n, G, C)


def _of_blocks(rotation: ScoreRotation | None, part: slice) -> ScoreRotation | None:
    """The rotation for some blocks, to be asked for positions of ``[K, n, G, C]`` tokens."""
    return rotation and replace(rotation, first=rotation.first[part, None], last=rotation.last[part, None])
