"""Sinks and window only (StreamingLLM, arXiv 2309.17453): the selection is always empty."""

from __future__ import annotations

from dataclasses import dataclass

from hipexp.attention.method import Call, SelectingMethod
from hipexp.attention.selection import Selection


@dataclass
class Streaming(SelectingMethod):
    """StreamingLLM; its parameters are the pipeline's ``sink_tok`` and ``window_tok``."""

    offloads = True
    captures = True
    linear = True
    reuses = True
    splits = True

    def keep(self, decoding: bool) -> int:
        return 0

    def scanned_rows(self, n_tok: int, heads: int, kv_heads: int) -> float:
        return 0

    def select(self, call: Call) -> Selection:
        return Selection.empty(len(call.queries), call.keys.device)
