"""The oracle against its definition: the mass of every token, one query and one head at a time; the best blocks of it."""

from collections import defaultdict

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hipexp.config.schema import PruneRope
from watched import Watched, cases, expected

CLOSE = 1e-5  # rounding may turn a closer decision
PARAMS = {"keep_tok": st.sampled_from([8, 16, 24]), "block_tok": st.sampled_from([1, 4, 8])}


def best_tokens(case, kv_heads, first, end):
    """Of a list that ``kv_heads`` share, for the queries ``first`` … ``end``."""
    plan, (keep_tok, block_tok) = case.plan, case.plan.params.values()
    distance = None if plan.prune is PruneRope.native else plan.window_tok
    mass = defaultdict(float)  # by block
    for at in range(first, end):
        for kv in kv_heads:
            for head in case.heads_of(kv):
                share = case.attention(head, kv, at, range(at + 1), distance)
                for i in range(plan.sink_tok, first - plan.window_tok + 1):
                    mass[(i - plan.sink_tok) // block_tok] += share[i]
    ranking, n = sorted(mass, key=lambda block: -mass[block]), keep_tok // block_tok
    assume(len(ranking) <= n or mass[ranking[n - 1]] - mass[ranking[n]] > CLOSE)
    begins = (plan.sink_tok + block * block_tok for block in ranking[:n])
    return {i for begin in begins for i in range(begin, begin + block_tok) if i <= first - plan.window_tok}


@given(cases("oracle", PARAMS, query_tok=64))
@settings(max_examples=20)
def test_it_selects_the_blocks_with_most_attention(case):
    one = Watched(case)
    out = one.run()
    budget = case.plan.sink_tok + case.plan.window_tok + case.plan.params["keep_tok"]
    for first, grid_end, end, _ in one.blocks():
        lists = None if grid_end <= budget else [best_tokens(case, kv_heads, first, end) for kv_heads in case.lists()]
        assert one.seen[first] == lists
        if end >= case.prompt_tok:  # the last block of the prompt, and decode
            np.testing.assert_allclose(out[:, first:end], expected(case, first, grid_end, end, lists), atol=1e-4)
