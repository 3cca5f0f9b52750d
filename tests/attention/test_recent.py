"""The newest queries of a sequence, and decode steps that score with them."""

import dataclasses

import pytest
import torch
from hipexp_kernels.paged import whole

from hipexp.attention import Memory
from hipexp.attention.blocks import QueryBlocks, Step
from hipexp.attention.recent import RecentQueries
from hipexp.config.schema import Heads, PruneRope, Representative
from test_layer import D, layer, plan, random_qkv

CPU = torch.device("cpu")


def noted(q, parts, size, prompt_tok):
    """Of ``parts`` of a prompt of ``prompt_tok`` tokens, and of decode steps after it."""
    recent, begin = RecentQueries(size), 0
    for end in [*parts, prompt_tok]:
        recent.note(QueryBlocks.cut(q[:, begin:end], begin, 4))
        begin = end
    for at in range(prompt_tok, q.shape[1]):
        recent.note(QueryBlocks.one(q[:, at : at + 1], at, Step.at(at, 0, False, CPU)))
    return recent


@pytest.mark.parametrize("size,parts,prompt_tok", [(4, [], 20), (4, [8, 12], 17), (4, [], 1), (8, [4], 6), (3, [1, 2], 3)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_newest_are_those_at_the_last_positions(size, parts, prompt_tok, n):
    q = next(random_qkv(23))
    found, at = noted(q, parts, size, prompt_tok).newest(n, torch.tensor([22]))
    order = at[0].argsort()
    assert at[0][order].tolist() == list(range(23 - n, 23))
    assert torch.equal(found[:, 0, order], q[:, 23 - n :])


def test_of_a_shorter_sequence_some_are_there_several_times():
    q = next(random_qkv(3))
    found, at = noted(q, [], 8, 2).newest(8, torch.tensor([2]))
    assert set(at[0].tolist()) <= {0, 1, 2} and {1, 2} <= set(at[0].tolist())
    assert all(torch.equal(found[:, 0, i], q[:, p]) for i, p in enumerate(at[0].tolist()))


def test_it_is_written_in_place():
    """So that a CUDA graph of a step goes on writing where later steps read."""
    q, recent = next(random_qkv(9)), RecentQueries(4)
    recent.note(QueryBlocks.one(q[:, :1], 0, Step.at(0, 0, False, CPU)))
    before = recent.newest(4, torch.tensor([0]))[0].data_ptr()
    for at in range(1, 9):
        recent.note(QueryBlocks.one(q[:, at : at + 1], at, Step.at(at, 0, False, CPU)))
    assert recent.newest(4, torch.tensor([8]))[0].data_ptr() == before and recent.bytes == 4 * (4 * D * 4 + 8)


def with_history(p, n):
    return dataclasses.replace(p, decode=[dataclasses.replace(stage, history_tok=n) for stage in p.decode])


@dataclasses.dataclass
class Heard:
    """What the last stage scores, and selects of it."""

    rows: list

    def scores(self, number, scoring):
        self.rows.append((number, scoring))

    def attends(self, queries, n_exact, selection):
        self.selection = selection


@pytest.mark.parametrize("heads", list(Heads))
@pytest.mark.parametrize("rope", [PruneRope.relative, PruneRope.chunk_indexed, PruneRope.native])
def test_a_step_keeps_what_its_newest_queries_like_best(heads, rope):
    """The last stage scores by all keys: its chunks are compared, in float64, with the dot products of the last four queries."""
    T, n = 300, 4
    q, k, v = random_qkv(T)
    p = with_history(plan(rope, heads), n)
    p.decode[2] = dataclasses.replace(p.decode[2], representative=Representative.exact)
    heard = Heard([])
    attention = layer(p, listener=heard)
    memory, state = Memory(), attention.method.new_state()
    attention(q[:, :288], k[:, :288], v[:, :288], 0, state=state)
    heard.rows.clear()
    for at in range(288, T):
        attention(q[:, at : at + 1], k[:, : at + 1], v[:, : at + 1], at, memory, state=state)
    number, scoring = heard.rows[-1]
    last = int(scoring.queries.first)
    assert number == 2 and scoring.q.shape[2] == n
    starts, count = scoring.starts[:, 0], scoring.counts[:, 0]
    assert whole(scoring.keys).shape[1] == last + 1
    table = scoring.rotation.table
    cos, sin = table.cos.double(), table.sin.double()

    def turn(x, at):
        a, b = x[: D // 2], x[D // 2 :]
        return torch.cat([a * cos[at] - b * sin[at], b * cos[at] + a * sin[at]])

    def logit(head, kv_head, rank, token, position, total):
        key, query = k[kv_head, token].double(), q[head, position].double()
        if rope is PruneRope.relative:
            return turn(query, scoring.rotation.scan_window_tok) @ key
        if rope is PruneRope.native:
            return turn(query, position) @ turn(key, token)
        return turn(query, min(position, total + scoring.rotation.scan_window_tok)) @ turn(key, rank)

    K, G = 2, 2
    for s in range(len(heard.selection.blocks)):
        total = int(count[s])
        scores = []
        for c in range(total):
            here = range(K) if len(heard.selection.blocks) == 1 else [s]
            start = int(starts[s, c])
            scores.append(
                max(
                    float(logit(kv * G + g, kv, c, t, position, total))
                    for kv in here for g in range(G) for t in range(start, min(start + 4, last)) for position in range(last - n + 1, last + 1)
                )
            )  # fmt: skip
        best = sorted(sorted(range(total), key=lambda c: -scores[c])[: 32 // 4])
        kept = heard.selection.blocks[s, 0, : int(heard.selection.counts[s, 0])].tolist()
        assert kept == [int(starts[s, c]) for c in best]


def test_a_needle_that_an_earlier_query_asked_for_is_attended_to():
    """With a history of four the three steps after it do so too, without one none does."""
    T, spot = 340, 120
    q, k, v = (0.1 * x for x in random_qkv(T))
    direction = torch.zeros(D)
    direction[D // 2 - 1] = direction[D - 1] = 4.0
    k[:, spot] = 4 * direction
    q -= 0.1 * direction  # every other query dislikes it
    q[:, 302] = direction

    def kept(n):
        p = with_history(plan(refresh=(1, 1, 1)), n)
        p.decode[:] = [dataclasses.replace(stage, representative=Representative.exact) for stage in p.decode]
        heard = Heard([])
        attention = layer(p, listener=heard)
        memory, state = Memory(), attention.method.new_state()
        attention(q[:, :300], k[:, :300], v[:, :300], 0, state=state)
        found = []
        for at in range(300, 310):
            attention(q[:, at : at + 1], k[:, : at + 1], v[:, : at + 1], at, memory, state=state)
            found.append(spot in heard.selection.blocks[0, 0].tolist())
        return found

    assert kept(4) == [False] * 2 + [True] * 4 + [False] * 4
    assert kept(1) == [False] * 2 + [True] + [False] * 7


def test_the_state_counts_what_it_holds():
    p = with_history(plan(), 4)
    q, k, v = random_qkv(200)
    attention = layer(p)
    state = attention.method.new_state()
    assert state.bytes == 0
    attention(q, k, v, 0, state=state)
    assert state.bytes == state.recent.bytes == 4 * (4 * D * 4 + 8)


def test_a_step_is_the_same_whether_the_tokens_before_it_were_read_or_decoded():
    q, k, v = random_qkv(340)
    attention = layer(with_history(plan(refresh=(1, 1, 1)), 8))
    outs = []
    for read in (300, 339):
        memory, state = Memory(), attention.method.new_state()
        attention(q[:, :read], k[:, :read], v[:, :read], 0, state=state)
        for at in range(read, 340):
            out = attention(q[:, at : at + 1], k[:, : at + 1], v[:, : at + 1], at, memory, state=state)
        outs.append((out, memory.lists[3][0]))
    assert torch.equal(outs[0][1], outs[1][1]) and torch.allclose(outs[0][0], outs[1][0], atol=1e-6)
