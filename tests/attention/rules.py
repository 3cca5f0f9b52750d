"""What the plain statements of methods share: sizes to draw, what a layer attends to, and a softmax over given keys at given positions."""

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from torch import from_numpy

import brute
from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory

CLOSE = 1e-5  # rounding may turn a closer decision: such an example says nothing
SCALE = 0.3


@st.composite
def qkv(draw, least, most):
    """Queries, keys and values in double precision ``[H, T, D]``, ``[K, T, D]``, and how many of their dimensions are rotated."""
    width, rotary = draw(st.sampled_from([(8, 8), (8, 6), (12, 4)]))
    (K, G), T = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)])), draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return *(rng.standard_normal((n, T, width)) for n in (K * G, K, K)), rotary


def cut(draw, end, grain):
    """Where the parts of a prompt begin and end: some multiples of ``grain``."""
    inside = st.sets(st.integers(1, max(1, (end - 1) // grain)), max_size=2)
    borders = [0, *sorted(i * grain for i in draw(inside) if i * grain < end), end]
    return list(pairwise(borders))


class Layer:
    """One layer that reads a prompt in parts and decodes; ``seen``: what was attended to, by first position of each block of queries.

    None: all keys; else for each list the tokens before the block.
    """

    def __init__(self, pipeline, rotary, trained=4096, softcap=None, layer=5):
        def cos_sin(positions):
            table = brute.rope_table(len(positions), rotary)
            return table.cos, table.sin

        self.plan = pipeline.plan_layer(layer, [])
        self.attention = LayerAttention(self.plan, ExactTables(cos_sin, trained), SCALE, softcap, listener=self)
        self.state, self.shared, self.memory, self.seen = self.attention.method.new_state(), {}, Memory(), {}

    def read(self, q, k, v, begin, end):
        return self._attend(q, k, v, begin, end, None)

    def step(self, q, k, v, at):
        return self._attend(q, k, v, at, at + 1, self.memory)[:, 0]

    def _attend(self, q, k, v, begin, end, memory):
        q, k, v = (from_numpy(x).float() for x in (q[:, begin:end], k[:, :end], v[:, :end]))
        return self.attention(q, k, v, begin, memory, state=self.state, shared=self.shared).numpy()

    def scores(self, number, scoring):
        pass

    def attends(self, queries, n_exact, selection):
        size = getattr(self.attention.method, "block", lambda _: 1)(queries.step is not None)
        for n, first in enumerate(queries.first.tolist()):
            edge, lists = first - self.plan.window_tok, []
            for row, count in zip(selection.blocks[:, n].tolist(), selection.counts[:, n].tolist(), strict=True):
                chosen = {start + t for start in row[:count] for t in range(size)} | set(range(self.plan.sink_tok))
                lists.append({i for i in chosen if i <= edge} | set(range(max(0, edge + 1), first)))
            self.seen[first] = None if n < n_exact else lists


def logits(query, keys, at, keys_at, rotary):
    """Of a raw query ``[D]`` at position ``at`` with raw keys ``[n, D]`` at positions ``[n]``."""
    return brute.turned(keys, brute.phase(keys_at, rotary)) @ brute.turned(query, brute.phase(at, rotary)) * SCALE


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


def attend(query, keys, values, at, keys_at, rotary, softcap=None):
    """The output ``[D]`` of one query over given keys and values ``[n, D]``."""
    x = logits(query, keys, at, keys_at, rotary)
    return softmax(softcap * np.tanh(x / softcap) if softcap else x) @ values


def attend_at_true_positions(query, keys, values, at, tokens, rotary, softcap=None):
    """The same over some ``tokens`` of all keys and values ``[T, D]``."""
    tokens = np.array(sorted(tokens))
    return attend(query, keys[tokens], values[tokens], at, tokens, rotary, softcap)
