"""All chunks of a few query blocks in lockstep: gather the probed keys, multiply, keep the better half.

Blocks are taken in groups so that the products stay in the processor's cache.
"""

import torch
from torch import Tensor

from hipexp_kernels.rope import KeyRotation, rotate

PRODUCTS = 1 << 20  # floats of scores in flight: 4 MiB, found best on a CPU with 1 MiB of L2 and 32 MiB of L3


def score_chunks(
    q_left: Tensor, q_right: Tensor, k: Tensor, starts: Tensor, counts: Tensor, limits: Tensor, *, chunk_tok: int, representative: str, rotation: KeyRotation | None
) -> Tensor:
    H, N, R, _ = q_left.shape
    S, C = starts.shape[0], starts.shape[2]
    scores = torch.empty(H, N, C, dtype=torch.float32, device=k.device)
    walk = _descend if representative == "descent" else _scan
    step = max(1, PRODUCTS // max(1, H * R * C))
    for n in range(0, N, step):
        part = slice(n, min(n + step, N))
        part_starts = starts if starts.shape[1] == 1 else starts[:, part]
        part_rotation = rotation and KeyRotation(rotation.mode, rotation.table, rotation.trained_tok, rotation.first[part], rotation.last[part])
        scores[:, part] = walk(q_left[:, part], q_right[:, part], k, part_starts, limits[part], chunk_tok, part_rotation)
    absent = torch.arange(C, device=k.device) >= counts[..., None]
    absent |= starts >= limits[:, None]
    group = H // S
    return scores.view(S, group, N, C).masked_fill_(absent[:, None], float("-inf")).view(H, N, C)


def _probe(q: Tensor, k: Tensor, token: Tensor, rotation: KeyRotation | None) -> Tensor:
    """Best product over the rows, ``[K, G, n, C]``, of queries ``[K, G, n, R, D]`` with the keys at ``token`` ``[K or 1, G or 1, n or 1, C]``."""
    K, G, n, R, D = q.shape
    lists, C = token.shape[:3], token.shape[3]
    if rotation is not None:
        token = token.expand(*lists[:2], n, C)
        lists = token.shape[:3]
    keys = torch.stack([k[i].index_select(0, token[i if lists[0] > 1 else 0].reshape(-1)) for i in range(K)]).view(K, *lists[1:], C, D)
    if rotation is not None:
        rank = torch.arange(C, device=k.device)
        at = rotation.positions(token, rank)
        keys = rotate(keys, rotation.table.cos[at], rotation.table.sin[at]) if rotation.mode != "rank" else rotate(keys, rotation.table.cos[:C], rotation.table.sin[:C])
    heads, blocks = keys.shape[1], keys.shape[2]
    if heads == G and blocks == n:
        products = torch.bmm(q.reshape(K * G * n, R, D), keys.view(K * G * n, C, D).transpose(1, 2))
        return products.view(K, G, n, R, C).amax(3)
    if blocks == n:  # one list per key head: its query heads become rows
        products = torch.bmm(q.transpose(1, 2).reshape(K * n, G * R, D), keys.view(K * n, C, D).transpose(1, 2))
        return products.view(K, n, G, R, C).amax(3).transpose(1, 2)
    products = torch.bmm(q.reshape(K, G * n * R, D), keys.view(K, C, D).transpose(1, 2))  # one list for all blocks
    return products.view(K, G, n, R, C).amax(3)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    return q.float().unflatten(0, (k.shape[0], -1))


def _bounds(starts: Tensor, limits: Tensor, chunk_tok: int) -> tuple[Tensor, Tensor, bool]:
    """First and last-plus-one token of every chunk ``[S, 1, n or 1, C]``, at least one token wide, and whether all are whole."""
    left = starts[:, None].clamp(min=0)
    whole = bool((left.amax(-1) + chunk_tok <= limits).all()) if left.numel() else True
    if whole:
        return left, left + chunk_tok, True
    limit = limits[:, None].clamp(min=1)
    left = torch.minimum(left, limit - 1)
    return left, torch.minimum(left + chunk_tok, limit), False


def _descend(q_left: Tensor, q_right: Tensor, k: Tensor, starts: Tensor, limits: Tensor, chunk_tok: int, rotation: KeyRotation | None) -> Tensor:
    k = k.float()
    q_left, q_right = _grouped(q_left, k), _grouped(q_right, k)
    left, right, whole = _bounds(starts, limits, chunk_tok)
    if chunk_tok == 1:
        return _probe(q_right, k, left, rotation).flatten(0, 1)
    best, width = None, chunk_tok
    while width > 1:
        width = (width + 1) // 2
        centre = (left + right) // 2
        score_left = _probe(q_left, k, (left + centre) // 2, rotation)
        score_right = _probe(q_right, k, (centre + right) // 2, rotation)
        go_left = score_left > score_right
        better = torch.maximum(score_left, score_right)
        if not whole:  # a chunk that is down to one token stays there; one that never had two is probed as a right half
            done = right - left <= 1
            better = torch.where(done & (best is not None), float("-inf"), torch.where(done, score_right, better))
            go_left &= ~done
        best = better if best is None else torch.maximum(best, better)
        left, right = torch.where(go_left, left, centre), torch.where(go_left, centre, right)
    return best.flatten(0, 1)


def _scan(q_left: Tensor, q_right: Tensor, k: Tensor, starts: Tensor, limits: Tensor, chunk_tok: int, rotation: KeyRotation | None) -> Tensor:
    k = k.float()
    q_right = _grouped(q_right, k)
    left, right, _ = _bounds(starts, limits, chunk_tok)
    best = _probe(q_right, k, left, rotation)
    for offset in range(1, chunk_tok):
        best = torch.maximum(best, _probe(q_right, k, torch.minimum(left + offset, right - 1), rotation))
    return best.flatten(0, 1)
