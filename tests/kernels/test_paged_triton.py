"""Triton kernels that find keys and values through a table, beside the same kernels on tensors: bit for bit."""

from math import prod

import pytest
import torch
from hipexp_kernels import attend_blocks, score_chunks, summarize
from hipexp_kernels.paged import in_parts
from hipexp_kernels.rope import ScoreRotation
from hipexp_kernels.summarize import Summaries

import triton_device
from scattered import Scattered
from test_attend_blocks_triton import MODES, PREFILL, call, on_device, rotation
from test_score_chunks_triton import make, moved
from test_score_chunks_triton import rotation as score_rotation
from triton_device import DTYPES

pytestmark = triton_device.needs_triton

CACHES = [dict(unit=8, per_head=False), dict(unit=4, per_head=True)]


def attend(arguments, mode, cache, begin=None, rotary=None, softcap=None):
    """Attend on tensors and on pages, compare, and return the pages of keys."""
    turn = rotation(arguments, mode, rotary)
    arguments = triton_device.on_device(arguments)
    T, Q, first = arguments["k"].shape[1], arguments["q"].shape[2], arguments["first"]
    begin = max(1, int(first.min()) - arguments["window_tok"] + 1) if begin is None else begin
    more = dict(rotation=turn and on_device(turn), softcap=softcap, impl="triton")
    expected = attend_blocks(**arguments, **more)
    k, v = (Scattered(arguments[x], at, sink=arguments["sink_tok"], begin=begin, **cache) for at, x in enumerate("kv"))
    actual = attend_blocks(**arguments | dict(k=k, v=v), **more)
    rows = first[:, None] + torch.arange(Q, device=first.device) < T
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine[:, rows], theirs[:, rows])
    return k


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [dict(G=4), PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("cache", CACHES, ids=["shared", "per head"])
def test_attention_in_all_modes(mode, shape, cache, dtype):
    attend(call(**shape, dtype=dtype), mode, cache, begin=100)


@pytest.mark.parametrize("mode", [None, "streaming", "infllm"])
@pytest.mark.parametrize("shape", [dict(first=(70, 149)), PREFILL], ids=["decode", "prefill"])
def test_blocks_that_attend_to_everything(mode, shape):
    attend(call(**shape, exact=(0, 1)), mode, CACHES[0])


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES, ids=["shared", "per head"])
@pytest.mark.parametrize("shape", [dict(), dict(Q=5, first=(3, 140))], ids=["decode", "prefill"])
def test_lists_of_heads(cache, shape):
    for K, G in ((3, 1), (1, 16), (2, 3)):
        attend(call(K=K, G=G, S=K, **shape), "streaming", cache, begin=64)


@pytest.mark.parametrize("sizes", [(0, 1), pytest.param((8, 200), marks=pytest.mark.slow)])
@pytest.mark.parametrize("Q", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_sinks_windows_and_units_of_all_sizes(sizes, Q):
    """Selected blocks that do not lie on the grid of units, no sinks, a window that reaches back to the first token."""
    sink, window = sizes
    for unit, begin in ((1, 40), (8, 118), (16, 16)):
        shape = dict(block=4, sink=sink, window=window, Q=Q, first=(5, 119), T=122)
        attend(call(**shape), "streaming", dict(unit=unit, per_head=False), begin)


@pytest.mark.parametrize(("D", "rotary"), [(16, None), (80, 32), (128, None)])
@pytest.mark.parametrize("shape", [dict(), dict(Q=8, first=(96, 144))], ids=["decode", "prefill"])
def test_head_dimensions(D, rotary, shape):
    attend(call(D=D, M=3, **shape), "streaming", CACHES[0], rotary=rotary, softcap=2.0)


@pytest.mark.parametrize("Q", [1, 16])
@pytest.mark.parametrize(("room", "past"), [(20, False), (3, True)])
def test_query_blocks_that_do_not_fit_at_once_follow_each_other(Q, room, past):
    keys = attend(call(Q=Q, first=(80, 96, 112, 128), M=6, window=16), "streaming", dict(unit=8, per_head=False, room=room), begin=112)
    assert keys.parts > 1 and (keys.past > 0) == past


def test_many_keys_in_several_splits():
    attend(call(S=2, M=24, sink=16, T=400, first=(399,)), "streaming", CACHES[1])
    attend(call(block=4, K=1, G=1, Q=40, first=(40, 117)), "dynamic", CACHES[1])


def score(arguments, turn, cache, begin=None):
    arguments, turn = moved(arguments, turn)
    k = Scattered(arguments["k"], 0, begin=arguments["k"].shape[1] * 2 // 3 if begin is None else begin, **cache)
    expected = score_chunks(**arguments, rotation=turn, impl="triton")
    actual = score_chunks(**arguments | dict(k=k), rotation=turn, impl="triton")
    assert torch.equal(actual, expected)
    return k


@pytest.mark.parametrize("mode", [None, *ScoreRotation.MODES])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("representative", ["grid", "exact"])
def test_scores_in_all_modes(mode, rows, representative):
    arguments = make(R=rows, representative=representative, T=190, chunk=32)
    score(arguments, score_rotation(arguments, mode), dict(unit=8, per_head=False, sink=8))


@pytest.mark.parametrize("lists", [pytest.param(dict(S=1), marks=pytest.mark.slow), dict(S=2), dict(shared=True)])
@pytest.mark.parametrize("per_head", [False, True])
def test_scores_of_lists(lists, per_head):
    for C in (6, 40):
        arguments = make(R=2, C=C, chunk=4, representative="exact", **lists)
        score(arguments, score_rotation(arguments, "rank"), dict(unit=2, per_head=per_head, sink=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [40, 128])
def test_scores_of_formats_and_dimensions(dtype, D):
    arguments = make(R=2, D=D, representative="exact")
    arguments["k"] = arguments["k"].to(dtype)
    score(arguments, score_rotation(arguments, "native", rotary=16), dict(unit=1, per_head=False, sink=3))


@pytest.mark.parametrize("mode", [None, pytest.param("rank", marks=pytest.mark.slow)])
@pytest.mark.parametrize("representative", ["grid", pytest.param("exact", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("room", "past"), [pytest.param(30, False, marks=pytest.mark.slow), (2, True)])
def test_chunks_that_do_not_fit_at_once_follow_each_other(mode, representative, room, past, monkeypatch):
    """Parts of a list, and of a tile the query blocks; several tiles to a program."""
    from hipexp_kernels.score_chunks import triton as kernels

    few = dict(keys=16, tiles=2, columns=16)
    for name in ("SCAN", "SCAN_BEFORE_HOPPER", "ONE_ROW_OF_KEYS"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name) | few)
    monkeypatch.setattr(kernels, "gpu", lambda device: (1, True))
    monkeypatch.setattr(kernels, "PROGRAMS_PER_SM", 1)
    for rows, shared in ((1, True), (5, False)):
        arguments = make(N=3, G=4, R=rows, C=23, T=700, chunk=16, shared=shared, representative=representative)
        arguments["limits"] += 300
        keys = score(arguments, score_rotation(arguments, mode), dict(unit=8, per_head=False, sink=8, room=room))
        assert keys.parts > 1 and (keys.past > 0) == past


@pytest.mark.device
@pytest.mark.parametrize("cache", [dict(unit=8, per_head=False), dict(unit=8, per_head=True)], ids=["shared", "per head"])
def test_a_step_of_a_common_model(cache):
    """Its heads, chunks and number format: the scan of one query row, and the attention that is built for one query."""
    S, sizes = (2 if cache["per_head"] else 1), dict(K=2, G=4, D=128, dtype=DTYPES[-1])
    attend(call(**sizes, S=S, T=700, first=(699,), M=32, block=8, sink=16, window=256), "streaming", cache)
    arguments = make(**{name: sizes[name] for name in "KGD"}, S=S, R=1, N=1, C=40, T=700, chunk=8, representative="exact")
    arguments["k"] = arguments["k"].to(DTYPES[-1])
    score(arguments, score_rotation(arguments, "relative"), cache | dict(sink=16))


def test_only_units_that_are_probed_are_brought():
    """A grid of 16 probes of a chunk brings 16 units of 32; landmarks bring none."""
    arguments = make(K=1, N=1, C=1, T=300, chunk=256, representative="grid")
    arguments |= dict(starts=torch.tensor([[[16]]]), limits=torch.tensor([290]))
    for room in (16, 15):
        keys = score(arguments, None, dict(unit=8, per_head=False, sink=0, room=room), begin=288)
        assert (keys.parts, keys.past) == (1, 16 - room)
    landmarks = Summaries(summarize(arguments["k"][:, 16:], piece_tok=64), 64)
    arguments |= dict(representative="bounds", summaries=landmarks)
    assert score(arguments, None, dict(unit=8, per_head=False, sink=0), begin=288).parts == 0


@pytest.mark.parametrize(("sizes", "room"), [((7, 3), 100), ((7, 3), 3), ((7, 3), 1), ((1,), 1), ((5,), 2)])
def test_parts_are_a_whole_and_in_order(sizes, room):
    def volume(part):
        return prod(end - begin for begin, end in part)

    parts = [part for part, _ in in_parts(sizes, lambda part, past: True if past or volume(part) <= room else None)]
    seen = torch.zeros(sizes, dtype=torch.int64)
    for part in parts:
        seen[tuple(slice(*ends) for ends in part)] += 1
    assert (seen == 1).all() and parts == sorted(parts) and all(volume(part) <= room for part in parts)
