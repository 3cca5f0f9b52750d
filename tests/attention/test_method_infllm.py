"""InfLLM against its rule: representatives of a block and its relevance, logit by logit."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from watched import PLANS, Layer, best, plan, texts, turned

CLOSE = 1e-3  # of sums of many logits: rounding may turn a closer decision
PLAN = st.builds(
    plan, st.just("infllm"), block_tok=st.sampled_from([4, 8, 16]), keep_blocks=st.integers(1, 3), representatives=st.integers(1, 4),
    query_tok=st.sampled_from([8, 16, 32]), **PLANS | {"window_tok": st.sampled_from([8, 16, 24])},
)  # fmt: skip


class Rule:
    def __init__(self, plan, text):
        self.plan, self.known = plan, {}
        self.block_tok, self.keep_blocks, self.n, _ = plan.params.values()
        q, k, at = text.q.reshape(len(text.k), -1, *text.q.shape[1:]), text.k, np.arange(text.q.shape[1])
        self.q, self.k = (turned(x, at, text.rotary) for x in (q, k))
        self.far_q, self.far_k = turned(q, plan.window_tok, text.rotary), turned(k, 0, text.rotary)  # one window apart

    def liking(self, kv, token):
        """Of a key by the queries of the local window behind it, of all heads that share it: at true positions."""
        return (self.q[kv, :, token + 1 : token + self.plan.window_tok] @ self.k[kv, token]).sum()

    def representatives(self, kv, block):
        if (kv, block) not in self.known:
            self.known[kv, block] = best({token: self.liking(kv, token) for token in block}, self.n, CLOSE)
        return self.known[kv, block]

    def relevance(self, kv_heads, block, first, end):
        """Of a block to the queries ``first`` … ``end``, from all of which it counts as one window away."""
        pairs = ((kv, token) for kv in kv_heads for token in self.representatives(kv, block))
        return sum((self.far_q[kv, :, first:end] @ self.far_k[kv, token]).sum() for kv, token in pairs)

    def tokens(self, kv_heads, first, end):
        """What has left the window is cut into blocks; the most relevant are taken, and what fills no block yet."""
        left = range(self.plan.sink_tok, max(self.plan.sink_tok, first - self.plan.window_tok + 1))
        blocks = [left[i : i + self.block_tok] for i in range(0, len(left), self.block_tok)]
        rest = set(blocks.pop()) if len(left) % self.block_tok else set()
        chosen = best({block: self.relevance(kv_heads, block, first, end) for block in blocks}, self.keep_blocks, CLOSE)
        return rest.union(*chosen)


@given(data=st.data(), plan=PLAN, softcap=st.sampled_from([None, 1.0]))
@settings(max_examples=30)
def test_it_looks_blocks_up_by_their_representatives(data, plan, softcap):
    text = data.draw(texts(90, 160, grain=plan.params["query_tok"]))
    one, rule = Layer(plan, text, softcap).read_all(), Rule(plan, text)
    budget = plan.sink_tok + plan.window_tok + (rule.keep_blocks + 1) * rule.block_tok
    for first, grid_end, end, _ in one.blocks():
        lists = None if grid_end <= budget else [rule.tokens(kv_heads, first, end) for kv_heads in one.lists()]
        assert one.seen[first] == lists
    one.check_outputs()
