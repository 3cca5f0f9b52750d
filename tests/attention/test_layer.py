"""One layer under a pipeline: selection against an independent statement of the method, and its invariants."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hipexp_kernels import attend_blocks
from hipexp_kernels.rope import AttendRotation
from hypothesis import given, settings
from hypothesis import strategies as st

import brute
import plain
from exact_tables import ExactTables
from hipexp.attention import LayerAttention, Memory
from hipexp.attention.blocks import QueryBlocks
from hipexp.attention.method import Call
from hipexp.attention.methods.hip import Hip, first_candidates
from hipexp.attention.rope import RopeTables
from hipexp.cache.summaries import KeySummaries
from hipexp.config.check import BY_TRUE_POSITION
from hipexp.config.schema import AttendRope, Heads, LayerPlan, PruneRope, Representative, Stage

D = 8


def cos_sin(positions):
    angle = positions[:, None].double() * 10000 ** (-torch.arange(0, D, 2).double() / D)
    return angle.cos().float(), angle.sin().float()


def tables(trained=256):
    return ExactTables(cos_sin, trained)


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
    return LayerAttention(p, tables(), D**-0.5, **kwargs)


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


def of_brute(rotary, trained):
    """Tables with an attention factor, as YaRN has one."""

    def cos_sin(positions):
        table = brute.rope_table(int(positions.max()) + 1, rotary)
        return table.cos[positions], table.sin[positions]

    return ExactTables(cos_sin, trained)


@st.composite
def layers(draw, strategy):
    """A plan, random queries, keys and values of a sequence, rotated dimensions and trained length."""
    width, rotary = draw(st.sampled_from([(8, 8), (8, 6), (10, 4)]))
    (K, G), T = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)])), draw(st.integers(120, 220))
    sizes = draw(st.sampled_from([(32, 8, 4), (16, 8, 8), (32, 4, 1), (16, 8, 2)]))
    keep, window = draw(st.integers(2, 5)) * sizes[0], draw(st.sampled_from([16, 32, 48, 64]))
    by_keys = [Representative.descent, Representative.grid, Representative.exact]
    summarized = window >= 2 * sizes[0] and strategy not in BY_TRUE_POSITION
    known = [[*by_keys, Representative.bounds] if summarized and chunk != 2 else by_keys for chunk in sizes]  # of two keys none is farther

    def drawn(last_keep, last_block):
        representatives = [draw(st.sampled_from(some)) for some in known]
        numbers = (keep, 16, 4, 6), (32, 16, draw(st.sampled_from([1, 4])), 3), (last_keep, last_block, 1, 2)
        pieces = [draw(st.sampled_from([None, *(p for p in (4, 8, 16, 32) if c % p == 0)])) for c in sizes]
        pieces = [p if r is Representative.bounds else None for p, r in zip(pieces, representatives, strict=True)]
        return [Stage(c, *n, r, strategy, p) for c, n, r, p in zip(sizes, numbers, representatives, pieces, strict=True)]

    prefill, decode = drawn(16, draw(st.sampled_from([16, 8]))), drawn(draw(st.sampled_from([16, 24])), 16)
    plan = LayerPlan(
        0, prefill, decode, sink_tok=draw(st.sampled_from([0, 8, 16])), window_tok=window,
        heads=draw(st.sampled_from(list(Heads))), attend=draw(st.sampled_from(list(AttendRope))), groups=[],
        shift_steps=draw(st.integers(0, 7)),
    )  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return plan, *(rng.standard_normal((n, T, width)) for n in (K * G, K, K)), rotary, draw(st.sampled_from([64, 100, 4096]))


def select(p, made, queries, keys, tables, memory):
    """What ``made`` stages select."""
    p = dataclasses.replace(p, **{"stages" if memory is None else "decode": made})
    return Hip(p).select(Call(queries, keys, tables, 1.0, memory is not None, memory))


def fp32(*arrays):
    return (torch.from_numpy(x).float() for x in arrays)


@pytest.mark.parametrize("strategy", list(PruneRope))
@given(data=st.data())
@settings(max_examples=20)
def test_selection_is_the_plain_method(strategy, data):
    p, q, k, _, rotary, trained = data.draw(layers(strategy))
    n = data.draw(st.integers(3, (q.shape[1] - 1) // 16))
    queries, keys = fp32(q, k)
    selection = select(p, p.stages, QueryBlocks.cut(queries, 0, 16).from_block(n), keys, of_brute(rotary, trained), None)
    last = p.stages[-1].query_block_tok
    for at in range(16 * n, min(16 * (n + 1), q.shape[1]), last):
        for s, (own_q, own_k) in enumerate(plain.lists(p, q, k)):
            chosen = selection.blocks[s, (at - 16 * n) // last, : selection.counts[s, (at - 16 * n) // last]]
            assert chosen.tolist() == plain.select(p, p.stages, own_q, own_k, at, rotary, trained)


def attention_of(p, rotary, trained, softcap):
    rotates = p.stages[0].rope is not PruneRope.none
    return LayerAttention(p, of_brute(rotary, trained) if rotates else None, 0.3, softcap)


@pytest.mark.parametrize("strategy", list(PruneRope))
@given(data=st.data(), softcap=st.sampled_from([None, 2.0]))
@settings(max_examples=10)
def test_prefill_is_the_plain_method(strategy, data, softcap):
    p, q, k, v, rotary, trained = data.draw(layers(strategy))
    out = attention_of(p, rotary, trained, softcap)(*fp32(q, k, v), 0)
    size = p.stages[-1].query_block_tok
    first = data.draw(st.integers(0, (q.shape[1] - 1) // size)) * size
    exact = first + size <= p.sink_tok + p.window_tok + p.stages[-1].keep_tok
    chosen = [[] if exact else plain.select(p, p.stages, *own, first, rotary, trained) for own in plain.lists(p, q, k)]
    expected = plain.attend(p, p.stages, q, k, v, first, size, chosen, exact, rotary, trained, 0.3, softcap)
    np.testing.assert_allclose(out[:, first : first + size], expected, atol=1e-4)


@pytest.mark.parametrize("strategy", list(PruneRope))
@given(data=st.data(), steps=st.integers(1, 14), softcap=st.sampled_from([None, 2.0]))
@settings(max_examples=10)
def test_decode_through_refreshes_is_the_plain_method(strategy, data, steps, softcap):
    """Every step from the chunks that stages have remembered, decode stages of their own, across the boundary of what fits."""
    p, q, k, v, rotary, trained = data.draw(layers(strategy))
    budget = p.sink_tok + p.window_tok + p.decode[-1].keep_tok
    end = data.draw(st.sampled_from([q.shape[1], min(q.shape[1], max(budget + 3, steps + 1))]))
    q, k, v = (x[:, :end] for x in (q, k, v))
    attention = attention_of(p, rotary, trained, softcap)
    out, memory = decode(p, *fp32(q, k, v), end - steps, attention)
    assert memory.step == steps and attention.pruned_blocks == sum(at >= budget for at in range(end - steps, end))
    own = plain.lists(p, q, k)
    remembered, chosen = [{} for _ in own], None
    for step, at in enumerate(range(end - steps, end)):
        due = 0 if chosen is None else next((i for i, stage in enumerate(p.decode) if (step + p.shift_steps) % stage.refresh_steps == 0), 3)
        if at >= budget and due < 3:
            chosen = [plain.select(p, p.decode, *x, at, rotary, trained, kept, due) for x, kept in zip(own, remembered, strict=True)]
        expected = plain.attend(
            p, p.decode, q, k[:, : at + 1], v[:, : at + 1], at, 1, chosen or [[]], at < budget, rotary, trained, 0.3, softcap
        )
        np.testing.assert_allclose(out[:, at - end], expected[:, 0], atol=1e-4)


@pytest.mark.parametrize("sink", [0, 8])
@pytest.mark.parametrize("window", [16, 32, 64])
@given(begin=st.integers(0, 300), count=st.integers(1, 60))
def test_candidates_of_the_first_stage(sink, window, begin, count):
    p = dataclasses.replace(plan(), sink_tok=sink, window_tok=window)
    queries = QueryBlocks.cut(torch.zeros(1, count, 1), begin, 1)
    starts, counts = first_candidates(queries, sink, max(0, window - 32), 32)
    for first, n in zip(range(begin, begin + count), counts[0], strict=True):
        assert starts[0, 0, :n].tolist() == plain.first_candidates(p, p.stages, first)


@given(T=st.integers(130, 420), heads=st.sampled_from(list(Heads)), rope=st.sampled_from([r for r in PruneRope if r is not PruneRope.none]))
@settings(max_examples=25, deadline=None)
def test_lists_are_ascending_unique_on_the_grid_and_in_the_past(T, heads, rope):
    p = plan(rope, heads)
    q, k, _ = random_qkv(T, seed=T)
    blocks = QueryBlocks.cut(q, 0, 16).from_block(6)
    selection = select(p, p.stages, blocks, k, tables(), None)
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


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("spare", [0, 1])
def test_exact_up_to_the_last_token_that_fits(steps, spare):
    """Sinks, window and final budget hold 112 tokens, or 111: the last position of the block 96..111 is then one too far."""
    p = dataclasses.replace(plan(), window_tok=71 + spare)
    q, k, v = random_qkv(112)
    one = layer(p)
    out = one(q[:, 111:], k, v, 111, Memory()) if steps else one(q, k, v, 0)
    same = torch.allclose(out, dense(q, k, v, 0)[:, -out.shape[1] :], atol=1e-5)
    assert (one.pruned_blocks, same) == ((0, True) if spare else (1, False))


def test_equal_to_dense_when_the_selection_holds_everything():
    """Past the exact path, with budgets that keep all candidates, packed positions are the true ones."""
    every = [dataclasses.replace(stage, keep_tok=512) for stage in stages()]
    q, k, v = random_qkv(400)
    blocks = QueryBlocks.cut(q, 0, 16)
    selection = select(plan(), every, blocks, k, tables(), None)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selections_in_half_precision_do_not_depend_on_how_prefill_is_cut(dtype):
    """Groups of three, the last block incomplete: means of whole and of cut blocks are computed alike."""
    made = [dataclasses.replace(s, query_block_tok=48, query_stride_tok=3) for s in stages()]
    for seed in range(4):
        q, k, _ = (x.to(dtype) for x in random_qkv(395, seed=seed))
        whole = select(plan(), made, QueryBlocks.cut(q, 0, 48).from_block(4), k, tables(), None)
        for n in range(4, 9):
            b = 48 * n
            part = select(plan(), made, QueryBlocks.cut(q[:, b : b + 48], b, 48), k[:, : b + 48], tables(), None)
            assert torch.equal(part.blocks[:, 0, : part.counts[0, 0]], whole.blocks[:, n - 4, : whole.counts[0, n - 4]])


def test_causality():
    q, k, v = random_qkv(400)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, 336:] = 50.0
    changed_v[:, 336:] = 50.0
    p = plan()
    assert torch.equal(layer(p)(q, k, v, 0)[:, :336], layer(p)(q, changed_k, changed_v, 0)[:, :336])


def decode(p, q, k, v, start, attention=None):
    attention, memory, summaries = attention or layer(p), Memory(), KeySummaries()

    def step(t):
        return attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], t, memory, state=summaries)

    return torch.cat([step(t) for t in range(start, q.shape[1])], 1), memory


@pytest.mark.parametrize("rope", list(PruneRope))
@pytest.mark.parametrize("heads", list(Heads))
def test_cached_stages_reproduce_the_full_pipeline(rope, heads):
    """A stage that starts from its remembered chunks, with the same query, finds bit for bit what the full pipeline finds."""
    q, k, _ = random_qkv(340)
    p, query, full = plan(rope, heads), QueryBlocks.cut(q[:, 339:], 339, 1), Memory()
    fresh = select(p, p.decode, query, k, tables(), full)
    for step, due in ((4, 1), (2, 2), (3, 3)):
        again = Memory(step, {i: (starts.clone(), counts.clone()) for i, (starts, counts) in full.lists.items()})
        assert again.first_stage_due(p.decode) == due
        selection = select(p, p.decode, query, k, tables(), again)
        assert torch.equal(selection.blocks, fresh.blocks) and torch.equal(selection.counts, fresh.counts)
        assert sorted(again.lists) == [1, 2, 3]


@pytest.mark.parametrize("rope", [PruneRope.relative, PruneRope.chunk_indexed])
def test_steps_with_the_same_query_and_the_same_first_candidates_agree(rope):
    """Between 296 and 327 no chunk joins the first stage: cached stages and a recomputation at every step select the same."""
    q, k, _ = random_qkv(328)
    query, cached, every = q[:, :1], Memory(), Memory()
    for at in range(296, 328):
        for memory, refresh in ((cached, (8, 4, 2)), (every, (1, 1, 1))):
            p = plan(rope, refresh=refresh)
            select(p, p.decode, QueryBlocks.cut(query, at, 1), k[:, : at + 1], tables(), memory)
            memory.step += 1
        assert torch.equal(cached.lists[3][0], every.lists[3][0])


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
        selection = select(p, p.stages, QueryBlocks.cut(q[:, 416:], 416, 16), k, tables(), None)
        chosen = selection.blocks[0, 0, : selection.counts[0, 0]]
        assert any(start <= spot < start + 4 for start in chosen.tolist())


def test_per_kv_lists_differ_and_shared_lists_do_not():
    q, k, _ = random_qkv(400)
    blocks = QueryBlocks.cut(q, 0, 16).from_block(20)
    assert select(plan(heads=Heads.shared), stages(), blocks, k, tables(), None).blocks.shape[0] == 1
    own = select(plan(heads=Heads.per_kv), stages(), blocks, k, tables(), None).blocks
    assert own.shape[0] == 2 and not torch.equal(own[0], own[1])
    for head in range(2):
        alone = select(
            plan(), stages(), QueryBlocks.cut(q[2 * head : 2 * head + 2], 0, 16).from_block(20), k[head : head + 1], tables(), None
        )
        assert torch.equal(own[head], alone.blocks[0])


@pytest.mark.parametrize("T", [90, 400, 401])
def test_smaller_query_blocks_in_later_stages(T):
    """90 and 401 leave whole small blocks of the last one without a query."""
    p = plan()
    p.stages[2].query_block_tok = 4
    q, k, v = random_qkv(T)
    whole = layer(p)(q, k, v, 0)
    cut = [layer(p)(q[:, b : b + 80], k[:, : b + 80], v[:, : b + 80], b) for b in range(0, T, 80)]
    assert torch.allclose(torch.cat(cut, 1), whole, atol=1e-6)


def test_no_stages_is_streaming():
    """In prefill the window begins at the first query of a block of 64, in decode at the query."""
    p = dataclasses.replace(plan(), stages=[], decode=[], method="streaming")
    q, k, v = random_qkv(200)
    attention, memory = LayerAttention(p, tables(), D**-0.5), Memory()
    out = attention(q, k, v, 0)
    for at in range(200):
        expected = streamed(q, k, v, at, at // 64 * 64)
        assert torch.allclose(out[:, at : at + 1], expected, atol=1e-5)
        if at >= 150:
            step = attention(q[:, at : at + 1], k[:, : at + 1], v[:, : at + 1], at, memory)
            assert torch.allclose(step, streamed(q, k, v, at, at), atol=1e-5)
    cut = [attention(q[:, b : b + 37], k[:, : b + 37], v[:, : b + 37], b) for b in range(0, 200, 37)]
    assert torch.allclose(torch.cat(cut, 1), out, atol=1e-6)


def streamed(q, k, v, at, first):
    keep = [i for i in range(at + 1) if i < 8 or i > first - 64]
    return dense(q[:, at : at + 1], k[:, keep], v[:, keep], len(keep) - 1)


@pytest.mark.parametrize("attend", [AttendRope.streaming, AttendRope.infllm, AttendRope.native, AttendRope.dynamic])
def test_positions_are_computed_for_tokens_that_exist(attend):
    """A budget far beyond the prompt costs no rows, and no row is missing."""
    wide, q_k_v = plan(attend=attend), random_qkv(5000)
    roomy = dataclasses.replace(wide, window_tok=2**30)
    asked = LayerAttention(roomy, RopeTables(cos_sin, 256), D**-0.5)
    q, k, v = q_k_v
    out = asked(q[:, -40:], k, v, 4960)
    assert asked.tables.upto(1).cos.shape[0] == 8192
    assert torch.allclose(out, dense(q[:, -40:], k, v, 4960), atol=1e-4)


@pytest.mark.parametrize("heads", list(Heads))
@pytest.mark.parametrize("attend", list(AttendRope))
@pytest.mark.parametrize("start", [130, 390])  # from 136 on something is pruned
def test_a_step_is_where_the_device_says(heads, attend, start):
    """As in a CUDA graph that serves later tokens too: keys and the position that sizes come from reach further than the step."""
    q, k, v = random_qkv(420)
    attention, exact, served = layer(plan(heads=heads, attend=attend)), Memory(), Memory()
    step = attention.step_at(419, q.device)
    for at in range(start, start + 20):
        step.numbers.copy_(attention.step_at(at, q.device).numbers)
        found = attention(q[:, at : at + 1], k, v, 419, served, step)
        expected = attention(q[:, at : at + 1], k[:, : at + 1], v[:, : at + 1], at, exact)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", list(Heads))
def test_a_query_that_turns_refreshes_and_others_do_not(heads):
    """Queries that stay the same but in two steps: those steps, and the scheduled ones, select as a layer that runs all stages does."""
    q, k, _ = random_qkv(300)
    asked = {at: 0 if at < 277 else 1 if at < 290 else 2 for at in range(270, 300)}
    seen, keys = {}, k
    for name, refresh, below in (("turned", (32, 32, 32), 0.9), ("every", (1, 1, 1), None)):
        p, memory, seen[name] = dataclasses.replace(plan(heads=heads, refresh=refresh), refresh_below=below), Memory(), []
        for at, which in asked.items():
            found = select(p, p.decode, QueryBlocks.cut(q[:, which : which + 1], at, 1), keys[:, : at + 1], tables(), memory)
            memory.step += 1
            seen[name].append(found.blocks.clone())
    turned, every = seen["turned"], seen["every"]
    for step, at in enumerate(asked):
        last = max(start for start in (270, 277, 290) if start <= at)
        assert torch.equal(turned[step], every[last - 270])


@pytest.mark.parametrize("refresh", [(8, 4, 2), (1, 1, 1), (3, 3, 3)])
@pytest.mark.parametrize("held", [True, False])
def test_a_late_refresh_is_what_a_prompt_one_made_a_step_before(refresh, held):
    """Every step but the first attends to the selection that would have been the last step's; what is held of it changes nothing."""
    q, k, v = random_qkv(260)
    seen, outs = {}, {}
    for late in (False, True):
        chosen = []
        hears = SimpleNamespace(scores=lambda *_: None, attends=lambda *told, to=chosen: to.append(told[2].blocks.clone()))
        made = layer(dataclasses.replace(plan(refresh=refresh), late_refresh=late), listener=hears)
        memory = Memory() if held else Memory(held=None)
        outs[late] = [made(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], t, memory) for t in range(220, 244)]
        seen[late] = chosen
    prompt, late = seen[False], seen[True]
    assert torch.equal(late[0], prompt[0])
    assert all(torch.equal(*pair) for pair in zip(late[1:], prompt[:-1], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(late, prompt, strict=True))
    whole = [x.clone() for x in outs[True]]
    for t, blocks, out in zip(range(220, 244), late, whole, strict=True):
        expected, _ = attend_blocks(
            q[:, None, t : t + 1], k[:, : t + 1], v[:, : t + 1], blocks, (blocks >= 0).sum(-1), torch.tensor([t]), torch.tensor([False]),
            block_tok=4, sink_tok=8, window_tok=64, scale=D**-0.5, rotation=AttendRotation("streaming", tables().upto(300), 256),
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, 0])
