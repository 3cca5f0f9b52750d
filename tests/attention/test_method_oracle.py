"""The oracle against its definition: the mass of every token, one query and one head at a time; the best blocks of it."""

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import PruneRope
from watched import PLANS, SCALE, Layer, best, plan, softmax, texts, turned

PLAN = st.builds(plan, st.just("oracle"), keep_tok=st.sampled_from([8, 16, 24]), block_tok=st.sampled_from([1, 4, 8]), **PLANS)


CAPS = st.sampled_from([None, 1.0])  # of logits


def shares(plan, text, head, at, softcap):
    """What the query of token ``at`` gives each token up to it: by true positions, or as if all of them lay a window before it."""
    tokens = np.arange(at + 1)
    query_at, keys_at = (at, tokens) if plan.prune is PruneRope.native else (plan.window_tok, 0 * tokens)
    keys = turned(text.k[head // text.group, tokens], keys_at, text.rotary)
    return softmax(keys @ turned(text.q[head, at], query_at, text.rotary) * SCALE, softcap)


def best_tokens(plan, text, kv_heads, first, end, softcap):
    """Of a list that ``kv_heads`` share, for the queries ``first`` … ``end``."""
    keep_tok, block_tok = plan.params.values()
    mass = defaultdict(float)  # by block
    for at in range(first, end):
        for head in (kv * text.group + i for kv in kv_heads for i in range(text.group)):
            share = shares(plan, text, head, at, softcap)
            for i in range(plan.sink_tok, first - plan.window_tok + 1):
                mass[(i - plan.sink_tok) // block_tok] += share[i]
    begins = (plan.sink_tok + block * block_tok for block in best(mass, keep_tok // block_tok))
    return {i for begin in begins for i in range(begin, begin + block_tok) if i <= first - plan.window_tok}


@given(plan=PLAN, text=texts(90, 160, grain=64), softcap=CAPS)
@settings(max_examples=20)
def test_it_selects_the_blocks_with_most_attention(plan, text, softcap):
    one = Layer(plan, text, softcap).read_all()
    budget = plan.sink_tok + plan.window_tok + plan.params["keep_tok"]
    for first, grid_end, end, _ in one.blocks():
        lists = None if grid_end <= budget else [best_tokens(plan, text, kv_heads, first, end, softcap) for kv_heads in one.lists()]
        assert one.seen[first] == lists
    one.check_outputs()
