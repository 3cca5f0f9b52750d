"""Traces: what is written is read, and nothing else."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipexp.cache.traces import Header, LayerUnits, Read, TraceReader, TraceWriter, runs_of, units_of
from hipexp.config.schema import ConfigError

HEADER = Header({0: LayerUnits(8, 1, 4096), 3: LayerUnits(16, 2, 512)}, {"model": "small", "steps": 2})
UNITS = st.lists(st.integers(0, 40), unique=True).map(sorted)
READS = st.builds(
    lambda phase, position, layer, by, lists: Read(phase, position, layer, by, lists if layer else lists[:1]),
    st.sampled_from(["prefill", "decode"]), st.integers(0, 10**7), st.sampled_from([0, 3]), st.sampled_from(["0", "2", "attend", "reuse"]),
    st.tuples(UNITS, UNITS),
)  # fmt: skip
SOME = [Read("decode", 100 + i, 0, by, ([1, 2, 5 + i],)) for i in range(3) for by in ("0", "attend")]


def written(path, reads, header=HEADER):
    with TraceWriter(path, header) as writer:
        for read in reads:
            writer.write(read)
    return path


@pytest.fixture
def path(tmp_path):
    return written(tmp_path / "a.trace.gz", SOME)


@given(reads=st.lists(READS, max_size=8))
def test_what_is_written_is_read(tmp_path_factory, reads):
    reader = TraceReader(written(tmp_path_factory.mktemp("trace") / "a.trace.gz", reads))
    assert (reader.header, list(reader)) == (HEADER, reads)


@given(UNITS)
def test_runs(units):
    runs = runs_of(units)
    assert units_of(runs) == units and len(runs) <= 2 * len(units)


def test_runs_as_documented():
    assert runs_of([3, 4, 9]) == [3, 2, 4, 1] and runs_of([0]) == [0, 1] and runs_of([]) == []


@pytest.mark.parametrize("units", [[3, 3], [4, 2], [-1]])
def test_only_ascending_units(units):
    with pytest.raises(ValueError, match="units ascend"):
        runs_of(units)


@pytest.mark.parametrize("runs", [[1], [0, 0], [1, 1, 0, 1], [-1, 2], [0, 1.0], [True, 1], ["0", 1]])
def test_no_other_runs(runs):
    with pytest.raises(ValueError):
        units_of(runs)


def test_a_trace_is_refused_wherever_it_was_cut(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"is no trace|breaks off|ends after"):
            list(TraceReader(path))


def test_a_cut_trace_says_how_far_it_goes(tmp_path):
    path = written(tmp_path / "long.trace.gz", [Read("decode", 7 * i * i, 0, "attend", ([i, 3 * i + 1],)) for i in range(1, 4000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"long.trace.gz is damaged: after \d{3,} whole reads it breaks off .*; record it again"):
        list(TraceReader(path))


def test_a_changed_byte_is_noticed_or_changes_nothing(path):
    data, noticed = path.read_bytes(), 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        try:
            reader = TraceReader(path)
            assert (reader.header, list(reader)) == (HEADER, SOME)
        except ConfigError:
            noticed += 1
    assert noticed > len(data) - 25  # the rest: the file's name and time, and bits between blocks, which gzip does not read


def test_a_writer_that_fails_leaves_no_end(tmp_path):
    with pytest.raises(RuntimeError), TraceWriter(tmp_path / "a", HEADER) as writer:
        writer.write(SOME[0])
        raise RuntimeError
    with pytest.raises(
        ConfigError, match="it ends after 1 whole reads, without its last line: whoever wrote it was stopped; record it again"
    ):
        list(TraceReader(tmp_path / "a"))


HEAD = {"format": "hipexp-trace", "version": 1, "layers": {"0": {"unit_tok": 8, "lists": 1, "unit_bytes": 64}}, "about": {}}
GOOD = ["decode", 1, 0, "attend", [0, 1]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is no trace; make one with"),
        ([[1]], "is no trace"),
        ([{"format": "other"}], "is no trace"),
        ([HEAD | {"version": 2}], "a trace of version 2, and this hipexp reads 1; record it again"),
        ([HEAD | {"layers": {"0": {"unit_tok": 8}}}], "its header is not complete"),
        ([HEAD | {"layers": {"0": {"unit_tok": 8, "lists": 0, "unit_bytes": 64}}}], "its header is not complete"),
        ([HEAD | {"layers": []}], "its header is not complete"),
        ([HEAD, GOOD, {"reads": 2}], "its end tells of 2 reads, and 1 are there"),
        ([HEAD, GOOD, {"reads": 1}, GOOD], "line 4 is behind its end"),
        ([HEAD, GOOD], "without its last line"),
        *([[HEAD, GOOD, line], "line 3 is no read"] for line in (
            ["train", *GOOD[1:]], ["decode", 1, 4, *GOOD[3:]], ["decode", 1, 0, "last", [0, 1]], ["decode", 1, 0, 2, [0, 1]], GOOD[:4],
            [*GOOD, [0, 1]], ["decode", 1, 0, "attend", [0, 0]], ["decode", 1.5, *GOOD[2:]], 3, None,
        )),
    ],
)  # fmt: skip
def test_damage(tmp_path, lines, message):
    with gzip.open(tmp_path / "a", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(ConfigError, match=message):
        list(TraceReader(tmp_path / "a"))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none \(No such file or directory\); give the path of a trace"):
        TraceReader(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot read"):
        TraceReader(tmp_path)
    (tmp_path / "text").write_text("{}")
    with pytest.raises(ConfigError, match="text is no trace"):
        TraceReader(tmp_path / "text")
