"""Sinks and window only (StreamingLLM, arXiv 2309.17453): the selection is always empty."""

from __future__ import annotations

from hipexp_kernels.paged import KV

from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.reads import Listener
from hipexp.attention.refresh import Memory
from hipexp.attention.rope import RopeTables
from hipexp.attention.selection import Selection
from hipexp.cache.summaries import KeySummaries
from hipexp.config.schema import LayerPlan, Stage


def select(
    plan: LayerPlan,
    stages: list[Stage],
    queries: QueryBlocks,
    keys: KV,
    tables: RopeTables,
    memory: Memory | None,
    summaries: KeySummaries | None = None,
    listener: Listener | None = None,
) -> Selection:
    """Select nothing for every block of ``queries``."""
    return Selection.empty(queries.q.shape[1], keys.device)
