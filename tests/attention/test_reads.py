"""What a listener hears of a layer: which keys are probed, what is attended to; and that listening changes nothing."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hipexp_kernels.rope import rotate
from hipexp_kernels.score_chunks.probes import probe_step
from hipexp_kernels.score_chunks.reference import descend, position_of

from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory
from hipexp.attention.reads import ReadRecorder, probed_tokens, units_of
from hipexp.attention.selection import Selection
from hipexp.config.schema import AttendRope, Heads, LayerPlan, PruneRope, Representative, Stage

D, SINK, WINDOW = 8, 8, 64


def tables():
    def cos_sin(positions):
        angle = positions[:, None].double() * 10000 ** (-torch.arange(0, D, 2).double() / D)
        return angle.cos().float(), angle.sin().float()

    return ExactTables(cos_sin, 256)


def plan(rope=PruneRope.relative, heads=Heads.shared, representative=Representative.descent):
    sizes = ((32, 128, 4, 8), (8, 64, 4, 4), (4, 32, 1, 2))
    stages = [Stage(chunk, keep, 16, stride, refresh, representative, rope) for chunk, keep, stride, refresh in sizes]
    return LayerPlan(2, stages, stages, SINK, WINDOW, heads, AttendRope.streaming, [])


def layer(p, listener=None):
    return LayerAttention(p, tables(), D**-0.5, listener=listener)


def random_qkv(T, H=4, K=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, T, D, generator=g) for n in (H, K, K))


class Heard:
    """A listener that keeps everything; copies, since stages write over their last results."""

    def __init__(self):
        self.scored, self.attended = [], []

    def scores(self, number, scoring):
        lists = {name: getattr(scoring, name).clone() for name in ("starts", "counts")}
        self.scored.append((number, dataclasses.replace(scoring, **lists)))

    def attends(self, queries, n_exact, selection):
        self.attended.append((queries, n_exact, Selection(selection.blocks.clone(), selection.counts.clone())))


class Written(list):
    """Takes the place of a trace."""

    write = list.append


def recorder(p, phases=("prefill", "decode")):
    return ReadRecorder(Written(), p, units_of(p, 2, 4 * D), phases)


def probes_by_hand(scoring, n):
    """For every key/value head what the plain statement of scoring looks at."""
    stage, k, rotation, counts = scoring.stage, scoring.keys.float(), scoring.rotation, scoring.counts
    (H, N, _, _), K = scoring.q.shape, len(scoring.keys)
    left_q, right_q = rotation.queries(scoring.q, counts)
    starts = scoring.starts.expand(-1, N, -1)
    seen = [set() for _ in range(K)]
    for h in range(H):
        kv = h // (H // K)
        s = kv if len(starts) > 1 else 0
        for rank in range(int(counts[s, n])):
            left = int(starts[s, n, rank])
            right = min(left + stage.chunk_tok, int(scoring.limits[n]), k.shape[1])
            if left >= right or stage.representative is Representative.bounds:
                continue
            if stage.representative is not Representative.descent:
                step = probe_step(stage.representative.value, stage.chunk_tok)
                seen[kv] |= {min(at + step // 2, right - 1) for at in range(left, left + stage.chunk_tok, step)}
                continue

            def probe(token, queries, h=h, kv=kv, rank=rank):
                seen[kv].add(token)
                key = k[kv, token]
                if rotation.turns_keys:
                    at = int(position_of(rotation, token, rank, n))
                    key = rotate(key, rotation.table.cos[at], rotation.table.sin[at])
                return float((queries[h, n] @ key).max())

            descend(left, right, probe, left_q, right_q)
    return seen


@pytest.mark.parametrize("heads", list(Heads))
@pytest.mark.parametrize("rope", [PruneRope.relative, PruneRope.chunk_indexed, PruneRope.native])
def test_descents_are_heard_token_for_token(heads, rope):
    heard, (q, k, v) = Heard(), random_qkv(340)
    attention, memory = layer(plan(rope, heads), heard), Memory()
    attention(q[:, :330], k[:, :330], v[:, :330], 0)
    attention(q[:, 330:331], k[:, :331], v[:, :331], 330, memory)
    assert [number for number, _ in heard.scored] == [0, 1, 2] * 2
    for _, scoring in heard.scored:
        for n in {len(scoring.queries) // 2, len(scoring.queries) - 1}:
            found = probed_tokens(scoring, n).expand(2, -1)
            assert [set(row.tolist()) - {-1} for row in found] == probes_by_hand(scoring, n)


@pytest.mark.parametrize("representative", [Representative.grid, Representative.exact, Representative.bounds])
def test_scans_are_heard_token_for_token(representative):
    heard, (q, k, v) = Heard(), random_qkv(333)
    layer(plan(representative=representative), heard)(q, k, v, 0)
    for _, scoring in heard.scored:
        for n in (0, len(scoring.queries) - 1):
            found = probed_tokens(scoring, n).expand(2, -1)
            by_hand = probes_by_hand(scoring, n)
            assert [set(row.tolist()) - {-1} for row in found] == by_hand
            assert bool(by_hand[0]) == (representative is not Representative.bounds)


def decoded(p, listener, T=360, begin=300):
    """A prompt and the steps behind it; the listener hears both."""
    q, k, v = random_qkv(T)
    attention, memory = layer(p, listener), Memory()
    outs = [attention(q[:, :begin], k[:, :begin], v[:, :begin], 0)]
    for t in range(begin, T):
        outs.append(attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], t, memory))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("heads", list(Heads))
@pytest.mark.parametrize("representative", list(Representative))
def test_listening_changes_nothing(heads, representative):
    p = plan(heads=heads, representative=representative)
    assert torch.equal(decoded(p, None), decoded(p, recorder(p)))


@pytest.mark.parametrize("heads", list(Heads))
def test_what_is_written_down_is_what_is_read(heads):
    p, heard = plan(heads=heads), Heard()
    to = recorder(p)
    assert torch.equal(decoded(p, heard), decoded(p, to))
    reads = [read for read in to.writer if read.by in ("attend", "reuse")]
    assert len(reads) == 19 + 60 and {read.layer for read in reads} == {2}
    at = iter(reads)
    for queries, n_exact, selection in heard.attended:
        for n, first in enumerate(queries.first.tolist()):
            read, far = next(at), range(SINK, first - WINDOW + 1)
            assert (read.position, read.phase) == (first, "decode" if queries.step else "prefill")
            for s, units in enumerate(read.lists):
                if n < n_exact:
                    tokens = set(far)
                else:
                    blocks = selection.blocks[s, n, : selection.counts[s, n]].tolist()
                    tokens = {b + i for b in blocks for i in range(4)} & set(far)
                assert list(units) == sorted({token // 4 for token in tokens})
            assert len(read.lists) == to.units.lists == (2 if heads is Heads.per_kv else 1)


def test_lists_that_are_used_again_are_told_apart():
    p = plan()
    to = recorder(p, phases=("decode",))
    decoded(p, to)
    steps = {read.position: [] for read in to.writer}
    for read in to.writer:
        assert read.phase == "decode"
        steps[read.position].append(read.by)
    due = {0: ["0", "1", "2", "attend"], 4: ["1", "2", "attend"], 2: ["2", "attend"], 6: ["2", "attend"]}
    assert steps == {300 + i: due.get(i % 8, ["reuse"]) for i in range(60)}
    attended = [set(read.lists[0]) for read in to.writer if read.by in ("attend", "reuse")]
    assert all(a <= b for i, (a, b) in enumerate(pairwise(attended)) if i % 2 == 0)  # the same, and what has left the window


def test_a_step_that_sees_everything_reads_everything():
    p = plan()
    to = recorder(p)
    q, k, v = random_qkv(100)
    layer(p, to)(q[:, -1:], k, v, 99, Memory())
    (read,) = to.writer
    assert (read.by, list(read.lists[0])) == ("attend", list(range(SINK // 4, (99 - WINDOW) // 4 + 1)))


def test_units_are_as_small_as_the_smaller_last_chunk():
    p = plan(heads=Heads.per_kv)
    assert dataclasses.astuple(units_of(p, 2, 4 * D)) == (4, 2, 4 * 4 * D)
    p.heads, p.decode = Heads.shared, p.stages[:2]
    assert dataclasses.astuple(units_of(p, 2, 4 * D)) == (4, 1, 2 * 4 * 4 * D)
    to = recorder(p)
    decoded(p, to, T=302)
    units = next(read for read in to.writer if (read.phase, read.by) == ("decode", "attend")).lists[0]
    assert {unit ^ 1 for unit in units if unit * 4 + 8 < 300 - WINDOW} <= set(units)  # chunks of 8 tokens are two units
