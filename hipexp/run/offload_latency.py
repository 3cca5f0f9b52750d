"""Latency of a layer's decode steps with keys and values off the device, beside the same steps with all on it; what crosses the link.

Both are launched by the host: steps that fetch are no CUDA graphs.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.inputs import Inputs
from hipexp.attention.reads import unit_tok_of
from hipexp.attention.refresh import Candidates
from hipexp.cache.offloaded import OffloadedStore
from hipexp.cache.placement import Placement
from hipexp.cache.resident import ResidentStore
from hipexp.cache.summaries import KeySummaries
from hipexp.config.offload import page_tok_of
from hipexp.config.schema import Heads, Representative
from hipexp.run.attention_latency import period_of, step_times

FILLED_TOK = 32_768  # appended at a time, as parts of a prompt are


class Side:
    """A store of ``layer``'s keys and values up to ``n_tok``, and what a layer of a pipeline remembers of them."""

    def __init__(self, attention: LayerAttention, layer: Inputs, store: ResidentStore | OffloadedStore, n_tok: int):
        self.attention, self.layer, self.store = attention, layer, store
        self.memory, self.state = Memory(), attention.method.new_state()
        store.reserve(layer.keys.shape[1], layer.keys)
        for begin in range(0, n_tok, FILLED_TOK):
            self._append(begin, min(begin + FILLED_TOK, n_tok))
            store.settle()
        if isinstance(store, OffloadedStore):
            store.decoding = True

    def step(self, q: Tensor, position: int) -> tuple[Tensor, float]:
        """What queries ``[H, 1, D]`` of the token at ``position`` get, and its milliseconds; its key is appended before that."""
        self._append(position, position + 1)
        step, wait = self.attention.step_at(position, q.device), torch.cuda.synchronize if q.is_cuda else lambda: None
        wait()
        begin = time.perf_counter()
        out = self.attention(q, *self.store.view(), position, self.memory, step, self.state)
        wait()
        return out, (time.perf_counter() - begin) * 1e3

    def _append(self, begin: int, end: int) -> None:
        self.store.append(self.layer.keys[:, begin:end], self.layer.values[:, begin:end])
        if isinstance(self.state, KeySummaries):
            self.state.catch_up(self.store.view()[0], end)


def offload_row(attention: LayerAttention, layer: Inputs, periods: int, name: str, device_tok: int) -> dict[str, Any]:
    """Time whole refresh periods behind one that is not timed, with ``device_tok`` tokens on the device and the rest in host memory.

    The times of ``step_times``, and as ``resident_…`` those of a store that has all on the device, in turn with them. ``link_bytes`` of a
    mean step and of the worst; ``resident_bytes`` and ``offloaded_bytes``: of the stores, on the device. Raises ArithmeticError if results
    are not the same bits. On a GPU a ``descent`` into offloaded keys sums in another order (see ``docs/offload.md``) and may select others:
    then ``other_steps`` counts the steps in which it did, and the bits are those of all others.
    """
    plan, n_tok = attention.plan, layer.keys.shape[1]
    period = period_of(plan)
    n_steps = period * (1 + periods)
    queries = [layer.queries(step)[:, None] for step in range(n_steps)]
    per_head, page_tok = plan.heads is Heads.per_kv, page_tok_of([plan])
    placement = Placement(unit_tok_of(plan), per_head, plan.sink_tok, plan.window_tok, page_tok, device_tok)
    offloaded = OffloadedStore(placement)
    times, link, other_steps = dict[str, list[float]](resident=[], offloaded=[]), [0], 0
    may_differ = layer.keys.is_cuda and any(stage.representative is Representative.descent for stage in plan.decode)
    try:
        stores: dict[str, ResidentStore | OffloadedStore] = {"resident": ResidentStore(), "offloaded": offloaded}
        sides = {key: Side(attention, layer, store, n_tok - n_steps) for key, store in stores.items()}
        for step, q in enumerate(queries):
            outs = []
            for key, side in sides.items():
                out, ms = side.step(q, n_tok - n_steps + step)
                outs.append(out)
                times[key].append(ms)
            if may_differ and not _same_selection([side.memory.lists[len(plan.decode)] for side in sides.values()]):
                other_steps += 1
            elif not torch.equal(*outs):
                raise ArithmeticError(f"{name}: step {step} differs by {(outs[0] - outs[1]).abs().max():.3g} where keys are offloaded")
            link.append(sum(one.h2d_bytes for (phase, _), one in offloaded.traffic.counts.items() if phase == "decode"))
        device_bytes = {f"{key}_bytes": side.store.bytes for key, side in sides.items()}
    finally:
        offloaded.close()
    moved = [now - before for before, now in pairwise(link)][period:]
    row: dict[str, Any] = {"phase": "offload", "context_tok": n_tok, "dense": False, "impl": name, "device_tok": device_tok}
    row |= step_times(plan, times["offloaded"][period:])
    row |= {f"resident_{key}": ms for key, ms in step_times(plan, times["resident"][period:]).items()}
    row |= {"link_bytes": sum(moved) / len(moved), "worst_link_bytes": max(moved), "steps": len(moved), "other_steps": other_steps}
    return row | device_bytes


def _same_selection(selections: list[Candidates]) -> bool:
    """Whether two selections have the same chunks; behind those that count a list may hold anything."""
    (one, counts), (other, others) = selections
    listed = torch.arange(one.shape[-1], device=one.device) < counts[..., None]
    return torch.equal(counts, others) and torch.equal(one.masked_fill(~listed, -1), other.masked_fill(~listed, -1))
