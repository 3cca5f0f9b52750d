"""The attention operations of InfiniteHiP, each as a readable reference and a fast implementation.

Shape letters: ``H`` query heads, ``K`` key/value heads, ``G = H/K``, ``N`` query blocks, ``R`` rows of a query block,
``T`` keys, ``D`` head dimension, ``C`` candidate chunks, ``M`` selected blocks, ``S`` lists (1 if all heads share one
list, ``K`` if every key/value head has its own). All operations work on one sequence.
"""

from hipexp_kernels.attend_blocks import Held, attend_blocks
from hipexp_kernels.gather_kv import gather_kv
from hipexp_kernels.keep_top import keep_top
from hipexp_kernels.merge_lse import merge_lse
from hipexp_kernels.score_chunks import score_chunks
from hipexp_kernels.summarize import Summaries, coarsen, summarize

__all__ = ["Held", "Summaries", "attend_blocks", "coarsen", "gather_kv", "keep_top", "merge_lse", "score_chunks", "summarize"]
