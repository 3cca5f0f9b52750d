"""Single queries of a prompt with attention to every key before them, where the rest of the prompt attends to a selection.

A query within the trained length has all keys at their true positions: that is dense attention. Beyond it true distances are longer than
any that the model was trained on; keys that are ``far_tok`` or more before such a query then all lie ``far_tok`` before it (as under
``rope.attend: infllm``), nearer ones at their true distance.
"""

from __future__ import annotations

import torch
from hipexp_kernels import merge_lse
from hipexp_kernels.attend_blocks.dense import attend_all
from hipexp_kernels.paged import KV, run_of
from hipexp_kernels.rope import rotate
from torch import Tensor

from hipexp.attention.logits import at_distance
from hipexp.attention.rope import RopeTables

QUERIES = 64  # at a time
KEYS = 16384  # at a time, so that neither logits nor keys that were elsewhere take much room


def attend_to_all(
    q: Tensor, at: range, k: KV, v: KV, tables: RopeTables | None, scale: float, softcap: float | None, far_tok: int
) -> Tensor:  # fmt: skip
    """Return ``[H, R, D]``: raw queries ``[H, R, D]`` at the positions ``at`` (ascending) over all raw keys and values up to each.

    ``k``, ``v`` ``[K, T, D]``. ``tables`` None: the layer has no RoPE, and distances are nothing to it.
    """
    known = range(at.start, at.stop if tables is None else min(at.stop, tables.trained_tok), at.step)
    out = torch.empty_like(q)
    for begin, end, reach in ((0, len(known), None), (len(known), len(at), far_tok)):
        for row in range(begin, end, QUERIES):
            rows = slice(row, min(row + QUERIES, end))
            out[:, rows] = _attend(q[:, rows], at[rows], k, v, tables, scale, softcap, reach)
    return out


def _attend(
    q: Tensor, at: range, k: KV, v: KV, tables: RopeTables | None, scale: float, softcap: float | None, reach: int | None
) -> Tensor:  # fmt: skip
    """As :func:`attend_to_all`, of a few queries that all are, or all are not (``reach``: its ``far_tok``), within the trained length."""
    K, first, end = k.shape[0], at[0], at[-1] + 1
    near = first if reach is None else max(0, first - reach + 1)  # keys before are far from every query, or seen by every one
    origin = 0 if reach is None else near
    own, token = torch.arange(first, end, at.step, device=q.device), torch.arange(near, end, device=q.device)

    def turned(x: Tensor, where: Tensor) -> Tensor:
        if tables is None:
            return x
        table = tables.upto(end - origin)
        return rotate(x.float(), table.cos[where - origin], table.sin[where - origin]).to(x.dtype)

    def product(rows: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("kgrd,ktd->kgrt", rows.unflatten(0, (K, -1)), keys).float() * scale

    far_q = true_q = turned(q, own)
    near_k, near_v = run_of(k, near, end), run_of(v, near, end)
    distance = own[:, None] - token
    logits = product(true_q, turned(near_k, token))
    if reach is not None:
        assert tables is not None
        far_q = at_distance(q, reach, tables).to(q.dtype)
        logits = torch.where(distance < reach, logits, product(far_q, near_k))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(distance < 0, -torch.inf).flatten(1, 2)
    outs, sums = [(logits.softmax(-1) @ near_v.float()).to(q.dtype)], [logits.logsumexp(-1)]
    rows = far_q.unflatten(0, (K, -1)).flatten(1, 2)
    for begin in range(0, near, KEYS):
        stop = min(begin + KEYS, near)
        keys = run_of(k, begin, stop)
        keys = turned(keys, torch.arange(begin, stop, device=q.device)) if reach is None else keys
        part, total = attend_all(rows, keys, run_of(v, begin, stop), scale, softcap)
        outs.append(part)
        sums.append(total)
    return merge_lse(outs, sums)[0].view(q.shape)
