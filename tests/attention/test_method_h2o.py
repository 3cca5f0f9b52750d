"""H2O against its rule: sums of attention, one query and one head at a time; decode evicts one key after the other."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hipexp.attention import LayerAttention, Memory
from hipexp.config.schema import AttendRope, Heads, LayerPlan
from watched import Watched, cases, expected

CLOSE = 1e-5  # rounding may turn a closer decision


class Cache:
    """Sums of attention of the keys of one head that are still there, by token."""

    def __init__(self, case, kv):
        self.case, self.kv, self.sums = case, kv, {}

    def attend(self, at):
        """The queries of token ``at`` see the keys that are there, and their own."""
        self.sums[at] = 0.0
        there = sorted(self.sums)
        for head in self.case.heads_of(self.kv):
            for i, share in zip(there, self.case.attention(head, self.kv, at, there), strict=True):
                self.sums[i] += share

    def far(self, at):
        return [i for i in self.sums if self.case.plan.sink_tok <= i <= at - self.case.plan.window_tok]

    def evict(self, at, keep_tok):
        while len(far := self.far(at)) > keep_tok:
            least, next_ = sorted(self.sums[i] for i in far)[:2]
            assume(next_ - least > CLOSE or len(far) > keep_tok + 1)
            del self.sums[min(far, key=self.sums.__getitem__)]


@given(cases("h2o", {"keep_tok": st.sampled_from([4, 16, 40])}, query_tok=17, windows=(1, 4, 16), most_steps=80, heads=Heads.per_kv))
@settings(max_examples=15)
def test_decode_keeps_the_heavy_hitters(case):
    """A prompt is read densely, in whatever parts."""
    one = Watched(case)
    out = one.run()
    keep_tok = case.plan.params["keep_tok"]
    caches = [Cache(case, kv) for kv in range(case.kv_heads)]
    for first, grid_end, end, decoding in one.blocks():
        lists = None
        for cache in caches:
            if decoding:
                cache.evict(first, keep_tok)
        if decoding and first >= case.plan.sink_tok + case.plan.window_tok + keep_tok:
            lists = [set(cache.far(first)) for cache in caches]
        for cache in caches:
            for at in range(first, end):
                cache.attend(at)
        if decoding:
            assert one.seen[first] == lists
        if end >= case.prompt_tok:  # the last block of the prompt, and decode
            np.testing.assert_allclose(out[:, first:end], expected(case, first, grid_end, end, lists), atol=1e-4)


def test_a_prompt_behind_evicted_keys_is_refused():
    layer = LayerAttention(LayerPlan(0, [], [], 0, 4, Heads.per_kv, AttendRope.native, [], method="h2o", params={"keep_tok": 4}), None, 1.0)
    x, state = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0)), layer.method.new_state()
    layer(x[:, :8], x[:, :8], x[:, :8], 0, state=state)
    layer(x[:, 8:10], x[:, :10], x[:, :10], 8, state=state)  # all are there still
    layer(x[:, 10:11], x[:, :11], x[:, :11], 10, Memory(), state=state)
    with pytest.raises(ValueError, match="h2o has let keys of this sequence go"):
        layer(x[:, 11:13], x[:, :13], x[:, :13], 11, state=state)
