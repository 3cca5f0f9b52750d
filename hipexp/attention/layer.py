"""One attention layer of one sequence under a pipeline: select, then attend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from hipexp_kernels import attend_blocks
from hipexp_kernels.paged import KV, read_by, whole
from hipexp_kernels.rope import AttendRotation
from torch import Tensor

from hipexp.attention.blocks import QueryBlocks, Step
from hipexp.attention.method import EVERYTHING, Call, DenseMethod, Method, SelectingMethod
from hipexp.attention.methods import make_method
from hipexp.attention.methods.streaming import Streaming
from hipexp.attention.reads import Listener
from hipexp.attention.refresh import Memory
from hipexp.attention.rope import RopeTables
from hipexp.attention.selection import Selection
from hipexp.cache.traces import ATTEND
from hipexp.config.schema import AttendRope, LayerPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class LayerAttention:
    """The attention of one layer.

    ``tables`` None: the layer has no RoPE. ``softcap``: as in Gemma-2. ``everything``: attend to all keys, whatever the plan says.
    ``pruned_blocks`` counts the query blocks (of a :class:`DenseMethod` the queries) whose attention was not the dense one. ``listener`` is
    told what is read; None costs nothing. ``processes``: those that have the layer's other heads; None: all are here.
    Raises ConfigError as ``make_method``.
    """

    plan: LayerPlan
    tables: RopeTables | None
    scale: float
    softcap: float | None = None
    pruned_blocks: int = 0
    listener: Listener | None = None
    everything: bool = False
    processes: ProcessGroup | None = None
    method: Method = field(init=False)

    def __post_init__(self) -> None:
        self.method = make_method(self.plan)

    def __call__(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        begin: int,
        memory: Memory | None = None,
        step: Step | None = None,
        state: Any = None,
        shared: dict[Any, Any] | None = None,
    ) -> Tensor:
        """Return ``[H, Q, D]``: queries ``q`` ``[H, Q, D]`` at positions ``begin`` … over raw keys and values ``[K, T, D]``.

        With ``memory`` (decode) ``Q`` must be 1 and the layer's decode stages and refresh schedule apply. ``step``: its position as
        the device reads it, in place of ``begin`` (see :meth:`step_at`): in a CUDA graph that is replayed for later tokens ``begin`` is
        the last position it will serve, and ``k`` and ``v`` reach as far; call it once so before it is captured. ``state``: what the
        method's ``new_state`` made for the sequence in this layer, ``shared``: what its layers share; None: nothing is remembered between
        calls. Raises ValueError if ``Q`` is not 1 there, for a later part of a prompt that does not start where a query block does, and for
        tokens behind others without the state of a method that needs it.
        """
        if memory and q.shape[1] != 1:
            raise ValueError(f"a decode step has one query, not {q.shape[1]}")
        method = self.method
        if isinstance(method, DenseMethod):
            if not self.everything or k.shape[1] <= method.exact_tok(self.tables):
                return self._attend_all(method, q, k, v, begin, memory)
            method = Streaming(self.plan)
        assert isinstance(method, SelectingMethod)
        if state is None:
            if method.remembers and begin:
                raise ValueError(
                    f"method {self.plan.method} chooses by what it noted of the {begin} tokens before, and nothing was kept; hand over the "
                    "state of the sequence, or use hipexp's own cache, as hipexp.hf.generate does"
                )
            state = method.new_state()
        size = 1 if memory else method.query_block_tok
        if begin % size and method.aligned:
            raise ValueError(
                f"a part of a prompt begins at token {begin} (left padding not counted), inside a query block; cut prompts, and pad rows, "
                f"by multiples of {size} tokens, or use hipexp.hf.generate"
            )
        if memory:
            queries = QueryBlocks.one(q, begin, step or _shared_step(*self.numbers_at(begin), q.device))
        else:
            queries = QueryBlocks.cut(q, begin, size)
        attended = queries if memory or size == method.attended_block_tok else queries.split(method.attended_block_tok)
        exact_tok = self._exact_tok(method, memory is not None)
        n_exact = 0 if step and exact_tok < EVERYTHING else attended.within(exact_tok)  # a selection that is not needed costs little
        tables = self.tables or no_rope(q.device)
        own = {} if shared is None else shared
        call = Call(queries, k, tables, self.scale, memory is not None, memory, state, own, self.listener, self.softcap, self.processes)
        method.observe(call)
        selection = self._select(method, call, attended, n_exact)
        if self.listener:
            self.listener.attends(attended, n_exact, selection)
        if memory:
            memory.step += 1
        out, _ = attend_blocks(
            attended.q, read_by(k, ATTEND), read_by(v, ATTEND), selection.blocks, selection.counts, attended.first,
            queries.step.exact if queries.step else torch.arange(len(attended), device=k.device) < n_exact,
            block_tok=method.block(memory is not None), sink_tok=self.plan.sink_tok, window_tok=self.plan.window_tok,
            scale=self.scale, rotation=self._attend_rotation(method, k.shape[1], queries), softcap=self.softcap,
            held=memory.held if memory else None,
        )  # fmt: skip
        return attended.rows(out)

    def step_at(self, position: int, device: torch.device) -> Step:
        """The decode step of the token at ``position``, for layers whose plans have the same sinks, window and first decode stage."""
        return Step.at(*self.numbers_at(position), device)

    def numbers_at(self, position: int) -> tuple[int, int, bool]:
        """Position, number of first candidates, and whether everything is attended to, of a decode step."""
        if isinstance(self.method, DenseMethod):
            return position, 0, True
        assert isinstance(self.method, SelectingMethod)
        return position, self.method.n_candidates(position), position < self._exact_tok(self.method, True)

    def _exact_tok(self, method: SelectingMethod, decoding: bool) -> int:
        """A block that ends before this position attends to all its keys."""
        return EVERYTHING if self.everything else method.exact_tok(decoding)

    def _select(self, method: SelectingMethod, call: Call, attended: QueryBlocks, n_exact: int) -> Selection:
        """The selection for every attended block; the first ``n_exact`` of them see everything and have none."""
        self.pruned_blocks += len(attended) - n_exact
        if n_exact == len(attended):
            return Selection.empty(n_exact, call.keys.device)
        parts = call.queries.size // attended.size
        skipped = n_exact // parts
        chosen = method.select(replace(call, queries=call.queries.from_block(skipped)))
        if call.memory and call.memory.held and not method.reuses:
            call.memory.held.clear()
        return chosen.after_none(skipped * parts)

    def _attend_all(self, method: DenseMethod, q: Tensor, k: KV, v: KV, begin: int, memory: Memory | None) -> Tensor:
        """The attention of a method that has its own."""
        self.pruned_blocks += max(0, k.shape[1] - max(begin, method.exact_tok(self.tables)))
        if self.listener:
            queries = QueryBlocks.one(q, begin, _shared_step(begin, 0, True, q.device)) if memory else QueryBlocks.cut(q, begin, 1)
            self.listener.attends(queries, len(queries), Selection.empty(len(queries), q.device))
        if memory:
            memory.step += 1
        return method.attend(q, whole(k), whole(v), begin, self.tables, self.scale, self.softcap)

    def _attend_rotation(self, method: SelectingMethod, n_keys: int, queries: QueryBlocks) -> AttendRotation | None:
        if self.tables is None:
            return None
        kept = max((method.keep(decoding) for decoding in (False, True) if method.exact_tok(decoding) < EVERYTHING), default=0)
        rows = min(self.plan.sink_tok + self.plan.window_tok + kept, n_keys) + 2 * queries.size
        if self.plan.attend in (AttendRope.native, AttendRope.dynamic) or self._exact_tok(method, queries.step is not None) >= EVERYTHING:
            rows = max(rows, n_keys + queries.size)
        return AttendRotation(self.plan.attend.value, self.tables.upto(rows), self.tables.trained_tok)


@lru_cache(maxsize=256)
def _shared_step(position: int, n_candidates: int, exact: bool, device: torch.device) -> Step:
    """A step that layers with the same numbers share, so that they cross over to the device once. Nobody writes into it."""
    return Step.at(position, n_candidates, exact, device)


def no_rope(device: torch.device) -> RopeTables:
    """The tables of a layer without RoPE, which turn no dimension."""
    return RopeTables(lambda positions: (torch.empty(len(positions), 0, device=device),) * 2, 0)
