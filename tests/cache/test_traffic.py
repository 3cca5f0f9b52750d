"""Counts of traffic: they add up by layer, phase and reader, and samples to a summary."""

from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipexp.cache.traffic import Traffic, TrafficLog, summarize, summed

NONE = asdict(Traffic())
COUNTS = st.builds(Traffic, **{f.name: st.integers(0, 1 << 40) for f in fields(Traffic)})
ROWS = st.lists(
    st.builds(
        lambda layer, phase, by, counts: {"layer": layer, "phase": phase, "by": by, **asdict(counts)},
        st.integers(0, 2), st.sampled_from(["prefill", "decode"]), st.sampled_from(["0", "1", "10", "attend", "write"]), COUNTS,
    ),
    max_size=12,
)  # fmt: skip


def row(layer=0, phase="decode", by="attend", **counts):
    return {"layer": layer, "phase": phase, "by": by, **NONE, **counts}


def test_a_log_counts_each_reader_of_a_phase_by_itself():
    log = TrafficLog()
    log.of("prefill", "0").hits += 2
    log.of("decode", "0").misses += 3
    log.of("prefill", "0").hits += 5
    log.of("decode", "write").d2h_bytes += 64
    assert list(log.rows(4)) == [row(4, "prefill", "0", hits=7), row(4, by="0", misses=3), row(4, by="write", d2h_bytes=64)]
    assert list(TrafficLog().rows(0)) == []


def test_what_is_added_is_not_changed():
    one, other = Traffic(*range(1, 9)), Traffic(*range(10, 90, 10))
    one.add(other)
    assert (list(asdict(one).values()), list(asdict(other).values())) == ([11, 22, 33, 44, 55, 66, 77, 88], list(range(10, 90, 10)))


@pytest.mark.parametrize(("hits", "misses", "ratio"), [(0, 0, None), (0, 4, 0.0), (3, 1, 0.75), (2, 0, 1.0)])
def test_the_ratio_is_of_what_was_asked_for(hits, misses, ratio):
    assert Traffic(hits, misses).hit_ratio == ratio


@given(ROWS)
def test_sums_lose_nothing(rows):
    whole = asdict(summed(rows)[()]) if rows else NONE
    assert whole == {name: sum(row[name] for row in rows) for name in NONE}
    for keys in (["layer"], ["phase", "by"], ["layer", "phase", "by"]):
        parts = summed(rows, *keys)
        assert set(parts) == {tuple(row[key] for key in keys) for row in rows}
        assert {name: sum(getattr(part, name) for part in parts.values()) for name in NONE} == whole


@given(st.lists(ROWS, max_size=3))
def test_a_summary_has_the_same_totals_at_every_level(samples):
    told = summarize([{"rows": rows, "steps": 2} for rows in samples])
    if not samples:
        assert told == {}
        return
    places = [(row["layer"], row["phase"], row["by"]) for row in told["rows"]]
    assert len(set(places)) == len(places)
    for phase in ("prefill", "decode"):
        for name in NONE:
            total = sum(row[name] for rows in samples for row in rows if row["phase"] == phase)
            assert told[phase][name] == total
            assert sum(row[name] for row in told["rows"] if row["phase"] == phase) == total
            assert sum(row[name] for row in told["by"] if row["phase"] == phase) == total


def test_a_summary_by_hand():
    first = {"rows": [row(0, "prefill", "write", d2h_bytes=96), row(0, hits=3, misses=1, h2d_bytes=40)], "steps": 3, "host_bytes": 96}
    second = {
        "rows": [row(1, hits=1, misses=3, h2d_bytes=120), row(1, by="write", d2h_bytes=8)],
        "steps": 5,
        "host_bytes": 7,
        "disk_bytes": 5,
    }
    told = summarize([first, {}, second])
    assert told["rows"] == [first["rows"][0], first["rows"][1], *second["rows"]]
    assert [(r["phase"], r["by"], r["hit_ratio"]) for r in told["by"]] == [
        ("prefill", "write", None),
        ("decode", "attend", 0.5),
        ("decode", "write", None),
    ]
    decode = {"steps": 8, "hit_ratio": 0.5, "h2d_bytes_per_step": 20, "d2h_bytes_per_step": 1}
    assert told["decode"] == NONE | {"hits": 4, "misses": 4, "h2d_bytes": 160, "d2h_bytes": 8} | decode
    assert told["prefill"] == NONE | {"d2h_bytes": 96, "hit_ratio": None}
    assert (told["host_bytes"], told["disk_bytes"]) == (96, 5)  # the most of a sample, as they follow each other


def test_what_never_decoded_has_nothing_per_step():
    decode = summarize([{"rows": [row(phase="prefill", misses=1, h2d_bytes=9)], "steps": 0}])["decode"]
    assert (decode["steps"], decode["h2d_bytes_per_step"], decode["d2h_bytes_per_step"]) == (0, None, None)


@pytest.mark.parametrize("samples", [[], [{}], [{}, {}]])
def test_what_is_resident_has_no_traffic(samples):
    assert summarize(samples) == {}


def test_readers_stand_in_the_order_of_the_work():
    rows = [row(phase=phase, by=by) for phase in ("decode", "prefill") for by in ("write", "10", "attend", "2", "summarize", "0")]
    ordered = ["0", "2", "10", "attend", "summarize", "write"]
    told = summarize([{"rows": rows, "steps": 1}])["by"]
    assert [(r["phase"], r["by"]) for r in told] == [(phase, by) for phase in ("prefill", "decode") for by in ordered]
