"""``python -m hipexp replay``: a run of the embedded model is recorded and replayed; what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

from hipexp import cli
from hipexp.cache.traces import Header, LayerUnits, Read, TraceWriter
from hipexp.config.schema import ConfigError
from hipexp.run import replay

ROOT = Path(__file__).parents[2]
SMALL = [
    "+pipeline=2stage",
    "pipeline.stages=[{chunk_tok:32,keep_tok:256,query_block_tok:64,query_stride_tok:4,refresh_steps:8},"
    "{chunk_tok:8,keep_tok:128,query_block_tok:32,refresh_steps:4}]",
    "pipeline.sink_tok=32",
    "pipeline.window_tok=64",
    "task=passkey",
    "task.lengths_tok=[900]",
    "task.depths=[0.5]",
]


@pytest.fixture(autouse=True)
def runs(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def trace(tmp_path):
    """Four steps in one layer, by hand."""
    path = tmp_path / "hand.trace.gz"
    with TraceWriter(path, Header({0: LayerUnits(8, 1, 1024)}, {"model": "m", "pipeline": "p", "task": "t", "prompt_tok": 99})) as writer:
        for i, units in enumerate([[4, 5], [4, 5], [6, 7], [4, 5]]):
            if i != 1:
                writer.write(Read("decode", i, 0, "0", (units[:1],)))
            writer.write(Read("decode", i, 0, "reuse" if i == 1 else "attend", (units,)))
    return path


def rows(capsys):
    return json.loads(capsys.readouterr().out)


def test_recorded_and_replayed(capsys):
    assert cli.main(["replay", "record", "phases=[prefill,decode]", "steps=10", *SMALL]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.name.startswith("needle_2stage_") and path.name.endswith(".trace.gz")
    assert cli.main(["replay", str(path)]) == 0
    out = capsys.readouterr().out
    assert "needle, 2stage, passkey passkey@900" in out and "prefill, " in out and "decode, 10 steps: at best " in out
    picture = path.with_name(path.name.replace(".trace.gz", ".png"))
    assert out.splitlines()[-1] == f"picture: {picture}" and matplotlib.image.imread(picture).std() > 0.02
    assert cli.main(["replay", str(path), "sizes=[256,1024]", "policies=belady,lru", "--json"]) == 0
    found = rows(capsys)
    assert [(row["phase"], row["size_tok"], row["policy"]) for row in found] == [
        (phase, size, policy) for phase in ("prefill", "decode") for size in (256, 1024) for policy in ("belady", "lru")
    ]
    belady, lru = ([row for row in found if row["policy"] == name] for name in ("belady", "lru"))
    assert sum(row["missed"] for row in belady[::2]) < sum(row["missed"] for row in lru[::2])
    assert all(row["missed"] == row["first"] for row in found if row["size_tok"] == 1024)  # all of the prompt fits
    decode = lru[2]
    assert decode["steps"] == 10 and set(decode["by"]) == {"0", "1", "attend", "reuse"} and decode["worst_bytes"] >= decode["bytes"] > 0


def test_a_trace_by_hand(trace, capsys):
    assert cli.main(["replay", str(trace), "sizes=16", "policies=lru"]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == [
        "m, p, t, 99 tokens; at most 16 tokens attended to at once, 32 ever read in a layer",
        "decode, 4 steps: at best 57.9 % hits and 2.0 KiB/step, without ever evicting",
        "tokens  policy  hit %  stage 0  new list  used again  KiB/step  again  worst",
        "──────  ──────  ─────  ───────  ────────  ──────────  ────────  ─────  ─────",
        "    16     lru   36.8      0.0      25.0       100.0       3.0    1.0    4.0",
    ]


def test_sizes_that_nobody_named(trace, capsys):
    assert cli.main(["replay", str(trace), "policies=clock", "--json"]) == 0
    assert [row["size_tok"] for row in rows(capsys)] == [16, 24, 32]


def test_a_replay_needs_no_torch(trace):
    code = "import sys; from hipexp.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code, "replay", str(trace)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert trace.with_name("hand.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "replay needs a trace, or the word record: python -m hipexp replay <trace>"),
        (["sizes=16"], "replay needs a trace"),
        (["{trace}", "policy=lru"], "replay: policy=lru is unknown; did you mean policies?"),
        (["{trace}", "policies=lru,mru"], "policies=mru is unknown; did you mean lru?"),
        (["{trace}", "policies=[]"], "policies= names nothing; use some of lru, clock, lfu, belady"),
        (["{trace}", "sizes=0"], "sizes=0 must be a whole number from 1 on"),
        (["{trace}", "sizes=1k"], "sizes=1k must be a whole number"),
        (["{trace}", "sizes=8"], "sizes=8 is too small: 16 tokens are attended to at once in this trace; use 16 or more"),
        (["{trace}", "sizes=20"], "sizes=20 must be a multiple of 8, the tokens of a unit; try 24"),
        (["missing"], "cannot read missing"),
        (["record", *SMALL, "steps=0"], "steps=0 must be a whole number from 1 on"),
        (["record", *SMALL, "phases=train"], "phases=train is unknown"),
        (["record", *SMALL, "phases="], "phases= names nothing; use some of prefill, decode"),
        (["record", *SMALL, "out=no/folder/a"], "out=no/folder/a: there is no folder no/folder; make it first"),
        (["record"], "needs a pipeline with stages, as nothing else chooses what it reads; add [+]pipeline=3stage"),
        (["record", "+pipeline=streaming"], "needs a pipeline with stages"),
        (
            ["record", *SMALL, "offload=host"],
            "offload=host has no place here: a trace says what a resident run reads",
        ),
        (["record", "+pipeline=3stage", "task=latency"], "task=latency has none; use task=passkey"),
        (["record", *SMALL, "pipeline.stages.1.chunk_tok=48"], "chunk_tok=48 must divide"),
    ],
)
def test_refusals(trace, words, message):
    with pytest.raises(ConfigError, match=message):
        replay.main([word.format(trace=trace) if word == "{trace}" else word for word in words])


def test_nothing_was_read(tmp_path):
    with TraceWriter(tmp_path / "a", Header({0: LayerUnits(8, 1, 64)})) as writer:
        writer.write(Read("decode", 0, 0, "attend", ([],)))
    with pytest.raises(ConfigError, match=r"nothing is read in .*: sinks and window hold all of it; record a longer prompt"):
        replay.main([str(tmp_path / "a")])


def test_a_cut_trace_is_never_replayed(trace, capsys):
    trace.write_bytes(trace.read_bytes()[:-3])
    assert cli.main(["replay", str(trace)]) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "is damaged" in streams.err and not trace.with_name("hand.png").exists()
