"""Traces of a whole model: the run is as without one, and what is written fits it."""

import pytest

from hipexp.cache.traces import TraceReader
from hipexp.config.schema import ConfigError, Heads
from hipexp.hf import Loaded, generate, install
from hipexp.hf.families import FAMILIES, make
from hipexp.hf.trace import record

STEPS = 20


def traced(loaded, pipeline, tokens, path, phases=("decode",)):
    made = record(
        loaded, pipeline, tokens[:900], path, steps=STEPS, phases=phases, prefill_chunk_tok=256, about={"model": "tiny"},
    )  # fmt: skip
    return made, TraceReader(path)


def test_a_recorded_run_says_the_same(loaded, pipeline, tokens, tmp_path):
    made, reader = traced(loaded, pipeline, tokens, tmp_path / "a")
    with install(loaded.model, pipeline) as installed:
        (plain,) = generate(loaded, [tokens[:900]], max_new_tok=STEPS + 1, prefill_chunk_tok=256)
        assert all(layer.listener is None for layer in installed.layers.values())
    assert made.tokens == plain.tokens and len(made.decode_ms) == STEPS
    reads = list(reader)
    assert {(read.phase, read.position) for read in reads} == {("decode", 900 + i) for i in range(STEPS)}
    units = reader.header.layers
    assert set(units) == {0, 1, 2, 3} and (units[0].unit_tok, units[0].lists, units[0].unit_bytes) == (8, 1, 8 * 2 * 16 * 4)
    for layer in units:
        mine = [read for read in reads if read.layer == layer]
        assert [read.by for read in mine[:4]] == ["0", "1", "2", "attend"]
        assert sum(read.by in ("attend", "reuse") for read in mine) == STEPS
        assert all(16 // 8 <= unit < 920 // 8 for read in mine for listed in read.lists for unit in listed)
        assert 128 // 8 - 4 < max(len(read.lists[0]) for read in mine if read.by == "attend") <= 128 // 8


def test_prefill_and_lists_by_head(loaded, pipeline, tokens, tmp_path):
    pipeline.heads = Heads.per_kv
    _, reader = traced(loaded, pipeline, tokens, tmp_path / "a", ("prefill", "decode"))
    reads = list(reader)
    assert reader.header.layers[1].lists == 2 and reader.header.layers[1].unit_bytes == 8 * 16 * 4
    blocks = [read for read in reads if (read.phase, read.layer, read.by) == ("prefill", 1, "attend")]
    assert [read.position for read in blocks] == list(range(0, 900, 64)) and {len(read.lists) for read in reads} == {2}
    assert any(read.lists[0] != read.lists[1] for read in blocks)


def test_a_run_that_fails_leaves_a_trace_without_an_end(loaded, pipeline, tokens, tmp_path):
    def stop(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(loaded, pipeline, tokens[:900], tmp_path / "a", steps=1, phases=("prefill",), prefill_chunk_tok=256, about={}, progress=stop)
    with pytest.raises(ConfigError, match=r"ends after \d+ whole reads"):
        list(TraceReader(tmp_path / "a"))


def test_under_longrope_a_recorded_run_has_the_factors_of_its_length(pipeline, tokens, tmp_path):
    """Also in parts of a prompt that end before the original length."""
    model = make(FAMILIES["Phi-3, Phi-4-mini (longrope, partial RoPE)"])
    loaded = Loaded(model, None, 512, 4, "float32")
    common = dict(prefill_chunk_tok=64)
    made = record(loaded, pipeline, tokens[:200], tmp_path / "a", steps=STEPS, phases=("decode",), about={}, **common)
    with install(model, pipeline) as installed:
        (plain,) = generate(loaded, [tokens[:200]], max_new_tok=STEPS + 1, installed=installed, **common)
    assert made.tokens == plain.tokens
