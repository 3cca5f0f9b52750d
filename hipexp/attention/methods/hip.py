"""Modular hierarchical pruning (InfiniteHiP, arXiv 2502.08910, algorithms 1 to 3).

All tokens between the sinks and the window are candidates. Every stage cuts the candidates into chunks, scores each chunk
against a block of queries by a few of its keys, and keeps the best chunks; the next stage cuts the survivors finer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hipexp_kernels import keep_top, score_chunks
from hipexp_kernels.paged import read_by
from hipexp_kernels.score_chunks.probes import probe_step
from torch import Tensor

from hipexp.attention.across import best_of_heads
from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.method import Call, SelectingMethod
from hipexp.attention.reads import Scoring
from hipexp.attention.refresh import Candidates
from hipexp.attention.rope import score_rotation
from hipexp.attention.selection import Selection
from hipexp.cache.summaries import PIECE_TOK, KeySummaries
from hipexp.cache.traffic import SUMMARIZE
from hipexp.config.schema import Heads, LayerPlan, Representative, Stage


@dataclass
class Hip(SelectingMethod):
    """InfiniteHiP; its parameters are the pipeline's ``stages`` and ``decode``, ``heads``, ``rope`` and ``late_refresh``."""

    offloads = True
    captures = True
    linear = True
    budgets = ("stages",)
    reuses = True
    splits = True

    @property
    def query_block_tok(self) -> int:
        return self.plan.stages[0].query_block_tok

    @property
    def attended_block_tok(self) -> int:
        return self.plan.stages[-1].query_block_tok

    def block(self, decoding: bool) -> int:
        return self._stages(decoding)[-1].chunk_tok

    def keep(self, decoding: bool) -> int:
        return self._stages(decoding)[-1].keep_tok

    def new_state(self) -> KeySummaries:
        return KeySummaries()

    def n_candidates(self, position: int) -> int:
        plan, first = self.plan, self.plan.decode[0].chunk_tok
        return n_first_candidates(position, plan.sink_tok, plan.window_tok - first, first)

    def _stages(self, decoding: bool) -> list[Stage]:
        return self.plan.decode if decoding else self.plan.stages

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        total, candidates = 0.0, max(0, n_tok - self.plan.sink_tok - self.plan.window_tok)
        for stage in self.plan.decode:
            rows = candidates // stage.chunk_tok * self._probes(stage)
            total += rows * (heads if stage.representative is Representative.descent else kv_heads) / stage.refresh_steps
            candidates = min(candidates, stage.keep_tok)
        return total

    def _probes(self, stage: Stage) -> int:
        """Rows that are read to score a chunk; every query head walks a descent of its own."""
        if stage.representative is Representative.descent:
            return max(1, 2 * (stage.chunk_tok.bit_length() - 1))
        if stage.representative is Representative.bounds:
            return 2 * stage.chunk_tok // piece_tok(self.plan, stage)
        return stage.chunk_tok // probe_step(stage.representative.value, stage.chunk_tok)

    def select(self, call: Call) -> Selection:
        """Select blocks of the last stage's ``chunk_tok`` tokens.

        With a memory, stages that are not due are skipped; without one every stage runs. Landmarks of the keys so far are kept up in the
        call's state for a stage that scores by them; without state that stage summarizes all keys anew.
        """
        plan, stages, queries, memory = self.plan, self._stages(call.decoding), call.queries, call.memory
        if memory:
            memory.catch_up(len(stages))
        due = memory.first_stage_due(stages, plan.shift_steps) if memory else 0
        if memory and due == len(stages):
            return Selection(*memory.lists[due])
        scan_window_tok = max(0, plan.window_tok - stages[0].chunk_tok)
        lists = call.keys.shape[0] if plan.heads is Heads.per_kv else 1
        if memory and due:
            starts, counts = memory.lists[due]
        else:
            starts, counts = first_candidates(queries, plan.sink_tok, scan_window_tok, stages[0].chunk_tok)
        limits, stride_tok = queries.first, 0
        late = memory is not None and plan.late_refresh and len(stages) in memory.lists
        for i in range(due, len(stages)):
            stage = stages[i]
            if stage.query_block_tok < queries.size:
                parts, queries, stride_tok = queries.size // stage.query_block_tok, queries.split(stage.query_block_tok), 0
                starts, counts, limits = (_repeat(x, parts, dim, len(queries)) for x, dim in ((starts, 1), (counts, 1), (limits, 0)))
            of_keys = None
            if stage.representative is Representative.bounds:
                of_keys = (call.state or KeySummaries()).upto(
                    read_by(call.keys, SUMMARIZE), plan.sink_tok, least_piece_tok(plan), piece_tok(plan, stage)
                )
                of_keys = of_keys if i else replace(of_keys, first_tok=None)  # the first candidates follow each other
            if stage.query_stride_tok != stride_tok:
                stride_tok = stage.query_stride_tok
                q, position = queries.pool(stride_tok if queries.size > 1 else 1)
            assert stage.rope is not None, "LayerPlan resolves it"
            rotation = score_rotation(stage.rope, call.tables, position, starts.shape[2], queries, scan_window_tok)
            if call.listener:
                call.listener.scores(i, Scoring(stage, queries, q, call.keys, starts, counts, limits, rotation))
            scores = score_chunks(
                q, read_by(call.keys, str(i)), starts, counts, limits,
                chunk_tok=stage.chunk_tok, representative=stage.representative.value, rotation=rotation, summaries=of_keys,
            )  # fmt: skip
            if plan.heads is Heads.shared:
                scores = best_of_heads(scores, call.processes)
            final = i + 1 == len(stages)
            too_late = late and final
            starts, counts = keep_top(
                scores, starts, counts, limits, keep=stage.keep_tok // stage.chunk_tok, lists=lists,
                chunk_tok=stage.chunk_tok, next_tok=stages[i if final else i + 1].chunk_tok,
                out=memory.lists.get(i + 1) if memory and not too_late else None,
            )  # fmt: skip
            if memory and not too_late:
                memory.remember(i + 1, (starts, counts), final)
        if memory and late:
            memory.late = starts, counts
            return Selection(*memory.lists[len(stages)])
        return Selection(starts, counts)


def piece_tok(plan: LayerPlan, stage: Stage) -> int:
    """Tokens of a piece by whose landmarks a stage scores; where it says none, a divisor of all chunks that are scored so."""
    return stage.piece_tok or min(PIECE_TOK, *(other.chunk_tok for other in _scored_by_landmarks(plan)))


def least_piece_tok(plan: LayerPlan) -> int:
    """Tokens of the pieces whose landmarks are made from keys: the smallest of all stages, in prefill and decode."""
    return min(piece_tok(plan, stage) for stage in _scored_by_landmarks(plan))


def _scored_by_landmarks(plan: LayerPlan) -> list[Stage]:
    return [stage for stage in (*plan.stages, *plan.decode) if stage.representative is Representative.bounds]


def first_candidates(queries: QueryBlocks, sink_tok: int, scan_window_tok: int, chunk_tok: int) -> Candidates:
    """Starts ``[1, 1, C]`` of the chunks between sinks and scan window, shared by all blocks, and how many each block has ``[1, N]``."""
    last = queries.start + (len(queries) - 1) * queries.size
    starts = _grid(sink_tok, chunk_tok, queries.q.device, n_first_candidates(last, sink_tok, scan_window_tok, chunk_tok))
    if queries.step:
        return starts, queries.step.n_candidates
    return starts, n_first_candidates(queries.first, sink_tok, scan_window_tok, chunk_tok)[None]


def n_first_candidates(first: Any, sink_tok: int, scan_window_tok: int, chunk_tok: int) -> Any:
    """How many chunks lie between the sinks and the scan window of a block that begins at position ``first`` (int, or ints ``[N]``).

    A chunk takes part if it starts no later than ``scan_window_tok`` before the block, and before it. The scan window is one chunk
    shorter than the attention window, so that tokens which leave the window while a selection is reused had a chance to be in it.
    """
    reach = first - sink_tok - max(scan_window_tok, 1)
    if isinstance(reach, int):
        return max(0, reach // chunk_tok + 1)
    return (torch.div(reach, chunk_tok, rounding_mode="floor") + 1).clamp(min=0)


def _grid(sink_tok: int, chunk_tok: int, device: torch.device, n_chunks: int) -> Tensor:
    """Starts ``[1, 1, n_chunks]`` of the first chunks: a view of a list that is made once, and again when it is outgrown.

    Lists are never given up: a CUDA graph may still read them.
    """
    return _grid_of(sink_tok, chunk_tok, device, max(1024, 1 << (n_chunks - 1).bit_length()))[:, :, :n_chunks]


@cache
def _grid_of(sink_tok: int, chunk_tok: int, device: torch.device, n_chunks: int) -> Tensor:
    with torch.inference_mode(False):
        return (sink_tok + chunk_tok * torch.arange(n_chunks, device=device))[None, None]


def _repeat(x: Tensor, times: int, dim: int, length: int) -> Tensor:
    """Every entry ``times`` times, ``length`` in all; a list that all blocks share stays one."""
    return x if x.shape[dim] == 1 and dim == 1 and x.ndim == 3 else x.repeat_interleave(times, dim).narrow(dim, 0, length)
