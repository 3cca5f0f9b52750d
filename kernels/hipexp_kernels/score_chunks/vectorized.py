"""All chunks of a few query blocks at a time: gather probed keys, multiply; a descent keeps the better half and goes on.

Blocks are taken in groups whose keys and products fit the processor's cache, in buffers that every probe uses again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hipexp_kernels.paged import KV
from hipexp_kernels.rope import ScoreRotation, rotate, turn
from hipexp_kernels.rows import KeyRows, scratch
from hipexp_kernels.score_chunks.probes import probe_step
from hipexp_kernels.summarize import Summaries

FLOATS = 1 << 20  # of gathered keys or products in flight: 4 MiB, found best on two cores
FEW_ROWS, PARTS = 8, 8  # up to so many rows, head by head is the fastest way through, its keys in parts that several threads multiply
WHOLE_TOK = 8  # chunks no longer than this are multiplied as a whole in decode
NONE = float("-inf")


def score_chunks(
    q: Tensor, k: KV, starts: Tensor, counts: Tensor, limits: Tensor, *,
    chunk_tok: int, representative: str, rotation: ScoreRotation | None, summaries: Summaries | None,
) -> Tensor:  # fmt: skip
    if not starts.shape[2]:
        return torch.empty(len(k), q.shape[1], 0, device=k.device)
    if summaries is not None and representative == "bounds":
        if summaries.first_tok is None:
            return _compare(q, summaries, starts[0, 0], counts, limits.clamp(max=k.shape[1]), chunk_tok, rotation)
        k, starts, limits, chunk_tok = _as_keys(summaries, starts, limits.clamp(max=k.shape[1]), chunk_tok)
        representative = "exact"
    H, N, R, D = q.shape
    K, T, _ = k.shape
    C, limits = starts.shape[2], limits.clamp(max=T)
    q_left, q_right = rotation.queries(q, counts) if rotation else (q, q)
    scores = torch.full((K, N, C), NONE, device=k.device)
    keys = KeyRows(k, rotation.table if rotation and rotation.turns_keys else None, once=K * T <= H * N * C, purpose="probed keys")
    step_tok = 0 if representative == "descent" else probe_step(representative, chunk_tok)
    at_once = not step_tok and R == 1 and 1 < chunk_tok <= WHOLE_TOK
    few = _few(N, H // K * (2 if at_once else R))
    if step_tok:  # a scan: all probes of a chunk, for all heads of a group
        floats = max(H * R, D if few else K * D)  # of a probe
        offsets = torch.arange(step_tok // 2, chunk_tok, step_tok, device=k.device).split(max(1, FLOATS // floats))
        width = max(1, FLOATS // (chunk_tok // step_tok * floats))  # chunks at a time
    else:  # one key for every head
        offsets, width = (), max(64, FLOATS // (chunk_tok * D if at_once and few else H * max(R, D)))
    step = max(1, min(N, width // max(1, C)))  # blocks at a time
    for n in range(0, N, step):
        part = slice(n, n + step)
        of_part = _of_blocks(rotation, part)
        right = _Probe(q_right[:, part], keys, of_part)
        left = right if q_right is q_left else _Probe(q_left[:, part], keys, of_part)
        both = _Probe(torch.cat([q_left[:, part], q_right[:, part]], 2), keys, of_part) if at_once and left is not right else right
        candidates = int(counts[:, part].amax())
        for c in range(0, candidates, width):
            rank = torch.arange(c, min(c + width, candidates), device=k.device)
            listed = (starts if starts.shape[1] == 1 else starts[:, part])[..., c : c + len(rank)]
            present = (rank < counts[:, part, None]) & (listed < limits[part, None])
            if not present.any():
                continue
            start, size = _extent(listed, present, limits[part], chunk_tok, T)
            if offsets:
                best = _scan(right, start, size, rank, offsets)
            elif at_once and isinstance(size, int):
                best = _descend_at_once(both, start, rank, chunk_tok)
            else:
                best = _descend(left, right, start, size, rank, chunk_tok)
            scores[:, part, c : c + len(rank)] = best.amax(2).masked_fill_(~present, NONE)
    return scores


def _extent(starts: Tensor, present: Tensor, limits: Tensor, chunk_tok: int, n_keys: int) -> tuple[Tensor, Tensor | int]:
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


def _descend_at_once(both: _Probe, start: Tensor, rank: Tensor, chunk_tok: int) -> Tensor:
    """The same for whole chunks and one query row, left and right, with all keys of a chunk multiplied at once.

    In short chunks they are fewer than the probes of all heads, and lie side by side.
    """
    token = (start[..., None] + torch.arange(chunk_tok, device=start.device)).flatten(-2)
    products = both.products(token, rank.repeat_interleave(chunk_tok)).unflatten(-1, (len(rank), chunk_tok))
    left, right = products[:, :, :, 0], products[:, :, :, -1]
    low, best = torch.zeros(*left.shape[:-1], 1, dtype=torch.int64, device=start.device), None
    for depth in range(chunk_tok.bit_length() - 1):
        half = chunk_tok >> (depth + 1)
        score_left, score_right = left.gather(-1, low + half // 2), right.gather(-1, low + half + half // 2)
        better = torch.maximum(score_left, score_right)
        best = better if best is None else torch.maximum(best, better)
        low = torch.where(score_left > score_right, low, low + half)
    assert best is not None
    return best.squeeze(-1)


def _scan(right: _Probe, start: Tensor, size: Tensor | int, rank: Tensor, offsets: Sequence[Tensor]) -> Tensor:
    """All probed keys of the chunks, which lie side by side or not far apart, in one product, or in a few for very long chunks."""
    best = None
    for some in offsets:
        inside = torch.minimum(some, size[..., None] - 1) if isinstance(size, Tensor) else some
        token = (start[..., None] + inside).flatten(-2)
        score = right(token, rank.repeat_interleave(len(some))).unflatten(-1, (len(rank), -1)).amax(-1)
        best = score if best is None else torch.maximum(best, score)
    assert best is not None
    return best


def _as_keys(summaries: Summaries, starts: Tensor, limits: Tensor, chunk_tok: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Landmarks ``[K, P * 2, D]`` as keys, and starts, limits and size of chunks among them."""
    starts, limits = (2 * torch.div(x - summaries.first_tok, summaries.piece_tok, rounding_mode="floor") for x in (starts, limits))
    return summaries.rows.flatten(1, 2), starts, limits, 2 * chunk_tok // summaries.piece_tok


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
    for c in range(0, int(counts.amax()), width):
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
            if _few(N, rows.shape[1]):
                found = torch.bmm(landmarks, rows.mT).mT
            else:
                found = scratch("products", (K, rows.shape[1], len(rank) * each), q)
                torch.bmm(rows, landmarks.mT, out=found)
            best = found.unflatten(1, (-1, q.shape[2])).amax(2)
            scores[:, part, c : c + len(rank)] = best.unflatten(2, (len(rank), each)).amax(3).masked_fill_(~present, NONE)
    return scores


class _Probe:
    """Scores of probed keys under the queries ``[H, n, R, D]`` of some blocks."""

    def __init__(self, q: Tensor, keys: KeyRows, rotation: ScoreRotation | None):
        self.keys, self.rotation = keys, rotation if rotation and rotation.turns_keys else None
        q = keys.convert(q)
        q = torch.view_as_real(q).flatten(-2) if q.is_complex() else q
        self.q = q.unflatten(0, (len(keys.heads), -1)).transpose(1, 2).contiguous()

    def __call__(self, token: Tensor, rank: Tensor) -> Tensor:
        """Best product over the rows, ``[K, n, G, C]``, with the keys at ``token`` ``[K or 1, n or 1, G or 1, C]`` of chunks ``rank``."""
        return self.products(token, rank).amax(3)

    def products(self, token: Tensor, rank: Tensor) -> Tensor:
        """All products ``[K, n, G, R, C]``, in memory that the next call uses again."""
        K, n, G, R, D = self.q.shape
        factor = None
        if self.rotation:
            at = rank if self.rotation.mode == "rank" else self.rotation.keys(token, rank)
            token = token.expand(-1, at.shape[1] if at.ndim > 1 else -1, -1, -1)
            assert self.keys.table is not None, "keys that are rotated come with a table"
            factor = self.keys.table.factor.index_select(0, at.flatten()).unflatten(0, at.shape)
        if token.shape[2] == 1 and _few(n, G * R):
            return self._by_head(token, factor).view(K, n, G, R, token.shape[3])
        keys = self._gather(token, factor)
        batch, C = keys.shape[:3].numel(), token.shape[3]
        rows = self.q.view(batch, -1, D)  # those that look at the same keys go into one product
        products = scratch("products", (batch, rows.shape[1], C), rows)
        torch.bmm(rows, keys.view(batch, C, D).transpose(1, 2), out=products)
        return products.view(K, n, G, R, C)

    def _by_head(self, token: Tensor, factor: Tensor | None) -> Tensor:
        """The same for one block: ``[K, rows, C]``."""
        rows = self.q.flatten(1, 3)
        products = scratch("products", (*rows.shape[:2], token.shape[3]), rows)
        parts = math.gcd(token.shape[3], PARTS)
        for head, (row, product) in enumerate(zip(rows, products, strict=True)):
            mine_token, mine_factor = (x[head : head + 1] if x is not None and x.ndim > 2 and len(x) > 1 else x for x in (token, factor))
            assert mine_token is not None
            keys = self._gather(mine_token, mine_factor, slice(head, head + 1)).view(parts, -1, row.shape[1])
            found = torch.bmm(row.expand(parts, -1, -1), keys.mT)
            product.unflatten(1, (parts, -1)).transpose(0, 1).copy_(found)
        return products

    def _gather(self, token: Tensor, factor: Tensor | None, heads: slice = slice(None)) -> Tensor:
        keys = self.keys.gather(token, heads)
        return keys if factor is None else turn(keys, factor, scratch=True)


def _few(n_blocks: int, n_rows: int) -> bool:
    """Whether a key/value head has so few query rows that they are worth a product of their own."""
    return n_blocks == 1 and n_rows <= FEW_ROWS


def _of_blocks(rotation: ScoreRotation | None, part: slice) -> ScoreRotation | None:
    """The rotation for some blocks, to be asked for positions of ``[K, n, G, C]`` tokens."""
    return rotation and replace(rotation, first=rotation.first[part, None], last=rotation.last[part, None])
