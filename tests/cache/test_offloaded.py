"""Attention over an offloaded store beside attention over a resident one: the same numbers, whatever the cache holds."""

import dataclasses
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.reads import unit_tok_of
from hipexp.attention.rope import RopeTables
from hipexp.cache.offloaded import OffloadedStore
from hipexp.cache.placement import Placement
from hipexp.cache.resident import ResidentStore
from hipexp.cache.summaries import KeySummaries
from hipexp.cache.tiers import Disk
from hipexp.config.offload import FORMATS, POLICIES, kept_tok
from hipexp.config.schema import (
    PAGE_TOK,
    AttendRope,
    Heads,
    LayerPlan,
    Pipeline,
    PruneRope,
    Representative,
    Rope,
    Stage,
    page_bytes,
)

D, K, G = 16, 2, 2
ANY_ANGLE = [PruneRope.relative, PruneRope.chunk_indexed, PruneRope.infllm]


def tables() -> RopeTables:
    inverse = 10000 ** (-torch.arange(0, D, 2) / D)
    return RopeTables(lambda position: tuple(f(position[:, None] * inverse) for f in (torch.cos, torch.sin)), 512)


def plan_of(
    representatives=(Representative.descent, Representative.descent, Representative.descent),
    heads=Heads.shared, prune=PruneRope.relative, attend=AttendRope.streaming, sink_tok=16, decode_chunk=8, piece_tok=None,
) -> LayerPlan:  # fmt: skip
    first, second, third = representatives
    piece_tok = piece_tok if first is Representative.bounds else None
    stages = [Stage(64, 512, 64, 4, 8, first, piece_tok=piece_tok), Stage(16, 256, 64, 4, 4, second), Stage(8, 128, 64, 1, 2, third)]
    decode = None if decode_chunk == 8 else [*stages[:2], Stage(decode_chunk, 96, 64, 1, 2, third)]
    pipeline = Pipeline(stages=stages, decode=decode, sink_tok=sink_tok, window_tok=128, heads=heads, rope=Rope(prune, attend))
    return pipeline.plan_layer(0, [])


def placement(plan: LayerPlan, more_tok: int = 0, **more) -> Placement:
    """As small a cache as there may be, and ``more_tok``."""
    unit = unit_tok_of(plan)
    least = plan.sink_tok + plan.window_tok + kept_tok(plan) + PAGE_TOK
    return Placement(unit, plan.heads is Heads.per_kv, plan.sink_tok, plan.window_tok, PAGE_TOK, least + more_tok, **more)


def inputs(n_tok: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(heads, n_tok, D, generator=generator) for heads in (K * G, K, K))


def attend(plan: LayerPlan, store, qkv, prompt_tok: int, chunk_tok: int) -> torch.Tensor:
    """Outputs of a prompt in chunks, and of decode steps behind it."""
    q, k, v = qkv
    attention, summaries, memory, outs = LayerAttention(plan, tables(), D**-0.5), KeySummaries(), Memory(), []
    cuts = [*range(0, prompt_tok, chunk_tok), *range(prompt_tok, q.shape[1] + 1)]
    for begin, end in itertools.pairwise(cuts):
        store.decoding = begin >= prompt_tok
        store.append(k[:, begin:end], v[:, begin:end])
        outs.append(attention(q[:, begin:end], *store.view(), begin, memory if store.decoding else None, state=summaries))
        if not store.decoding:
            store.settle()
    return torch.cat(outs, 1)


@settings(max_examples=25, deadline=None)
@given(
    representatives=st.tuples(*[st.sampled_from(Representative)] * 3),
    heads=st.sampled_from(Heads),
    prune=st.sampled_from(PruneRope),
    attend_rope=st.sampled_from(AttendRope),
    policy=st.sampled_from(POLICIES),
    more_tok=st.sampled_from([0, 8, 64, 4096]),
    sink_tok=st.sampled_from([0, 16, 72]),
    decode_chunk=st.sampled_from([8, 4]),
    piece_tok=st.sampled_from([None, 32, 64]),
    prompt_tok=st.integers(600, 900),
    chunk_tok=st.sampled_from([64, 192, 1024]),
)
def test_attention_is_that_of_a_resident_store(
    representatives, heads, prune, attend_rope, policy, more_tok, sink_tok, decode_chunk, piece_tok, prompt_tok, chunk_tok
):  # fmt: skip
    if Representative.bounds in representatives and prune not in ANY_ANGLE:
        prune = PruneRope.relative
    plan = plan_of(representatives, heads, prune, attend_rope, sink_tok, decode_chunk, piece_tok)
    qkv = inputs(prompt_tok + 20, prompt_tok)
    store = OffloadedStore(placement(plan, more_tok, policy=policy))
    offloaded = attend(plan, store, qkv, prompt_tok, chunk_tok)
    assert torch.equal(offloaded, attend(plan, ResidentStore(), qkv, prompt_tok, chunk_tok))
    assert store.length == qkv[0].shape[1]


def test_a_pipeline_without_stages_reads_nothing_back():
    plan = Pipeline(method="streaming", sink_tok=4, window_tok=80).plan_layer(0, [])
    qkv = inputs(500)
    outs = []
    for store in (ResidentStore(), OffloadedStore(placement(plan, 64))):
        attention = LayerAttention(plan, tables(), D**-0.5)
        for begin in range(0, 500, 128):
            q, k, v = (x[:, begin : begin + 128] for x in qkv)
            store.append(k, v)
            outs.append(attention(q, *store.view(), begin))
            store.settle()
    assert all(torch.equal(a, b) for a, b in zip(outs[:4], outs[4:], strict=True))
    assert {by: traffic.misses for (_, by), traffic in store.traffic.counts.items()} == {"write": 0, "attend": 0}


@pytest.mark.parametrize("heads", Heads)
def test_bytes_are_counted_where_they_move(heads):
    plan = plan_of((Representative.bounds, Representative.bounds, Representative.exact), heads)
    store = OffloadedStore(placement(plan))
    qkv = inputs(900)
    attend(plan, store, qkv, 884, 192)
    counts = store.traffic.counts
    unit_bytes = 8 * D * 4 * (1 if heads is Heads.per_kv else K)
    assert ("prefill", "0") not in counts and ("decode", "1") not in counts  # landmarks are no keys
    assert {by for phase, by in counts if phase == "decode"} == {"2", "attend", "write"}
    for (_, by), traffic in counts.items():
        assert traffic.h2d_bytes == traffic.misses * unit_bytes
        assert traffic.d2h_bytes % (2 * K * PAGE_TOK * D * 4) == 0
        assert traffic.misses or by == "write"
    assert sum(traffic.d2h_bytes for traffic in counts.values()) == 900 // PAGE_TOK * 2 * K * PAGE_TOK * D * 4  # each page once


def test_a_step_that_uses_a_list_again_moves_nothing():
    plan = plan_of((Representative.bounds, Representative.bounds, Representative.exact))
    store, qkv = OffloadedStore(placement(plan)), inputs(920)
    attention, memory, summaries = LayerAttention(plan, tables(), D**-0.5), Memory(), KeySummaries()
    store.append(qkv[1][:, :896], qkv[2][:, :896])
    store.settle()
    fetched = []
    for t in range(896, 916):
        store.decoding = True
        store.append(qkv[1][:, t : t + 1], qkv[2][:, t : t + 1])
        before = sum(traffic.h2d_bytes for traffic in store.traffic.counts.values())
        attention(qkv[0][:, t : t + 1], *store.view(), t, memory, state=summaries)
        fetched.append(sum(traffic.h2d_bytes for traffic in store.traffic.counts.values()) - before)
    assert all(count == 0 for count in fetched[1::2]) and fetched[0] > 0 and sum(fetched[2::2]) > 0


def test_what_is_held_crosses_the_link_once_and_is_given_up_afterwards():
    plan, qkv = plan_of(), inputs(1000)
    store = OffloadedStore(placement(plan))
    store.hold = True
    store.reserve(1000, qkv[1])
    assert torch.equal(attend(plan, store, qkv, 1000, 192), attend(plan, ResidentStore(), qkv, 1000, 192))
    held = store.bytes
    store.hold = False
    store.settle()
    assert store.bytes < held - 700 * 2 * K * D * 4
    assert {by: traffic.h2d_bytes for (_, by), traffic in store.traffic.counts.items()} == {"write": 0}
    assert store.traffic.counts["prefill", "write"].d2h_bytes == 1000 // PAGE_TOK * PAGE_TOK * 2 * K * D * 4
    token = torch.tensor([[3, 500, 17, 999, 120]])
    for x, all_rows in zip(store.view(), qkv[1:], strict=True):
        assert torch.equal(x.gather(token, slice(None), torch.empty(K, 5, D)), all_rows[:, token[0]])


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_format_changes_does_not_depend_on_the_cache(format):
    """Readers see a page as the format keeps it from the moment it is written, whether they find it on the device or not."""
    plan = plan_of((Representative.bounds, Representative.exact, Representative.exact))
    qkv = inputs(900, seed=5)
    outs = []
    for more_tok, policy, hold in ((0, "clock", False), (4096, "lru", False), (64, "lfu", True)):
        store = OffloadedStore(placement(plan, more_tok, policy=policy, format=format))
        store.hold = hold
        outs.append(attend(plan, store, qkv, 880, 192))
        if not hold:
            written = 900 // PAGE_TOK * 2 * K * page_bytes(format, PAGE_TOK, D, 4)
            assert sum(traffic.d2h_bytes for traffic in store.traffic.counts.values()) == written
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    resident = attend(plan, ResidentStore(), qkv, 880, 192)
    assert torch.equal(outs[0], resident) == (format == "auto")
    near = (outs[0] - resident).abs().median()
    assert near < {"auto": 1e-9, "bf16": 2e-3, "fp8": 0.03, "int8": 0.01, "int4": 0.1}[format]


def test_pages_beyond_host_memory_lie_on_disk(tmp_path):
    plan, qkv = plan_of(), inputs(900)
    store = OffloadedStore(placement(plan, host_tok=3 * PAGE_TOK), Disk(tmp_path))
    assert torch.equal(attend(plan, store, qkv, 880, 192), attend(plan, ResidentStore(), qkv, 880, 192))
    pages = 900 // PAGE_TOK
    page = 2 * K * PAGE_TOK * D * 4
    assert store.disk_bytes == (pages - 3) * page and sum(t.disk_write_bytes for t in store.traffic.counts.values()) == (pages - 3) * page
    read = sum(traffic.disk_read_bytes for traffic in store.traffic.counts.values())
    assert 0 < read < sum(traffic.h2d_bytes for traffic in store.traffic.counts.values())


def test_a_file_that_was_cut_is_an_error_and_no_result(tmp_path):
    plan, qkv = plan_of(), inputs(900)
    disk = Disk(tmp_path)
    store = OffloadedStore(placement(plan, host_tok=PAGE_TOK), disk)
    store.append(*(x[:, :832] for x in qkv[1:]))
    store.settle()
    for file in disk._files:
        os.ftruncate(file.fileno(), 100)
    out, token = torch.empty(K, 8, D), torch.arange(400, 408)[None]
    with pytest.raises(OSError, match="was cut"):
        store.view()[0].gather(token, slice(None), out)


def test_what_never_came_is_not_taken_for_there(monkeypatch):
    plan, qkv = plan_of(), inputs(900)
    store = OffloadedStore(placement(plan))
    store.append(*(x[:, :896] for x in qkv[1:]))
    store.settle()
    keys, token, out = store.view()[0], torch.arange(200, 264)[None], torch.empty(K, 64, D)
    read = store._tiers.read
    monkeypatch.setattr(store._tiers, "read", lambda *args: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        keys.gather(token, slice(None), out)
    monkeypatch.setattr(store._tiers, "read", read)
    assert torch.equal(keys.gather(token, slice(None), out), qkv[1][:, 200:264])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), per_head=st.booleans(), policy=st.sampled_from(POLICIES))
def test_rows_are_those_that_were_appended(data, per_head, policy):
    """Any tokens, in any order, of any heads, from caches that hold a few units only."""
    place = Placement(8, per_head, 16, 64, PAGE_TOK, 16 + 64 + PAGE_TOK + data.draw(st.sampled_from([8, 16, 48])), policy=policy)
    store, (_, k, v) = OffloadedStore(place), inputs(400)
    for begin, end in ((0, 5), (5, 200), (200, 201), (201, 400)):
        store.append(k[:, begin:end], v[:, begin:end])
        if data.draw(st.booleans()):
            store.settle()
    for _ in range(4):
        heads = data.draw(st.sampled_from([slice(None), slice(0, 1), slice(1, 2)]))
        all_heads = len(range(*heads.indices(K)))
        rows = data.draw(st.sampled_from([1, all_heads]))
        token = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 399), min_size=6, max_size=6), min_size=rows, max_size=rows)))
        for x, whole in zip(store.view(), (k, v), strict=True):
            expected = whole[heads].gather(1, token.expand(all_heads, -1)[..., None].expand(-1, -1, D))
            if not isinstance(x, torch.Tensor):
                assert torch.equal(x.gather(token, heads, torch.empty(all_heads, 6, D)), expected)
                begin, end = sorted(data.draw(st.tuples(st.integers(0, 400), st.integers(0, 400))))
                assert torch.equal(x.run(begin, end), whole[:, begin:end])


@pytest.mark.parametrize("per_head", [False, True])
def test_what_is_expected_is_read_in_the_background(per_head):
    """Once, whoever asks for it finds it, and what nobody expected is fetched as ever."""
    ahead, (_, k, v) = ThreadPoolExecutor(1), inputs(900)
    store = OffloadedStore(Placement(8, per_head, 16, 64, PAGE_TOK, 16 + 64 + PAGE_TOK + 256), ahead=ahead)
    store.append(k, v)
    store.settle()
    starts, counts = torch.tensor([[16, 64, 320, 800, 880]]), torch.tensor([4])  # 880: on the device, and does not count
    if per_head:
        starts, counts = torch.cat([starts, starts + 16]), torch.tensor([4, 4])
    store.expect(starts, counts, 16)
    store.wait()
    fetched = store.traffic.counts["prefill", "ahead"]
    assert fetched.h2d_bytes == 8 * K * 8 * D * 4
    for begin in (320, 64, 400):
        token = torch.arange(begin, begin + 16)[None]
        if per_head:
            token = torch.cat([token, token + 16])
        out = store.view()[0].by("2").gather(token, slice(None), torch.empty(K, 16, D))
        assert torch.equal(out, k.gather(1, token.expand(K, -1)[..., None].expand(-1, -1, D)))
    asked = store.traffic.counts["prefill", "2"]
    assert asked.misses == 6 * (K if per_head else 1) and asked.h2d_bytes == 2 * K * 8 * D * 4  # of the third place alone
    store.expect(starts, counts - 2, 16)  # 16 to 32, where nobody was yet
    store.wait()
    assert fetched.h2d_bytes == (8 + 2) * K * 8 * D * 4
    store.close()
    assert not any(thread.is_alive() for thread in ahead._threads)


def test_what_fails_in_the_background_fails_for_whoever_needs_it(monkeypatch):
    store, (_, k, v) = OffloadedStore(placement(plan_of()), ahead=ThreadPoolExecutor(1)), inputs(900)
    store.append(k, v)
    store.settle()
    read = store._tiers.read
    monkeypatch.setattr(store._tiers, "read", lambda *args: (_ for _ in ()).throw(OSError("gone")))
    store.expect(torch.tensor([[320]]), torch.tensor([1]), 16)
    store.wait()
    monkeypatch.setattr(store._tiers, "read", read)
    keys, out = store.view()[0], torch.empty(K, 8, D)
    with pytest.raises(OSError, match="gone"):
        keys.gather(torch.arange(320, 328)[None], slice(None), out)
    assert torch.equal(keys.gather(torch.arange(320, 328)[None], slice(None), out), k[:, 320:328])  # it is not asked for ever again
    store.close()


def test_nobody_writes_while_units_are_read_in_the_background(monkeypatch):
    """Host memory may move when it grows."""
    ahead, (_, k, v) = ThreadPoolExecutor(1), inputs(900)
    store, order, reading, go_on = OffloadedStore(placement(plan_of()), ahead=ahead), [], threading.Event(), threading.Event()
    store.append(k[:, :832], v[:, :832])
    store.settle()
    read, write = store._tiers.read, store._tiers.write

    def slow(*args):
        reading.set()
        go_on.wait(10)
        order.append("read")
        return read(*args)

    monkeypatch.setattr(store._tiers, "read", slow)
    monkeypatch.setattr(store._tiers, "write", lambda *args: (order.append("written"), write(*args))[1])
    store.expect(torch.tensor([[320]]), torch.tensor([1]), 16)
    assert reading.wait(10)
    threading.Timer(0.2, go_on.set).start()
    store.append(k[:, 832:], v[:, 832:])
    assert order == ["read", "written"]
    store.close()


def test_closing_gives_everything_back(tmp_path):
    plan, qkv = plan_of(), inputs(900)
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        store = OffloadedStore(placement(plan, host_tok=PAGE_TOK), Disk(tmp_path))
        attend(plan, store, qkv, 880, 192)
        store.close()
        store.close()
        assert store.bytes == store.host_bytes == store.disk_bytes == 0
    assert len(os.listdir("/proc/self/fd")) == open_files and os.listdir(tmp_path) == []


def test_without_room_for_a_unit_there_is_no_store():
    place = placement(plan_of())
    with pytest.raises(ValueError, match="leaves no room for a unit of 8 tokens"):
        OffloadedStore(dataclasses.replace(place, device_tok=16 + 128 + PAGE_TOK + 7))


def test_an_empty_store_has_nothing_to_view():
    with pytest.raises(ValueError, match="the store is empty"):
        OffloadedStore(placement(plan_of())).view()
