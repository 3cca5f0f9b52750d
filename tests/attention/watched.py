"""A layer under a method, watched from outside: what each block of queries attends to; and attention to given tokens, once more."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from hypothesis import strategies as st

import brute
from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory
from hipexp.config.schema import AttendRope, Heads, LayerPlan, PruneRope

SCALE = 0.4


@dataclass
class Case:
    """A plan, and a sequence of random queries, keys and values.

    ``rotary`` of ``width`` numbers are rotated. The last ``steps`` tokens are decoded, those before read in parts of ``part_tok``.
    """

    plan: LayerPlan
    kv_heads: int
    group: int
    length: int
    width: int
    rotary: int
    trained: int
    steps: int
    part_tok: int
    seed: int

    @cached_property
    def qkv(self):
        rng = np.random.default_rng(self.seed)
        heads = self.kv_heads * self.group, self.kv_heads, self.kv_heads
        return [size * rng.standard_normal((n, self.length, self.width)) for n, size in zip(heads, (1.5, 1, 1), strict=True)]

    @property
    def prompt_tok(self):
        return self.length - self.steps

    def lists(self):
        """Of every list of tokens the key/value heads that share it."""
        kv_heads = range(self.kv_heads)
        return [list(kv_heads)] if self.plan.heads is Heads.shared else [[kv] for kv in kv_heads]

    def heads_of(self, kv):
        """The query heads of a key/value head."""
        return range(kv * self.group, (kv + 1) * self.group)

    def query(self, head, token, position):
        """The query of a token, as if it stood at ``position``; ints, or arrays of them."""
        return brute.turned(self.qkv[0][head, token], brute.phase(position, self.rotary))

    def key(self, kv, token, position):
        return brute.turned(self.qkv[1][kv, token], brute.phase(position, self.rotary))

    def attention(self, head, kv, at, tokens, distance=None):
        """What the query of token ``at`` gives each of ``tokens``: by true positions, or as if all of them lay so far before it."""
        tokens = np.array(tokens)
        query, keys = self.query(head, at, at), self.key(kv, tokens, tokens)
        if distance is not None:
            query, keys = self.query(head, at, distance), self.key(kv, tokens, 0 * tokens)
        logits = keys @ query * SCALE
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()


@st.composite
def cases(draw, method, params, query_tok, windows=(1, 8, 16, 24), most_steps=6, **fixed):
    """Of a ``method`` with ``params``, strategies by name; ``query_tok``: name of the one that is its query block, or its size.

    ``fixed``: fields of the plan.
    """
    drawn = {name: draw(one) for name, one in params.items()}
    made = dict(
        stages=st.just([]), decode=st.just([]), groups=st.just([]), method=st.just(method), params=st.just(drawn),
        layer=st.integers(0, 3), sink_tok=st.sampled_from([0, 3, 8]), window_tok=st.sampled_from(windows),
        heads=st.sampled_from(list(Heads)), attend=st.sampled_from(list(AttendRope)),
        prune=st.sampled_from([PruneRope.relative, PruneRope.native]),
    )  # fmt: skip
    plan = LayerPlan(**{name: draw(one) for name, one in made.items()} | fixed)
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)]))
    width, rotary = draw(st.sampled_from([(8, 8), (8, 6), (10, 4)]))
    part_tok = drawn.get(query_tok, query_tok) * draw(st.integers(1, 4))
    length, trained, seed = draw(st.integers(90, 160)), draw(st.sampled_from([64, 4096])), draw(st.integers(0, 999))
    return Case(plan, kv_heads, group, length, width, rotary, trained, draw(st.integers(0, most_steps)), part_tok, seed)


class Watched:
    """``seen``: of each block, by its first position, the tokens of every list that lie between sinks and window; None: it sees all."""

    def __init__(self, case):
        self.case, self.seen = case, {}
        self.layer = LayerAttention(case.plan, self.tables(), SCALE, listener=self)
        self.method = self.layer.method

    def tables(self):
        def cos_sin(positions):
            table = brute.rope_table(int(positions.max()) + 1, self.case.rotary)
            return table.cos[positions], table.sin[positions]

        return ExactTables(cos_sin, self.case.trained)

    def attends(self, queries, n_exact, selection):
        block_tok, plan = self.method.block(queries.step is not None), self.case.plan
        for n, first in enumerate(queries.first.tolist()):
            far = set(range(plan.sink_tok, first - plan.window_tok + 1))
            lists = [blocks[n, : int(count[n])].tolist() for blocks, count in zip(selection.blocks, selection.counts, strict=True)]
            assert all(starts == sorted(set(starts)) for starts in lists)
            self.seen[first] = None if n < n_exact else [{i for b in starts for i in range(b, b + block_tok)} & far for starts in lists]

    def run(self):
        """Outputs ``[H, T, D]``."""
        case, state, memory = self.case, self.method.new_state(), Memory()
        q, k, v = (torch.from_numpy(x).float() for x in case.qkv)
        outs = []
        for begin in range(0, case.prompt_tok, case.part_tok):
            end = min(begin + case.part_tok, case.prompt_tok)
            outs.append(self.layer(q[:, begin:end], k[:, :end], v[:, :end], begin, state=state))
        for t in range(case.prompt_tok, case.length):
            outs.append(self.layer(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], t, memory, state=state))
        return torch.cat(outs, 1).numpy()

    def blocks(self):
        """Of each block its first position, where it ends on the grid and where its queries end, and whether it is a decode step."""
        size, prompt = self.method.query_block_tok, self.case.prompt_tok
        read = [(first, first + size, min(first + size, prompt), False) for first in range(0, prompt, size)]
        return read + [(t, t + 1, t + 1, True) for t in range(prompt, self.case.length)]


def expected(case, first, grid_end, end, lists):
    """Outputs ``[H, n, D]`` of queries ``first`` … that attend to ``lists`` of tokens, with sinks and window; None: to all before them."""
    lists, exact = ([set()], True) if lists is None else (lists, False)
    starts = np.full((len(lists), 1, max(map(len, lists))), -1)
    for own, tokens in zip(starts, lists, strict=True):
        own[0, : len(tokens)] = sorted(tokens)
    plan, (q, k, v) = case.plan, (x[:, :end] for x in case.qkv)
    rows = np.pad(q[:, first:], ((0, 0), (0, grid_end - end), (0, 0)))[:, None]
    out, _ = brute.attend_blocks(
        rows, k, v, starts, (starts >= 0).sum(-1), [first], [exact], 1, plan.sink_tok, plan.window_tok, SCALE, plan.attend.value,
        case.rotary, case.trained,
    )  # fmt: skip
    return out[:, 0, : end - first]
