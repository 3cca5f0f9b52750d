"""Which keys and values an attention layer reads, for those who listen: told in tokens, written down in units of a trace."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from hipexp_kernels.paged import KV, whole
from hipexp_kernels.rope import ScoreRotation, rotate
from hipexp_kernels.score_chunks.probes import probe_step
from torch import Tensor

from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.selection import Selection
from hipexp.cache.traces import ATTEND, REUSE, LayerUnits, Read, TraceWriter
from hipexp.config.schema import Heads, LayerPlan, Representative, Stage


@dataclass(frozen=True)
class Scoring:
    """What a stage scores, as ``score_chunks`` is told: the chunks at ``starts`` for ``queries``, pooled to ``q`` ``[H, N, R, D]``."""

    stage: Stage
    queries: QueryBlocks
    q: Tensor
    keys: KV
    starts: Tensor
    counts: Tensor
    limits: Tensor
    rotation: ScoreRotation | None


class Listener(Protocol):
    """Is told what a layer does, and changes nothing."""

    def scores(self, number: int, scoring: Scoring) -> None:
        """Stage ``number`` scores its candidates."""

    def attends(self, queries: QueryBlocks, n_exact: int, selection: Selection) -> None:
        """Blocks of ``queries`` attend to what is selected; the first ``n_exact`` of them to everything."""


def unit_tok_of(plan: LayerPlan) -> int:
    """Tokens of a unit: those of the last chunk, of the smaller one if decode has other stages than prefill; 1 without stages."""
    return min((stages[-1].chunk_tok for stages in (plan.stages, plan.decode) if stages), default=1)


def units_of(plan: LayerPlan, n_kv_heads: int, key_bytes: int) -> LayerUnits:
    """How a layer with stages is cut; ``key_bytes``: of the key of a token in one head."""
    unit_tok = unit_tok_of(plan)
    lists = n_kv_heads if plan.heads is Heads.per_kv else 1
    return LayerUnits(unit_tok, lists, unit_tok * key_bytes * n_kv_heads // lists)


@dataclass
class ReadRecorder:
    """A listener that writes what one layer reads into a trace; other phases than ``phases`` are left out."""

    writer: TraceWriter
    plan: LayerPlan
    units: LayerUnits
    phases: Collection[str]
    _scored: bool = False  # since the layer attended last

    def scores(self, number: int, scoring: Scoring) -> None:
        self._scored, phase = True, _phase(scoring.queries)
        if phase in self.phases:
            for n, first in enumerate(scoring.queries.first.tolist()):
                self._write(phase, first, str(number), probed_tokens(scoring, n))

    def attends(self, queries: QueryBlocks, n_exact: int, selection: Selection) -> None:
        phase = _phase(queries)
        by = REUSE if phase == "decode" and not self._scored else ATTEND
        self._scored = False
        if phase not in self.phases:
            return
        device = selection.blocks.device
        inside = torch.arange(0, (self.plan.stages if phase == "prefill" else self.plan.decode)[-1].chunk_tok, self.units.unit_tok)
        for n, first in enumerate(queries.first.tolist()):
            if n < n_exact:
                everything = torch.arange(first + 1, device=device)[None]
                self._write(phase, first, ATTEND, everything)
            else:
                tokens = selection.blocks[:, n, :, None] + inside.to(device)
                missing = torch.arange(tokens.shape[1], device=device) >= selection.counts[:, n, None]
                self._write(phase, first, by, tokens.masked_fill(missing[..., None], -1).flatten(1))

    def _write(self, phase: str, first: int, by: str, tokens: Tensor) -> None:
        """``tokens`` ``[K or 1, P]``: those read by each head, or by all; sinks, window and what is below 0 are not told."""
        window_begin, lists = max(0, first - self.plan.window_tok + 1), self.units.lists
        rows = [tokens.flatten()] if lists == 1 else tokens.expand(lists, -1)
        far = (row[(row >= max(0, self.plan.sink_tok)) & (row < window_begin)] for row in rows)
        listed = tuple(torch.unique(row // self.units.unit_tok).tolist() for row in far)
        self.writer.write(Read(phase, first, self.plan.layer, by, listed))


def probed_tokens(scoring: Scoring, n: int) -> Tensor:
    """Tokens ``[K or 1, P]`` whose keys are read to score the candidates of block ``n``, by every key/value head or all alike.

    With repetitions, -1 where there is none. A descent is done again, in fp32: where a kernel rounds otherwise it may have gone another way
    from a near tie.
    """
    stage, shared = scoring.stage, scoring.starts.shape[1] == 1
    start, limit = scoring.starts[:, 0 if shared else n], min(int(scoring.limits[n]), scoring.keys.shape[1])
    size = (limit - start).clamp(max=stage.chunk_tok)
    rank = torch.arange(start.shape[1], device=start.device)
    present = (rank < scoring.counts[:, n, None]) & (size > 0)
    if stage.representative is Representative.bounds:  # landmarks are no keys
        return start.new_empty(1, 0)
    if stage.representative is Representative.descent:
        start, size = start.clamp(min=0, max=max(0, limit - 1)), size.clamp(min=1)
        tokens = _descents(scoring, n, start, size, rank)
        return tokens.masked_fill(~present[:, None, :, None], -1).flatten(1)
    step = probe_step(stage.representative.value, stage.chunk_tok)
    probes = torch.arange(step // 2, stage.chunk_tok, step, device=start.device)
    tokens = start[..., None] + torch.minimum(probes, size[..., None] - 1)
    return tokens.masked_fill(~present[..., None], -1).flatten(1)


def _descents(scoring: Scoring, n: int, start: Tensor, size: Tensor, rank: Tensor) -> Tensor:
    """Tokens ``[K, G, C, P]`` on the way of every head of a group down the chunks at ``start`` ``[S, C]``."""
    keys, block, rotation = whole(scoring.keys), slice(n, n + 1), scoring.rotation
    q, K = scoring.q[:, block], len(keys)
    left = right = q.float()
    if rotation:
        rotation = replace(rotation, position=rotation.position[block], first=rotation.first[block], last=rotation.last[block])
        left, right = rotation.queries(q, scoring.counts[:, block])
    low, size = (x.expand(K, -1)[:, None].expand(-1, len(q) // K, -1) for x in (start, size))
    heads = torch.arange(K, device=keys.device)[:, None, None]

    def best(token: Tensor, queries: Tensor) -> Tensor:
        probed = keys[heads, token].float()
        if rotation and rotation.turns_keys:
            at = rotation.keys(token, rank)
            probed = rotate(probed, rotation.table.cos[at], rotation.table.sin[at])
        return torch.einsum("kgcd,kgrd->kgcr", probed, queries[:, 0].unflatten(0, (K, -1))).amax(-1)

    seen = [low] if scoring.stage.chunk_tok == 1 else []
    for _ in range(scoring.stage.chunk_tok.bit_length() - 1):
        half = size // 2
        at_left, at_right = low + half // 2, low + half + (size - half) // 2
        go_left = best(at_left, left) > best(at_right, right)
        seen += [at_left, at_right]
        low, size = torch.where(go_left, low, low + half), torch.where(go_left & (half > 0), half, size - half)
    return torch.stack(seen, -1)


def _phase(queries: QueryBlocks) -> str:
    return "decode" if queries.step else "prefill"
