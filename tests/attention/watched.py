"""A layer under a method, watched from outside: what its queries attend to, as it reads a prompt in parts and decodes."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

import brute
from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory
from hipexp.config.schema import AttendRope, Heads, Pipeline, PruneRope, Rope

CLOSE = 1e-5  # rounding may turn a closer decision: such an example says nothing
SCALE = 0.4
# Numbers of a query, and how many of them RoPE turns (0: the layer has none).
WIDTHS = [(4, 0), (4, 2), (4, 4), (8, 0), (8, 4), (8, 6), (8, 8), (10, 4), (12, 4)]
PLANS = dict(
    layer=st.integers(0, 3), sink_tok=st.sampled_from([0, 3, 8]), window_tok=st.sampled_from([1, 8, 16, 24]), heads=st.sampled_from(Heads),
    prune=st.sampled_from([PruneRope.relative, PruneRope.native]), attend=st.sampled_from(AttendRope),
)  # fmt: skip


def plan(method, layer=5, heads=Heads.shared, prune=PruneRope.native, attend=AttendRope.native, **sizes):
    common = {name: sizes.pop(name) for name in ("sink_tok", "window_tok") if name in sizes}
    return Pipeline(method=method, heads=heads, rope=Rope(prune, attend), params=sizes, **common).plan_layer(layer, [])


@dataclass
class Text:
    """Queries ``[H, T, D]``, keys and values ``[K, T, D]``; begin and end of the parts of its prompt (what is behind them is decoded)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    rotary: int
    parts: list[tuple[int, int]]
    trained: int = 4096

    @property
    def prompt(self):
        return self.parts[-1][1]

    def calls(self):
        return self.parts + [(t, t + 1) for t in range(self.prompt, self.q.shape[1])]

    @property
    def group(self):
        return len(self.q) // len(self.k)


@st.composite
def texts(draw, least, most, grain=1, steps=12, widths=WIDTHS, trained=(64, 4096)):
    """Of ``least`` to ``most`` tokens, of which up to ``steps`` are decoded; parts begin at multiples of ``grain``."""
    K, G, T, (D, rotary) = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(least, most)), draw(st.sampled_from(widths))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, k, v = (size * rng.standard_normal((n, T, D)) for n, size in ((K * G, 2), (K, 1), (K, 1)))
    end = T - draw(st.integers(0, min(T - 1, steps)))
    n = -(-end // grain)
    step = draw(st.one_of(st.integers(1, min(n, 8)).map(lambda count: -(-n // count)), st.integers(1, n)))
    more = draw(st.sets(st.integers(1, n), max_size=2))  # parts of one size, two of them cut again
    borders = {i * grain for i in {*range(0, n, step), *more} if i * grain < end}
    return Text(q, k, v, rotary, list(pairwise(sorted(borders | {end}))), draw(st.sampled_from(trained)))


class Layer:
    """Reads a text. ``seen``: of each block of queries, by its first position, the tokens of every list that lie between sinks and window;
    None: it sees all."""

    def __init__(self, layer_plan, text, softcap=None, shared=None, cos_sin=None):
        self.plan, self.text, self.softcap = layer_plan, text, softcap
        tables = ExactTables(cos_sin or self._cos_sin, text.trained) if text.rotary else None
        self.attention = LayerAttention(layer_plan, tables, SCALE, softcap, listener=self)
        self.method = self.attention.method
        self.state, self.memory, self.shared = self.method.new_state(), Memory(), {} if shared is None else shared
        self.seen, self.out = {}, np.full(text.q.shape, np.nan)

    def _cos_sin(self, positions):
        angles = brute.phase(positions.numpy(), self.text.rotary)
        return torch.from_numpy(angles.real).float(), torch.from_numpy(angles.imag).float()

    def read(self, begin, end):
        q, k, v = (torch.from_numpy(x).float() for x in (self.text.q[:, begin:end], self.text.k[:, :end], self.text.v[:, :end]))
        memory = self.memory if begin >= self.text.prompt else None
        self.out[:, begin:end] = self.attention(q, k, v, begin, memory, state=self.state, shared=self.shared)

    def read_all(self):
        for call in self.text.calls():
            self.read(*call)
        return self

    def attends(self, queries, n_exact, selection):
        for n, first in enumerate(queries.first.tolist()):
            self.seen[first] = None if n < n_exact else [
                self._far(row[:count].tolist(), first, queries.step is not None)
                for row, count in zip(selection.blocks[:, n], selection.counts[:, n], strict=True)
            ]  # fmt: skip

    def _far(self, starts, first, decoding):
        assert starts == sorted(set(starts)) and all(start >= self.plan.sink_tok for start in starts)
        tokens = {start + t for start in starts for t in range(self.method.block(decoding))}
        return tokens & {*range(self.plan.sink_tok, first - self.plan.window_tok + 1)}

    def blocks(self):
        """Of each block its first position, where it ends on the grid, where its queries end, and whether it is a decode step."""
        size, prompt = self.method.attended_block_tok, self.text.prompt
        read = [(first, first + size, min(first + size, prompt), False) for first in range(0, prompt, size)]
        return read + [(t, t + 1, t + 1, True) for t in range(prompt, self.text.q.shape[1])]

    def lists(self):
        """Of every list of a method that knows shared lists, the key/value heads that share it."""
        kv_heads = [*range(len(self.text.k))]
        return [kv_heads] if self.plan.heads is Heads.shared else [[kv] for kv in kv_heads]

    def check_outputs(self):
        """All outputs are softmax attention to the tokens that were seen, sinks and window, at the plan's positions."""
        for first, grid_end, end, _ in self.blocks():
            lists, edge = self.seen[first], first - self.plan.window_tok + 1
            for h, out in enumerate(self.out[:, first:end]):
                far, rule = range(edge), "native"
                if lists is not None:
                    far, rule = {*range(min(edge, self.plan.sink_tok)), *lists[h * len(lists) // len(self.out)]}, self.plan.attend.value
                far, near = np.array(sorted(far), int), np.arange(max(0, edge), end)
                far_phase = brute.far_phases(rule, far, first, grid_end - 1, self.plan.window_tok, self.text.rotary, self.text.trained)
                phase, tokens = np.concatenate([far_phase, brute.phase(near, self.text.rotary)]), np.concatenate([far, near])
                k, v = (x[h // self.text.group, tokens] for x in (self.text.k, self.text.v))
                rows = np.arange(first, end)
                logits = turned(self.text.q[h, first:end], rows, self.text.rotary) @ brute.turned(k, phase).T * SCALE
                np.testing.assert_allclose(out, softmax(logits, self.softcap, tokens <= rows[:, None]) @ v, atol=2e-5)


def turned(x, at, rotary):
    """Queries or keys ``x`` as if they stood at positions ``at``."""
    return brute.turned(x, brute.phase(at, rotary))


def softmax(logits, softcap=None, visible=True):
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * visible
    return weights / weights.sum(-1, keepdims=True)


def best(scores, n, close=CLOSE):
    """The names of the ``n`` best of ``scores``, numbers by name; no example where the next is too close to them."""
    ranking = sorted(scores, key=lambda name: -scores[name])
    assume(not 0 < n < len(ranking) or scores[ranking[n - 1]] - scores[ranking[n]] > close)
    return ranking[:n]
