"""Attention of one query to a given selection, by our kernel and by every other way there is: what a cached decode step costs.

A contestant takes ``q`` ``[H, D]``, ``k``, ``v`` ``[K, T, D]`` (rotated already) and a :class:`Chosen`, and returns ``[H, D]``. What
stays while a selection stays (lists of tokens, masks, plans, another layout of the cache) is made on first use and not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from hipexp_kernels import attend_blocks
from hipexp_kernels.rope import AttendRotation
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.inputs import Inputs
from hipexp.run.contestants import FLEX_BLOCK_TOK, compiled_flex, packed
from hipexp.run.timing import Contestant, fastest, missing, missing_compiler, runnable, time_alternating

OWN = "attend_blocks"
MOST_ERROR = 0.02  # of bf16
WORKSPACE_BYTES = 128 << 20  # that FlashInfer asks for


@dataclass(eq=False)
class Chosen:
    """What the last of ``n_tok`` tokens attends to: ``sink_tok`` at the beginning, blocks of ``block_tok``, ``window_tok`` at the end.

    The blocks' ``starts`` ``[M]`` ascend, from ``sink_tok`` on, and all their tokens lie before the window.
    """

    starts: Tensor
    n_tok: int
    sink_tok: int
    window_tok: int
    block_tok: int

    @cached_property
    def tokens(self) -> Tensor:
        """Positions ``[n]`` of all of them, ascending."""
        device = self.starts.device
        middle = (self.starts[:, None] + torch.arange(self.block_tok, device=device)).flatten()
        near = torch.arange(self.n_tok - self.window_tok, self.n_tok, device=device)
        return torch.cat([torch.arange(self.sink_tok, device=device), middle, near])

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``blocks``, ``counts``, ``first`` and ``exact`` of :func:`hipexp_kernels.attend_blocks.attend_blocks`."""
        device = self.starts.device
        count, first = (torch.full(shape, value, device=device) for shape, value in (((1, 1), len(self.starts)), ((1,), self.n_tok - 1)))
        return self.starts.view(1, 1, -1), count, first, torch.zeros(1, dtype=torch.bool, device=device)

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """What the others make of it once."""
        return {}


def selected_contestants(rotation: AttendRotation) -> list[Contestant]:
    """All of them. Ours twice: as the others, and rotating queries and keys by itself."""
    return [
        Contestant(OWN, _own),
        Contestant(f"{OWN}, rotating", partial(_own, rotation=rotation)),
        Contestant("gather, then sdpa", _gather_sdpa),
        Contestant("sdpa, gathered before", _gathered_sdpa),
        Contestant("flex, our mask", _flex, missing_compiler),
        Contestant("flashinfer, a block a page", _flashinfer, partial(missing, "flashinfer")),
    ]


def selected_rows(attention: LayerAttention, layers: list[Inputs], rounds: int, skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per contestant, with what a full refresh of ``attention`` selects in every layer.

    ``tokens``: attended to, of the first layer. ``error``: relative distance from the result in fp64, of the first layer; who is further
    away than ``MOST_ERROR`` is left out. ``speedup`` of ours: over the fastest of the others.
    """
    assert attention.tables is not None and attention.plan.decode
    n_tok, tables = layers[0].keys.shape[1], attention.tables
    inputs = [(layer.queries(0), layer.keys, layer.values, chosen_by(attention, layer)) for layer in layers]
    rotation = AttendRotation("streaming", tables.upto(max(len(chosen.tokens) for *_, chosen in inputs)), tables.trained_tok)
    able, reasons = runnable([c for c in selected_contestants(rotation) if c.name not in skip], inputs)
    common = {"phase": "selected", "context_tok": n_tok, "dense": False, "tokens": len(inputs[0][3].tokens)}
    errors = {c.name: None if "rotating" in c.name else relative_error(c.run(*inputs[0]), *inputs[0]) for c in able}
    wrong = {name: f"wrong: {error:.2g} from the result" for name, error in errors.items() if error is not None and not error < MOST_ERROR}
    able, reasons = [c for c in able if c.name not in wrong], reasons | wrong
    rows = [{**common, "impl": row["name"], "error": errors[row.pop("name")], **row} for row in time_alternating(able, inputs, rounds)]
    if others := [row for row in rows if not row["impl"].startswith(OWN)]:
        best = fastest(others)
        for row in rows:
            if row["impl"].startswith(OWN):
                row |= {"speedup": best["mean_ms"] / row["mean_ms"], "against": best["impl"]}
    return rows + [{**common, "impl": name, "note": reason} for name, reason in reasons.items()]


def chosen_by(attention: LayerAttention, layer: Inputs) -> Chosen:
    """What a decode step after the last token of a layer attends to; of blocks that reach into the window, the window keeps its part."""
    plan, n_tok, memory = attention.plan, layer.keys.shape[1], Memory()
    attention(layer.queries(0)[:, None], layer.keys, layer.values, n_tok - 1, memory)
    starts, counts = memory.lists[len(plan.decode)]
    assert len(starts) == 1, "the contestants take one list for all heads"
    starts, size = starts[0, 0, : int(counts[0, 0])], plan.decode[-1].chunk_tok
    return Chosen(starts[starts + size <= n_tok - plan.window_tok].clone(), n_tok, plan.sink_tok, plan.window_tok, size)


def relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> float:
    """Of ``out`` ``[H, D]``, against softmax attention to the chosen tokens in fp64."""
    keys, values = (x[:, chosen.tokens].double() for x in (k, v))
    logits = packed(q, k).double() @ keys.mT * q.shape[-1] ** -0.5
    expected = (logits.softmax(-1) @ values).view(q.shape)
    return float((out.double() - expected).norm() / expected.norm())


def _own(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen, rotation: AttendRotation | None = None) -> Tensor:
    out, _ = attend_blocks(
        q.view(len(q), 1, 1, -1), k, v, *chosen.lists, block_tok=chosen.block_tok, sink_tok=chosen.sink_tok, window_tok=chosen.window_tok,
        scale=q.shape[-1] ** -0.5, rotation=rotation,
    )  # fmt: skip
    return out.view(q.shape)


def _gather_sdpa(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
    """The tokens are copied in every step: each has another window."""
    keys, values = (x.index_select(1, chosen.tokens)[None] for x in (k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refuses, rather than falling back
        return F.scaled_dot_product_attention(packed(q, k)[None], keys, values)[0].reshape(q.shape)


def _gathered_sdpa(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
    """Of what was gathered when the selection was made; a step writes its own token behind it."""
    keys, values = _prepared(chosen, "gathered", lambda: [x.index_select(1, chosen.tokens)[None] for x in (k, v)])
    keys[0, :, -1].copy_(k[:, -1])
    values[0, :, -1].copy_(v[:, -1])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(packed(q, k)[None], keys, values)[0].reshape(q.shape)


def _prepared(chosen: Chosen, name: str, make: Callable[[], Any]) -> Any:
    if name not in chosen.prepared:
        chosen.prepared[name] = make()
    return chosen.prepared[name]


def _flex(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
    rows = packed(q, k)[None]
    mask = _prepared(chosen, "flex", lambda: block_mask(chosen, rows.shape[2]))
    return compiled_flex()(rows, k[None], v[None], block_mask=mask)[0].reshape(q.shape)


def block_mask(chosen: Chosen, n_rows: int) -> Any:
    """FlexAttention's ``BlockMask`` of ``n_rows`` queries: blocks that are chosen whole, and in the others the chosen tokens.

    Blocks of 128 tokens, so that several times the chosen tokens are read: with smaller ones it does not compile on all GPUs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size = FLEX_BLOCK_TOK
    attended = torch.zeros(-(-chosen.n_tok // size) * size, dtype=torch.bool, device=chosen.starts.device)
    attended[chosen.tokens] = True
    parts = attended.view(-1, size)
    whole = parts.all(1)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many, and all blocks with these first, ascending: the lists are as wide as there are blocks."""
        order = blocks.to(torch.int32).argsort(descending=True, stable=True)
        return blocks.sum().to(torch.int32).view(1, 1, 1), order.to(torch.int32)[None, None, None]

    def sees(_batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        return attended[key]

    return BlockMask.from_kv_blocks(
        *listed(parts.any(1) & ~whole), *listed(whole), BLOCK_SIZE=size, mask_mod=sees, seq_lengths=(n_rows, chosen.n_tok)
    )  # fmt: skip


@cache
def _workspace(device: torch.device) -> Tensor:
    """Of all plans: they run one after the other."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> Tensor:
    plan, pages = _prepared(chosen, "flashinfer", lambda: _planned(q, k, v, chosen))
    return plan.run(q[None], pages)[0]


def _planned(q: Tensor, k: Tensor, v: Tensor, chosen: Chosen) -> tuple[Any, tuple[Tensor, Tensor]]:
    """FlashInfer's plan for one sequence with pages of the size of a block, and the chosen pages ``[pages, K, size, D]``, anywhere."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    size = chosen.block_tok
    if any(n % size for n in (chosen.n_tok, chosen.sink_tok, chosen.window_tok)):
        raise ValueError(f"pages of {size} tokens need a context, sinks and a window that are multiples of them")
    order = torch.randperm(len(chosen.tokens) // size).to(k.device)
    attended = order.argsort().to(torch.int32)
    chosen_pages = (chosen.tokens[::size] // size)[order]
    pages = tuple(x.unflatten(1, (-1, size))[:, chosen_pages].transpose(0, 1).contiguous() for x in (k, v))
    plan = BatchDecodeWithPagedKVCacheWrapper(_workspace(k.device), "HND", use_tensor_cores=True)
    bounds, last = (torch.tensor(x, dtype=torch.int32, device=k.device) for x in ([0, len(attended)], [size]))
    plan.plan(bounds, attended, last, len(q), len(k), k.shape[2], size, q_data_type=q.dtype, kv_data_type=k.dtype)
    return plan, (pages[0], pages[1])
