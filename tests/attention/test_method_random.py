"""The lower bound: as many blocks as its budget holds, each as probable as any other, whatever the keys are."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.method import Call
from hipexp.attention.methods import make_method
from hipexp.config.schema import AttendRope, Heads, LayerPlan
from watched import PLANS, Layer, plan, texts

PLAN = st.builds(
    plan,
    st.just("random"),
    keep_tok=st.sampled_from([8, 16, 24]),
    block_tok=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 2**60),
    **PLANS,
)


@given(plan=PLAN, text=texts(90, 160, grain=64))
@settings(max_examples=15)
def test_it_fills_its_budget_with_blocks(plan, text):
    one = Layer(plan, text).read_all()
    keep_tok, block_tok, _ = plan.params.values()
    for first, grid_end, _, _ in one.blocks():
        lists = one.seen[first]
        if grid_end <= plan.sink_tok + plan.window_tok + keep_tok:
            assert lists is None
            continue
        far = range(plan.sink_tok, max(plan.sink_tok, first - plan.window_tok + 1))
        blocks = [set(far[i : i + block_tok]) for i in range(0, len(far), block_tok)]
        held = [block for block in blocks if block <= lists[0]]
        assert len(lists) == 1 and lists[0] == set().union(*held) and len(held) == min(len(blocks), keep_tok // block_tok)
    one.check_outputs()


@given(plan=PLAN, text=texts(90, 160, grain=64))
@settings(max_examples=10)
def test_the_draw_depends_on_neither_keys_nor_parts(plan, text):
    parts = [(begin, min(begin + 64, text.prompt)) for begin in range(0, text.prompt, 64)]
    other = replace(text, q=np.roll(text.q, 7, 1), k=np.roll(text.k, 7, 1), parts=parts)
    assert Layer(plan, text).read_all().seen == Layer(plan, other).read_all().seen


def draw(first=128, **changes):
    """Starts of the blocks drawn for the block of queries at ``first``: 4 of 28 if it is 128."""
    plan = LayerPlan(changes.pop("layer", 0), [], [], 8, 12, Heads.shared, AttendRope.streaming, [], method="random")
    method = make_method(replace(plan, params={"keep_tok": 16, "block_tok": 4, **changes}))
    selection = method.select(Call(QueryBlocks.cut(torch.zeros(1, 1, 2), first, 64), torch.zeros(1, first + 1, 2), None, 1.0))
    return tuple(selection.blocks[0, 0, : selection.counts[0, 0]].tolist())


def test_every_block_is_drawn_as_often():
    draws = [draw(seed=seed, layer=layer) for seed in range(100) for layer in range(4)]
    times, share = Counter(start for blocks in draws for start in blocks), 4 / 28
    assert sorted(times) == list(range(8, 120, 4))
    assert all(abs(n - 400 * share) < 4 * (400 * share * (1 - share)) ** 0.5 for n in times.values())


def test_seeds_layers_and_positions_draw_for_themselves():
    apart = [draw(first=4096, seed=seed, layer=layer) for seed in (0, 1, 2**40) for layer in range(3)]
    assert len(set(apart)) == len(apart)
    following = [draw(first) for first in range(9216, 9216 + 8 * 64, 64)]
    assert len(set(following)) == len(following)
