"""One layer that reads a prompt in parts and then decodes, which keys its queries attend to, and a plain softmax over them."""

import numpy as np
import torch
from hypothesis import strategies as st

import brute
from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory
from hipexp.config.schema import AttendRope, Pipeline, PruneRope, Rope

CLOSE = 1e-5  # rounding may turn a closer decision: such an example says nothing
TRAINED = 1 << 20


@st.composite
def tensors(draw, shortest=1, longest=150):
    """Queries ``[H, T, D]``, keys and values ``[K, T, D]``, how many dimensions RoPE turns (0: the layer has none), and a prompt's length."""
    K, G, D, T = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((4, 8))), draw(st.integers(shortest, longest))
    drawn = np.random.default_rng(draw(st.integers(0, 999)))
    q, k, v = (drawn.standard_normal((n, T, D)) for n in (K * G, K, K))
    return 2 * q, k, v, draw(st.sampled_from((0, D // 2, D))), T - draw(st.integers(0, min(T - 1, 12)))


def plan(method, layer=5, **kwargs):
    attend = kwargs.pop("attend", AttendRope.native)
    sizes = {name: kwargs.pop(name) for name in ("sink_tok", "window_tok") if name in kwargs}
    return Pipeline(method=method, rope=Rope(PruneRope.native, attend), params=kwargs, **sizes).plan_layer(layer, [])


def calls(length, prompt, part):
    """Begin and end of every call: the parts of the prompt, then single tokens."""
    return [(b, min(b + part, prompt)) for b in range(0, prompt, part)] + [(t, t + 1) for t in range(prompt, length)]


class Layer:
    """``seen``: by list and position of a query the tokens that it attends to."""

    def __init__(self, layer_plan, q, k, v, rotary, shared=None):
        self.plan, self.rotary, self.scale = layer_plan, rotary, q.shape[-1] ** -0.5
        self.q, self.k, self.v = q, k, v
        tables = ExactTables(self._cos_sin, TRAINED) if rotary else None
        self.attention = LayerAttention(layer_plan, tables, self.scale, listener=self)
        self.state, self.memory, self.shared = self.attention.method.new_state(), Memory(), {} if shared is None else shared
        self.seen, self.out = {}, np.full(q.shape, np.nan)

    def _cos_sin(self, positions):
        angles = brute.phase(positions.numpy(), self.rotary)
        return torch.from_numpy(angles.real), torch.from_numpy(angles.imag)

    def read(self, begin, end, decoding):
        q, k, v = (torch.from_numpy(x).float() for x in (self.q[:, begin:end], self.k[:, :end], self.v[:, :end]))
        memory = self.memory if decoding else None
        self.out[:, begin:end] = self.attention(q, k, v, begin, memory, state=self.state, shared=self.shared)

    def read_all(self, prompt, part):
        for begin, end in calls(self.q.shape[1], prompt, part):
            self.read(begin, end, begin >= prompt)
        return self

    def attends(self, queries, n_exact, selection):
        method, decoding = self.attention.method, queries.step is not None
        for n, first in enumerate(queries.first.tolist()):
            for position in range(max(first, queries.begin), min(first + queries.size, queries.end)):
                for s, blocks in enumerate(selection.blocks):
                    chosen = blocks[n, : selection.counts[s, n]].tolist() if n >= n_exact else None
                    self.seen[s, position] = self._tokens(chosen, method.block(decoding) if chosen else 0, first, position)

    def _tokens(self, chosen, block_tok, first, position):
        """Tokens, given the blocks that are chosen, or None if everything is attended to."""
        if chosen is None:
            return list(range(position + 1))
        assert chosen == sorted(set(chosen)) and all(start >= self.plan.sink_tok for start in chosen)
        return around(self.plan, {start + t for start in chosen for t in range(block_tok)}, first, position)

    def lists(self):
        return 1 + max(s for s, _ in self.seen)

    def check_outputs(self):
        """The output is a softmax over the tokens that were seen, at the plan's positions."""
        H, T, _ = self.q.shape
        for position in range(0, T, max(1, T // 40)):
            for h in range(H):
                lists = [s for s, at in self.seen if at == position]  # a part where nothing was pruned has one list
                tokens = self.seen[h * len(lists) // H, position]
                at = np.array(tokens) if self.plan.attend is AttendRope.native else np.arange(len(tokens))
                expected = attend(self.q[h, position], at[-1], self.k[h * len(self.k) // H, tokens], at, self.v[h * len(self.k) // H, tokens],
                                  self.scale, self.rotary)  # fmt: skip
                np.testing.assert_allclose(self.out[h, position], expected, atol=2e-5)


def around(layer_plan, chosen, first, position):
    """What a query at ``position`` of a block that begins at ``first`` attends to besides ``chosen``: sinks and window, in order."""
    edge = first - layer_plan.window_tok
    return [j for j in range(position + 1) if j > edge or j < layer_plan.sink_tok or j in chosen]


def attend(query, query_at, keys, keys_at, values, scale, rotary):
    """Softmax attention of one query ``[D]`` to keys ``[n, D]``, each rotated to its position."""
    logits = brute.turned(keys, brute.phase(keys_at, rotary)) @ brute.turned(query, brute.phase(query_at, rotary)) * scale
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum()


def best(scores, n):
    """The keys of the ``n`` best of a dictionary of scores, and by how much the last of them beats the next."""
    ranking = sorted(scores, key=lambda key: -scores[key])
    margin = scores[ranking[n - 1]] - scores[ranking[n]] if 0 < n < len(ranking) else np.inf
    return ranking[:n], margin
