"""Stages -> selection -> output: what one attention layer does under a pipeline, for one sequence."""

from hipexp.attention.layer import LayerAttention
from hipexp.attention.refresh import Memory
from hipexp.attention.selection import Selection

__all__ = ["LayerAttention", "Memory", "Selection"]
