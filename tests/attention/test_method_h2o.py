"""H2O against its rule: sums of attention, one query and one head at a time; decode evicts one key after the other."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hipexp.attention import LayerAttention, Memory
from hipexp.config.schema import AttendRope, Heads, LayerPlan
from watched import CLOSE, PLANS, SCALE, Layer, plan, softmax, texts, turned


class Cache:
    """Sums of attention of the keys of one head that are still there, by token."""

    def __init__(self, plan, queries, keys, softcap):
        """``queries`` ``[G, T, D]`` of the heads that share ``keys`` ``[T, D]``, rotated."""
        self.plan, self.queries, self.keys, self.softcap, self.sums = plan, queries, keys, softcap, {}

    def attend(self, at):
        """The queries of token ``at`` see the keys that are there, and their own."""
        self.sums[at] = 0.0
        there = sorted(self.sums)
        shares = softmax(self.queries[:, at] @ self.keys[there].T * SCALE, self.softcap).sum(0)
        for i, share in zip(there, shares.tolist(), strict=True):
            self.sums[i] += share

    def far(self, at):
        return [i for i in self.sums if self.plan.sink_tok <= i <= at - self.plan.window_tok]

    def evict(self, at, keep_tok):
        while len(far := self.far(at)) > keep_tok:
            least, next_ = sorted(self.sums[i] for i in far)[:2]
            assume(next_ - least > CLOSE or len(far) > keep_tok + 1)
            del self.sums[min(far, key=self.sums.__getitem__)]


PLAN = st.builds(
    plan, st.just("h2o"), keep_tok=st.sampled_from([4, 16, 40]),
    **PLANS | {"window_tok": st.sampled_from([1, 4, 16]), "heads": st.just(Heads.per_kv)},
)  # fmt: skip


@given(plan=PLAN, text=texts(90, 160, steps=80), softcap=st.sampled_from([None, 1.0]))
@settings(max_examples=20)
def test_decode_keeps_the_heavy_hitters(plan, text, softcap):
    """A prompt is read densely, in whatever parts."""
    one, keep_tok = Layer(plan, text, softcap).read_all(), plan.params["keep_tok"]
    q, k = (turned(x, np.arange(x.shape[1]), text.rotary) for x in (text.q, text.k))
    caches = [Cache(plan, queries, keys, softcap) for queries, keys in zip(q.reshape(len(k), -1, *q.shape[1:]), k, strict=True)]
    for first, _, end, decoding in one.blocks():
        lists = None
        if decoding:
            for cache in caches:
                cache.evict(first, keep_tok)
            if first >= plan.sink_tok + plan.window_tok + keep_tok:
                lists = [set(cache.far(first)) for cache in caches]
        for cache in caches:
            for at in range(first, end):
                cache.attend(at)
        assert one.seen[first] == lists
    one.check_outputs()


def test_a_prompt_behind_evicted_keys_is_refused():
    layer = LayerAttention(LayerPlan(0, [], [], 0, 4, Heads.per_kv, AttendRope.native, [], method="h2o", params={"keep_tok": 4}), None, 1.0)
    x, state = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0)), layer.method.new_state()
    layer(x[:, :8], x[:, :8], x[:, :8], 0, state=state)
    layer(x[:, 8:10], x[:, :10], x[:, :10], 8, state=state)  # all are there still
    layer(x[:, 10:11], x[:, :11], x[:, :11], 10, Memory(), state=state)
    with pytest.raises(ValueError, match="h2o has let keys of this sequence go"):
        layer(x[:, 11:13], x[:, :13], x[:, :13], 11, state=state)
