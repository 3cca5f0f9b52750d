"""One layer under a pipeline: selection against an independent statement of the method, and its invariants."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.methods import hip
from hipexp.attention.rope import RopeTables
from hipexp.config.schema import AttendRope, Heads, LayerPlan, PruneRope, Representative, Stage

D = 8


def cos_sin(positions):
    angle = positions[:, None].double() * 10000 ** (-torch.arange(0, D, 2).double() / D)
    return angle.cos().float(), angle.sin().float()


def tables(trained=256):
    return RopeTables(cos_sin, trained)


def stages(rope=PruneRope.relative, refresh=(8, 4, 2), representative=Representative.descent):
    sizes = ((32, 128, 4), (8, 64, 4), (4, 32, 1))
    return [Stage(c, k, 16, s, r, representative, rope) for (c, k, s), r in zip(sizes, refresh, strict=True)]


def plan(rope=PruneRope.relative, heads=Heads.shared, attend=AttendRope.streaming, **kwargs):
    made = stages(rope, **kwargs)
    return LayerPlan(layer=0, stages=made, decode=made, sink_tok=8, window_tok=64, heads=heads, attend=attend, groups=[])


def random_qkv(T, H=4, K=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, T, D, generator=g) for n in (H, K, K))


def layer(p, **kwargs):
    return LayerAttention(p, "hip", tables(), D**-0.5, **kwargs)


def dense(q, k, v, begin):
    cos, sin = cos_sin(torch.arange(k.shape[1]))

    def turn(x, at):
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([a * cos[at] - b * sin[at], b * cos[at] + a * sin[at]], -1)

    groups, Q, T = q.shape[0] // k.shape[0], q.shape[1], k.shape[1]
    k, v = turn(k, torch.arange(T)).repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    logits = turn(q, torch.arange(begin, begin + Q)) @ k.transpose(1, 2) * D**-0.5
    hidden = torch.arange(T) > torch.arange(begin, begin + Q)[:, None]
    return logits.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def plain_select(p, q, k, first, size, end):
    """The method for one block, written out with Python lists: relative rotation, descent, shared heads."""
    made, group = p.stages if size > 1 else p.decode, q.shape[0] // k.shape[0]
    scan = p.window_tok - made[0].chunk_tok
    cos, sin = cos_sin(torch.arange(scan + 2))

    def turn(x, at):
        a, b = x[: D // 2], x[D // 2 :]
        return torch.cat([a * cos[at] - b * sin[at], b * cos[at] + a * sin[at]])

    chunks = [s for s in range(p.sink_tok, first, made[0].chunk_tok) if s <= first - scan]
    for i, stage in enumerate(made):
        stride = stage.query_stride_tok if size > 1 else 1
        score = []
        for start in chunks:
            best = -1e30
            for h in range(q.shape[0]):
                rows = [q[h, r : min(r + stride, end)].mean(0) * D**-0.5 for r in range(0, end, stride)]
                left, right = start, min(start + stage.chunk_tok, first)
                while right - left > 1:
                    mid = (left + right) // 2
                    a = max(float(turn(x, scan + 1) @ k[h // group, (left + mid) // 2]) for x in rows)
                    b = max(float(turn(x, scan) @ k[h // group, (mid + right) // 2]) for x in rows)
                    left, right, best = (left, mid, max(best, a, b)) if a > b else (mid, right, max(best, a, b))
            score.append(best)
        kept = sorted(sorted(range(len(chunks)), key=lambda c: -score[c])[: stage.keep_tok // stage.chunk_tok])
        chunks = [chunks[c] for c in kept]
        if i + 1 < len(made):
            chunks = [s + t for s in chunks for t in range(0, stage.chunk_tok, made[i + 1].chunk_tok) if s + t < first]
    return chunks


@pytest.mark.parametrize("T", [300, 331])
def test_selection_is_the_plain_method(T):
    p = plan()
    q, k, _ = random_qkv(T)
    blocks = QueryBlocks.cut(q, 0, 16)
    late = blocks.from_block(8)
    selection = hip.select(p, p.stages, late, k, tables(), D**-0.5, None)
    for n, first in enumerate(late.first.tolist()):
        expected = plain_select(p, q[:, first : first + 16], k, first, 16, min(16, T - first))
        assert selection.blocks[0, n, : selection.counts[0, n]].tolist() == expected


@given(T=st.integers(130, 420), heads=st.sampled_from(list(Heads)), rope=st.sampled_from([r for r in PruneRope if r is not PruneRope.none]))
@settings(max_examples=25, deadline=None)
def test_lists_are_ascending_unique_on_the_grid_and_in_the_past(T, heads, rope):
    p = plan(rope, heads)
    q, k, _ = random_qkv(T, seed=T)
    blocks = QueryBlocks.cut(q, 0, 16).from_block(6)
    selection = hip.select(p, p.stages, blocks, k, tables(), D**-0.5, None)
    for s in range(selection.blocks.shape[0]):
        for n, first in enumerate(blocks.first.tolist()):
            chosen = selection.blocks[s, n, : selection.counts[s, n]].tolist()
            assert chosen == sorted(set(chosen)) and len(chosen) <= 32 // 4
            assert all((start - 8) % 4 == 0 and 8 <= start < first for start in chosen)


@pytest.mark.parametrize("attend", list(AttendRope))
@pytest.mark.parametrize("T", [1, 7, 16, 64, 96])
def test_equal_to_dense_when_everything_fits(T, attend):
    q, k, v = random_qkv(T)
    one = layer(plan(attend=attend))
    assert torch.allclose(one(q, k, v, 0), dense(q, k, v, 0), atol=1e-5)
    assert one.pruned_blocks == 0


def test_equal_to_dense_when_the_selection_holds_everything():
    """Past the exact path, with budgets that keep all candidates, packed positions are the true ones."""
    p = plan()
    for stage in p.stages:
        stage.keep_tok = 512
    p = dataclasses.replace(p, sink_tok=8)
    q, k, v = random_qkv(400)
    one = layer(p)
    one.plan.stages[-1].keep_tok = 512
    blocks = QueryBlocks.cut(q, 0, 16)
    selection = hip.select(p, p.stages, blocks, k, tables(), D**-0.5, None)
    from hipexp_kernels import attend_blocks
    from hipexp_kernels.rope import AttendRotation

    out, _ = attend_blocks(
        blocks.q, k, v, selection.blocks, selection.counts, blocks.first, torch.zeros(len(blocks.first), dtype=torch.bool),
        block_tok=4, sink_tok=8, window_tok=64, scale=D**-0.5, rotation=AttendRotation("streaming", tables().upto(2048), 256),
    )  # fmt: skip
    assert torch.allclose(blocks.rows(out), dense(q, k, v, 0), atol=1e-5)


@pytest.mark.parametrize("rope", [r for r in PruneRope])
@pytest.mark.parametrize("heads", list(Heads))
def test_prefill_does_not_depend_on_how_it_is_cut(rope, heads):
    q, k, v = random_qkv(400)
    p = plan(rope, heads)
    whole = layer(p)(q, k, v, 0)
    for cut in (16, 48, 160):
        parts = [layer(p)(q[:, b : b + cut], k[:, : b + cut], v[:, : b + cut], b) for b in range(0, 400, cut)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)


def test_causality():
    q, k, v = random_qkv(400)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 336:] = 50.0
    changed_v[:, 336:] = 50.0
    p = plan()
    assert torch.equal(layer(p)(q, k, v, 0)[:, :336], layer(p)(q, changed_k, changed_v, 0)[:, :336])


def decode(p, q, k, v, start, attention=None):
    attention, memory = attention or layer(p), Memory()
    return torch.cat([attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], t, memory) for t in range(start, q.shape[1])], 1), memory


def test_cached_stages_reproduce_the_full_pipeline():
    """If every query is the same, a stage that starts from its cached input finds what the full pipeline finds, until its input grows."""
    q, k, v = random_qkv(340)
    q = q[:, :1].expand(-1, 340, -1).contiguous()
    cached, every = plan(refresh=(8, 4, 2)), plan(refresh=(1, 1, 1))
    _, memory = decode(cached, q, k, v, 300)
    fresh = hip.select(every, every.decode, QueryBlocks.cut(q[:, 339:], 339, 1), k, tables(), D**-0.5, None)
    mem = Memory(step=2, candidates=dict(memory.candidates), selection=memory.selection)
    again = hip.select(cached, cached.decode, QueryBlocks.cut(q[:, 339:], 339, 1), k, tables(), D**-0.5, mem)
    assert torch.equal(again.blocks, memory.selection.blocks)
    assert fresh.blocks.shape == again.blocks.shape


def test_decode_refreshing_every_step_equals_prefill_with_single_query_blocks():
    q, k, v = random_qkv(340)
    every = plan(refresh=(1, 1, 1))
    single = dataclasses.replace(every, stages=[dataclasses.replace(s, query_block_tok=1, query_stride_tok=1) for s in every.stages])
    out, _ = decode(every, q, k, v, 300)
    assert torch.allclose(out, layer(single)(q[:, 300:], k, v, 300), atol=1e-5)


def test_a_token_that_leaves_the_window_between_refreshes_is_still_attended():
    """A key with an overwhelming score must stay visible on every step, also while it crosses the window's edge with a reused list."""
    T = 360
    q, k, v = random_qkv(T)
    q, k, v = q * 0.1, k * 0.1, torch.zeros_like(v)
    direction = torch.zeros(D)
    direction[D // 2 - 1] = direction[D - 1] = 4.0  # the slowest frequency: hardly turned by distance
    spot = 250
    k[:, spot - 3 : spot + 4] = 4 * direction
    q[:] = 4 * direction
    v[:, spot - 3 : spot + 4, 0] = 1.0
    p = plan(refresh=(32, 16, 8))
    out, _ = decode(p, q, k, v, 290)
    assert out[..., 0].min() > 0.9


def test_a_needle_with_smooth_surroundings_is_found_anywhere():
    T = 420
    p = plan()
    direction = torch.zeros(D)
    direction[D // 2 - 1] = direction[D - 1] = 1.0
    for spot in range(20, 320, 13):
        q, k, _ = random_qkv(T, seed=spot)
        k *= 0.05
        bump = torch.exp(-(((torch.arange(T) - spot) / 24.0) ** 2))
        k += 6 * bump[None, :, None] * direction
        q[:] = 4 * direction
        selection = hip.select(p, p.stages, QueryBlocks.cut(q[:, 416:], 416, 16), k, tables(), D**-0.5, None)
        chosen = selection.blocks[0, 0, : selection.counts[0, 0]]
        assert any(start <= spot < start + 4 for start in chosen.tolist())


def test_per_kv_lists_differ_and_shared_lists_do_not():
    q, k, _ = random_qkv(400)
    blocks = QueryBlocks.cut(q, 0, 16).from_block(20)
    assert hip.select(plan(heads=Heads.shared), stages(), blocks, k, tables(), D**-0.5, None).blocks.shape[0] == 1
    own = hip.select(plan(heads=Heads.per_kv), stages(), blocks, k, tables(), D**-0.5, None).blocks
    assert own.shape[0] == 2 and not torch.equal(own[0], own[1])
    for head in range(2):
        alone = hip.select(
            plan(), stages(), QueryBlocks.cut(q[2 * head : 2 * head + 2], 0, 16).from_block(20), k[head : head + 1], tables(), D**-0.5, None
        )
        assert torch.equal(own[head], alone.blocks[0])


def test_smaller_query_blocks_in_later_stages():
    p = plan()
    p.stages[2].query_block_tok = 4
    q, k, v = random_qkv(400)
    whole = layer(p)(q, k, v, 0)
    cut = [layer(p)(q[:, b : b + 80], k[:, : b + 80], v[:, : b + 80], b) for b in range(0, 400, 80)]
    assert torch.allclose(torch.cat(cut, 1), whole, atol=1e-6)


def test_no_stages_is_streaming():
    p = dataclasses.replace(plan(), stages=[], decode=[])
    q, k, v = random_qkv(200)
    out = LayerAttention(p, "streaming", tables(), D**-0.5)(q, k, v, 0)
    at = 199
    keep = [i for i in range(200) if i < 8 or i > 128]  # the block of query 199 starts at 192, its window at 129
    expected = dense(q[:, at:], k[:, keep], v[:, keep], len(keep) - 1)
    assert torch.allclose(out[:, at:], expected, atol=1e-5)
