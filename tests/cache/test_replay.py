"""Replays of recorded reads: what is counted, in what."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import synthetic
from hipexp.cache.policies import POLICIES
from hipexp.cache.replay import Tally, by_layer, replay
from hipexp.cache.traces import Header, LayerUnits, Read

ROOT = Path(__file__).parents[2]
ONE = Header({0: LayerUnits(8, 1, 100)})


def attending(lists, layer=0):
    return [Read("decode", i, layer, "attend", (units,)) for i, units in enumerate(lists)]


def test_a_trace_by_hand():
    reads = [
        Read("decode", 0, 0, "0", ([1, 2, 3],)),  # keys of three units
        Read("decode", 0, 0, "attend", ([1, 2],)),  # their keys are there, their values not
        Read("decode", 1, 0, "reuse", ([1, 2],)),
        Read("decode", 2, 0, "0", ([4],)),  # in place of the keys of unit 3, with room for two units
        Read("decode", 2, 0, "attend", ([3],)),
    ]
    layers = by_layer(ONE, reads)
    assert (layers[0].least_tok, layers[0].whole_tok, layers[0].distinct, layers[0].capacity(16)) == (16, 32, 7, 4)
    made = replay(layers, "lru", 16)
    assert dict(made.tallies) == {
        ("decode", "0"): Tally(4, 4, 4, 400, 400),
        ("decode", "attend"): Tally(6, 4, 3, 400, 300),
        ("decode", "reuse"): Tally(4, 0, 0, 0, 0),
    }
    assert dict(made.step_bytes) == {("decode", 0): 500, ("decode", 1): 0, ("decode", 2): 300}
    assert made.steps("decode") == [500, 0, 300] and made.steps("prefill") == []
    total = made.total("decode")
    assert (total.reads, total.missed, total.first, total.hit_ratio, total.best_ratio) == (14, 8, 7, 1 - 8 / 14, 0.5)
    assert made.total("prefill").hit_ratio is None


def test_layers_have_caches_of_their_own_and_are_added_up():
    header = Header({0: LayerUnits(8, 1, 100), 2: LayerUnits(8, 1, 7)})
    layers = by_layer(header, attending([[1], [1]]) + attending([[1], [2]], layer=2))
    made = replay(layers, "lru", 8)
    assert made.steps("decode") == [2 * 100 + 2 * 7, 2 * 7] and made.total("decode").missed == 6


def test_lists_of_heads_are_different_units():
    header = Header({0: LayerUnits(8, 2, 100)})
    layers = by_layer(header, [Read("decode", 0, 0, "attend", ([1], [1, 2])), Read("decode", 1, 0, "attend", ([2], []))])
    assert (layers[0].least_tok, layers[0].distinct, layers[0].capacity(16)) == (16, 8, 8)  # three heads of a unit need two units' room
    assert replay(layers, "lru", 16).total("decode").missed == 8


def test_what_stages_read_is_read_in_parts():
    layers = by_layer(ONE, [Read("prefill", 0, 0, "0", (list(range(10)),)), Read("prefill", 0, 0, "attend", ([0, 9],))])
    made = replay(layers, "lru", 16)
    assert made.total("prefill", "0") == Tally(10, 10, 10, 1000, 1000)
    assert made.total("prefill", "attend") == Tally(4, 3, 2, 300, 200)  # the keys of unit 0 had to go


def test_too_small_a_cache():
    with pytest.raises(ValueError, match="a cache of 8 tokens does not hold the 16 that are attended to at once"):
        replay(by_layer(ONE, attending([[1, 2]])), "lru", 8)


LISTS = st.lists(st.lists(st.integers(0, 12), max_size=9, unique=True).map(sorted), min_size=1, max_size=30)


@given(scored=LISTS, attended=st.lists(st.lists(st.integers(0, 12), max_size=3, unique=True).map(sorted), min_size=1, max_size=30))
def test_whatever_is_read(scored, attended):
    reads = [
        Read("decode", i, 0, by, (units,))
        for i, both in enumerate(zip(scored, attended, strict=False))
        for by, units in zip(("0", "attend"), both, strict=True)
    ]
    layers = by_layer(ONE, reads)
    made = {(size, name): replay(layers, name, size).total("decode") for size in (24, 32, 64, 104) for name in POLICIES}
    for (size, _), total in made.items():
        assert total.reads == sum(len(r.lists[0]) * (2 if r.by == "attend" else 1) for r in reads)
        assert layers[0].distinct == total.first <= total.missed <= total.reads
        assert made[size, "belady"].missed <= total.missed
        assert size < layers[0].whole_tok or total.missed == total.first
    by_size = [made[size, "lru"].missed for size in (24, 32, 64, 104)]
    assert by_size == sorted(by_size, reverse=True)


def test_a_loop_is_the_worst_for_lru_and_drift_is_not():
    loop = by_layer(ONE, attending(synthetic.looping(50, 12, 3)))
    assert replay(loop, "lru", 72).total("decode").hit_ratio == 0 < replay(loop, "belady", 72).total("decode").hit_ratio
    drift = by_layer(ONE, attending(synthetic.drifting(50, 100, 20)))
    assert all(replay(drift, name, 240).total("decode").hit_ratio > 0.8 for name in POLICIES)


def test_progress_tells_of_every_read():
    told = []
    replay(by_layer(ONE, attending([[1, 2], [3]])), "clock", 16, told.append)
    assert sum(told) == 6


def test_no_torch_is_needed():
    code = "import sys; import hipexp.cache.replay; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
