"""InfLLM against its rule: representatives of a block and its relevance, logit by logit."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from watched import Watched, cases, expected

CLOSE = 1e-3  # of sums of many logits: rounding may turn a closer decision
PARAMS = {
    "block_tok": st.sampled_from([4, 8, 16]), "keep_blocks": st.integers(1, 3), "representatives": st.integers(1, 4),
    "query_tok": st.sampled_from([8, 16, 32]),
}  # fmt: skip


def best(scores, n):
    """The ``n`` best of ``scores``, numbers by name."""
    ranking = sorted(scores, key=lambda name: -scores[name])
    assume(len(ranking) <= n or scores[ranking[n - 1]] - scores[ranking[n]] > CLOSE)
    return ranking[:n]


class Rule:
    def __init__(self, case):
        self.case, self.likings, self.known = case, {}, {}
        self.block_tok, self.keep_blocks, self.n, _ = case.plan.params.values()

    def liking(self, kv, token):
        """Of a key by the queries of the local window behind it, of all heads that share it: at true positions."""
        at = np.arange(token + 1, token + self.case.plan.window_tok)
        return sum((self.case.query(head, at, at) @ self.case.key(kv, token, token)).sum() for head in self.case.heads_of(kv))

    def representatives(self, kv, block):
        if (kv, block) not in self.known:
            self.known[kv, block] = best({token: self.liking(kv, token) for token in block}, self.n)
        return self.known[kv, block]

    def relevance(self, kv_heads, block, first, end):
        """Of a block to the queries ``first`` … ``end``, from all of which it counts as one window away."""
        total, at = 0.0, np.arange(first, end)
        for kv in kv_heads:
            for token in self.representatives(kv, block):
                for head in self.case.heads_of(kv):
                    total += (self.case.query(head, at, self.case.plan.window_tok) @ self.case.key(kv, token, 0)).sum()
        return total

    def tokens(self, kv_heads, first, end):
        """What has left the window is cut into blocks; the most relevant are taken, and what fills no block yet."""
        left = range(self.case.plan.sink_tok, max(self.case.plan.sink_tok, first - self.case.plan.window_tok + 1))
        blocks = [left[i : i + self.block_tok] for i in range(0, len(left), self.block_tok)]
        rest = set(blocks.pop()) if len(left) % self.block_tok else set()
        chosen = best({block: self.relevance(kv_heads, block, first, end) for block in blocks}, self.keep_blocks)
        return rest.union(*chosen)


@given(cases("infllm", PARAMS, query_tok="query_tok", windows=(8, 16, 24)))
@settings(max_examples=20)
def test_it_looks_blocks_up_by_their_representatives(case):
    one, rule = Watched(case), Rule(case)
    out = one.run()
    budget = case.plan.sink_tok + case.plan.window_tok + (rule.keep_blocks + 1) * rule.block_tok
    for first, grid_end, end, _ in one.blocks():
        lists = None if grid_end <= budget else [rule.tokens(kv_heads, first, end) for kv_heads in case.lists()]
        assert one.seen[first] == lists
        if end >= case.prompt_tok:  # the last block of the prompt, and decode
            np.testing.assert_allclose(out[:, first:end], expected(case, first, grid_end, end, lists), atol=1e-4)
