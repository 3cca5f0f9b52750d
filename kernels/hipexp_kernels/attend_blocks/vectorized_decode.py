"""A single query. What the step before attended to is held, rotated, and attended to again; only what is new is read and rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from hipexp_kernels.attend_blocks.dense import attend_parts
from hipexp_kernels.attend_blocks.held import Held
from hipexp_kernels.paged import KV, Paged, run_of
from hipexp_kernels.rope import AttendRotation, RopeTable, turn
from hipexp_kernels.rows import convert, scratch


def attend_one(
    q: Tensor, k: KV, v: KV, blocks: Tensor, counts: Tensor, position: int, held: Held, *,
    block_tok: int, sink_tok: int, window_tok: int, scale: float, rotation: AttendRotation | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output ``[H, 1, 1, D]`` and log-sum-exp of ``q`` ``[H, 1, 1, D]`` at ``position``; ``blocks`` ``[S, M]`` and ``counts`` ``[S]``."""
    H, K, shape, table = len(q), len(k), q.shape, rotation.table if rotation else None
    begin, end = max(0, position - window_tok + 1), position + 1
    q = convert(q, table).view(K, H // K, -1)
    near_rows, near_keys = _window(q, k, table, begin, end, window_tok, held)
    near_values = run_of(v, begin, end)
    packed = rotation is None or rotation.mode == "streaming"  # the place in a list is all that counts
    held.sinks = sink_tok if packed else 0
    held.serve(len(blocks))
    if not packed:
        held.clear()
    made = []
    for s, (heads, members) in enumerate(_lists(len(blocks), H, K)):
        parts = [(near_rows[heads, members], near_keys[heads], near_values[heads])]
        listed, n_sinks = blocks[s, : counts[s]], min(sink_tok, begin)
        n_far = n_sinks + int((begin - listed).clamp(0, block_tok).sum())
        if n_far:
            held.reserve(s, near_values[heads], sink_tok + blocks.shape[1] * block_tok)
            if n_far > held.count(s):
                token = _far_tokens(listed, block_tok, n_sinks, begin)
                angle = rotation.keys(token, position, position, n_far, window_tok) if rotation else None
                _hold(held, s, k, v, heads, table, token, angle)
            rows = q[heads, members]
            if rotation:
                rows = turn(rows, rotation.table.factor[rotation.query(position, position, n_far, end - begin)])
            parts.append((rows.to(v.dtype), *held.rows(s, n_far)))
        made.append(attend_parts(parts, scale, softcap))
    out, lse = (torch.cat(some) for some in zip(*made, strict=True))
    return out.view(shape), lse.view(H, 1, 1)


def _lists(n: int, H: int, K: int) -> list[tuple[slice, slice]]:
    """For each of ``n`` lists its key/value heads, and which of the query heads of each: all, unless every query head has a list."""
    if n == 1:
        return [(slice(0, K), slice(None))]
    if n == K:
        return [(slice(s, s + 1), slice(None)) for s in range(K)]
    G = H // K
    return [(slice(h // G, h // G + 1), slice(h % G, h % G + 1)) for h in range(H)]


def _window(
    q: Tensor, k: KV, table: RopeTable | None, begin: int, end: int, window_tok: int, held: Held
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows ``[K, R, D]`` of converted queries ``q`` and the window's keys ``[K, n, D]``, rotated as if the sequence began at its origin."""
    if table is None:
        return q.to(k.dtype), run_of(k, begin, end)
    factor = table.factor

    def make(origin: int, begin: int, end: int) -> Tensor:
        keys = convert(run_of(k, begin, end), table, "window keys, paired")
        return turn(keys, factor[begin - origin : end - origin], scratch=True).to(k.dtype)

    keys, origin = held.window(begin, end, min(window_tok + window_tok // 4, len(factor)), make)
    return turn(q, factor[end - 1 - origin]).to(k.dtype), keys


def _far_tokens(blocks: Tensor, block_tok: int, n_sinks: int, begin: int) -> Tensor:
    """Tokens of sinks and selected ``blocks`` before the window, which begins at token ``begin``."""
    tokens = (blocks[:, None] + torch.arange(block_tok, device=blocks.device)).flatten()
    return torch.cat([torch.arange(n_sinks, device=blocks.device), tokens[tokens < begin]])


def _hold(
    held: Held, number: int, k: KV, v: KV, heads: slice, table: RopeTable | None, token: Tensor, angle: Tensor | None
) -> None:  # fmt: skip
    """Add those of ``token`` that are not in a list yet, head by head: what is gathered is in the processor's cache when it is rotated."""
    have = held.count(number)
    token = token[have:]
    keys, values = held.grow(number, len(token))
    at_hand_k, at_hand_v = _at_hand(k, heads, token, "held keys, all"), _at_hand(v, heads, token, "held values, all")
    if isinstance(k, Paged):
        token = torch.arange(len(token), device=token.device)
    for raw_k, raw_v, new_k, new_v in zip(at_hand_k, at_hand_v, keys, values, strict=True):
        torch.index_select(raw_v, 0, token, out=new_v)
        if table is None or angle is None:
            torch.index_select(raw_k, 0, token, out=new_k)
            continue
        raw = torch.index_select(raw_k, 0, token, out=scratch("held keys", (len(token), k.shape[2]), raw_k))
        new_k.copy_(turn(convert(raw, table, "held keys, paired"), angle[have:], scratch=True))


def _at_hand(x: KV, heads: slice, token: Tensor, purpose: str) -> Tensor:
    """Keys or values of some heads: all of them where they are at hand, else those at ``token``."""
    if isinstance(x, Tensor):
        return x[heads]
    shape = (len(range(*heads.indices(len(x)))), len(token), x.shape[2])
    return x.gather(token[None], heads, scratch(purpose, shape, torch.empty(0, dtype=x.dtype, device=x.device)))
