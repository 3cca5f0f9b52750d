"""One attention layer of one sequence under a pipeline: select, then attend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from hipexp_kernels import attend_blocks
from hipexp_kernels.paged import KV, read_by
from hipexp_kernels.rope import AttendRotation
from torch import Tensor

from hipexp.attention.blocks import QueryBlocks, Step
from hipexp.attention.methods import METHODS
from hipexp.attention.methods.hip import n_first_candidates
from hipexp.attention.reads import Listener
from hipexp.attention.refresh import Memory
from hipexp.attention.rope import RopeTables
from hipexp.attention.selection import Selection
from hipexp.cache.summaries import KeySummaries
from hipexp.cache.traces import ATTEND
from hipexp.config.schema import AttendRope, LayerPlan, Stage

QUERY_BLOCK_TOK = 64  # of pipelines without stages


@dataclass
class LayerAttention:
    """The attention of one layer.

    ``tables`` None: the layer has no RoPE. ``softcap``: as in Gemma-2.
    ``pruned_blocks`` counts the query blocks that did not see all their keys. ``listener`` is told what is read; None costs nothing.
    """

    plan: LayerPlan
    method: str
    tables: RopeTables | None
    scale: float
    softcap: float | None = None
    pruned_blocks: int = 0
    listener: Listener | None = None

    def __call__(
        self,
        q: Tensor,
        k: KV,
        v: KV,
        begin: int,
        memory: Memory | None = None,
        step: Step | None = None,
        summaries: KeySummaries | None = None,
    ) -> Tensor:
        """Return ``[H, Q, D]``: queries ``q`` ``[H, Q, D]`` at positions ``begin`` … over raw keys and values ``[K, T, D]``.

        With ``memory`` (decode) ``Q`` must be 1 and the layer's decode stages and refresh schedule apply. ``step``: its position as
        the device reads it, in place of ``begin`` (see :meth:`step_at`): in a CUDA graph that is replayed for later tokens ``begin`` is
        the last position it will serve, and ``k`` and ``v`` reach as far; call it once so before it is captured. ``summaries``: the
        sequence's own, for pipelines that score by them. Raises ValueError if
        ``Q`` is not 1 there, and for a later part of a prompt that does not start where a query block does.
        """
        if memory and q.shape[1] != 1:
            raise ValueError(f"a decode step has one query, not {q.shape[1]}")
        stages = self.plan.decode if memory else self.plan.stages
        size = 1 if memory else stages[0].query_block_tok if stages else QUERY_BLOCK_TOK
        block_tok = stages[-1].chunk_tok if stages else 1
        if stages and begin % size:
            raise ValueError(
                f"a part of a prompt begins at token {begin} (left padding not counted), inside a query block; cut prompts, and pad rows, "
                f"by multiples of {size} tokens, or use hipexp.hf.generate"
            )
        queries = (
            QueryBlocks.one(q, begin, step or _shared_step(*self._numbers(begin), q.device)) if memory else QueryBlocks.cut(q, begin, size)
        )
        attended = queries if memory or not stages else queries.split(stages[-1].query_block_tok)
        n_exact = 0 if step else attended.within(self._exact_tok(stages))  # the device knows, and a selection it does not need costs little
        selection = self._select(queries, attended, n_exact, k, memory, summaries)
        if self.listener:
            self.listener.attends(attended, n_exact, selection)
        if memory:
            memory.step += 1
        out, _ = attend_blocks(
            attended.q, read_by(k, ATTEND), read_by(v, ATTEND), selection.blocks, selection.counts, attended.first,
            queries.step.exact if queries.step else torch.arange(len(attended), device=k.device) < n_exact,
            block_tok=block_tok, sink_tok=self.plan.sink_tok, window_tok=self.plan.window_tok, scale=self.scale,
            rotation=self._attend_rotation(k.shape[1], queries), softcap=self.softcap,
            held=memory.held if memory else None,
        )  # fmt: skip
        return attended.rows(out)

    def step_at(self, position: int, device: torch.device) -> Step:
        """The decode step of the token at ``position``, for layers whose plans have the same sinks, window and first decode stage."""
        return Step.at(*self._numbers(position), device)

    def _numbers(self, position: int) -> tuple[int, int, bool]:
        """Position, number of first candidates, and whether everything is attended to, of a decode step."""
        stages, plan = self.plan.decode, self.plan
        n_candidates = (
            n_first_candidates(position, plan.sink_tok, plan.window_tok - stages[0].chunk_tok, stages[0].chunk_tok) if stages else 0
        )
        return position, n_candidates, position < self._exact_tok(stages)

    def _exact_tok(self, stages: list[Stage]) -> int:
        """A block that ends before this position attends to all its keys: sinks, window and final budget hold them."""
        return self.plan.sink_tok + self.plan.window_tok + (stages[-1].keep_tok if stages else 0)

    def _select(
        self,
        queries: QueryBlocks,
        attended: QueryBlocks,
        n_exact: int,
        k: KV,
        memory: Memory | None,
        summaries: KeySummaries | None,
    ) -> Selection:
        """The selection for every attended block; the first ``n_exact`` of them see everything and have none."""
        stages = self.plan.decode if memory else self.plan.stages
        self.pruned_blocks += len(attended) - n_exact
        if n_exact == len(attended):
            return Selection.empty(n_exact, k.device)
        parts = queries.size // attended.size
        skipped = n_exact // parts
        select = METHODS[self.method]
        tables = self.tables or RopeTables(no_rope, 0)
        chosen = select(self.plan, stages, queries.from_block(skipped), k, tables, memory, summaries, self.listener)
        return chosen.after_none(skipped * parts)

    def _attend_rotation(self, n_keys: int, queries: QueryBlocks) -> AttendRotation | None:
        if self.tables is None:
            return None
        kept = max((stages[-1].keep_tok for stages in (self.plan.stages, self.plan.decode) if stages), default=0)
        rows = min(self.plan.sink_tok + self.plan.window_tok + kept, n_keys) + 2 * queries.size
        if self.plan.attend in (AttendRope.native, AttendRope.dynamic):
            rows = max(rows, n_keys + queries.size)
        return AttendRotation(self.plan.attend.value, self.tables.upto(rows), self.tables.trained_tok)


@lru_cache(maxsize=256)
def _shared_step(position: int, n_candidates: int, exact: bool, device: torch.device) -> Step:
    """A step that layers with the same numbers share, so that they cross over to the device once. Nobody writes into it."""
    return Step.at(position, n_candidates, exact, device)


def no_rope(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for the angles of a layer without RoPE."""
    raise AssertionError("a layer without RoPE has strategy none and asks for no table")
