"""Generation with keys and values off the device: the tokens of a resident cache, counted traffic, nothing left behind."""

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.cache.traffic import summed
from hipexp.config.offload import POLICIES
from hipexp.config.schema import PAGE_TOK, ConfigError, Heads, Offload, Pipeline, Representative
from hipexp.hf import generate, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.loop import prefill, prefill_layer_major

LEAST_TOK = 16 + 128 + 128 + PAGE_TOK  # of the pipeline here: sinks, window, what is kept, a page
LAYERS, TOKEN_BYTES = 4, 2 * 2 * 16 * 4


def made_with(loaded, pipeline, prompts, offload=None, **more):
    with install(loaded.model, pipeline, 512, offload=offload) as installed:
        return generate(loaded, prompts, max_new_tok=24, prefill_chunk_tok=more.pop("prefill_chunk_tok", 256), installed=installed, **more)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_a_resident_cache(loaded, tokens, data):
    pipeline = three_stages()
    pipeline.heads = data.draw(st.sampled_from(Heads))
    for stage in pipeline.stages:
        stage.representative = data.draw(st.sampled_from(Representative))
    offload = Offload(
        "host", device_tok=LEAST_TOK + data.draw(st.sampled_from([0, 8, 200, 4096])), policy=data.draw(st.sampled_from(POLICIES)),
        prefill_bytes=data.draw(st.sampled_from([0, 1 << 30])), prefetch=data.draw(st.booleans()),
    )  # fmt: skip
    prompts = [tokens[: data.draw(st.integers(400, 900))], tokens[100:150]]
    for ours, resident in zip(made_with(loaded, pipeline, prompts, offload), made_with(loaded, pipeline, prompts), strict=True):
        assert ours.tokens == resident.tokens and len(ours.tokens) == 24
        assert resident.traffic == {} and {row["layer"] for row in ours.traffic["rows"]} <= set(range(LAYERS))


def three_stages() -> Pipeline:
    from hipexp.config.schema import Stage

    return Pipeline(stages=[Stage(64, 512, 64, 4, 16), Stage(16, 256, 64, 4, 8), Stage(8, 128, 64, 1, 4)], sink_tok=16, window_tok=128)


def test_a_prompt_read_by_layer_crosses_the_link_once(loaded, pipeline, tokens):
    """At a budget for one layer's keys and values; a byte less, and selected units are fetched chunk by chunk."""
    budget = len(tokens) * TOKEN_BYTES
    (by_layer,) = made_with(loaded, pipeline, [tokens], Offload("host", device_tok=LEAST_TOK, prefill_bytes=budget))
    (by_chunk,) = made_with(loaded, pipeline, [tokens], Offload("host", device_tok=LEAST_TOK, prefill_bytes=budget - 1))
    assert by_layer.tokens == by_chunk.tokens == made_with(loaded, pipeline, [tokens])[0].tokens
    once, often = (summed(made.traffic["rows"], "phase")["prefill",] for made in (by_layer, by_chunk))
    assert once.h2d_bytes == 0 < often.h2d_bytes
    assert once.d2h_bytes == often.d2h_bytes == len(tokens) // PAGE_TOK * PAGE_TOK * TOKEN_BYTES * LAYERS


def test_the_device_holds_what_it_may(loaded, pipeline, tokens):
    (made,) = made_with(loaded, pipeline, [tokens], Offload("host", device_tok=LEAST_TOK))
    summaries_and_tables = LAYERS * (len(tokens) * 4 + 4 * 4096)
    held = LAYERS * 2 * (16 + 128 + 128) * 2 * 16 * 4  # what decode steps hold ready, keys and values
    assert made.cache_bytes < LAYERS * LEAST_TOK * TOKEN_BYTES + summaries_and_tables + held < len(tokens) * TOKEN_BYTES * LAYERS


def test_the_tiers_hold_the_rest(loaded, pipeline, tokens, tmp_path):
    offload = Offload("disk", device_tok=LEAST_TOK, host_tok=4 * PAGE_TOK, disk_dir=str(tmp_path))
    (made,) = made_with(loaded, pipeline, [tokens], offload)
    pages = (len(tokens) + 23) // PAGE_TOK
    assert made.traffic["host_bytes"] == LAYERS * 4 * PAGE_TOK * TOKEN_BYTES
    assert made.traffic["disk_bytes"] == LAYERS * (pages - 4) * PAGE_TOK * TOKEN_BYTES
    assert made.tokens == made_with(loaded, pipeline, [tokens])[0].tokens and os.listdir(tmp_path) == []


def test_a_device_below_the_minimum_is_refused(loaded, pipeline):
    with pytest.raises(ConfigError, match=rf"offload.device_tok={LEAST_TOK - 1} must hold .* at least {LEAST_TOK}"):
        with install(loaded.model, pipeline, 512, offload=Offload("host", device_tok=LEAST_TOK - 1)):
            pass


def test_the_smallest_device_of_a_pipeline_without_stages_works(loaded, tokens):
    streaming = Pipeline(method="streaming", sink_tok=16, window_tok=128)
    offload = Offload("host", device_tok=16 + 128 + PAGE_TOK + 1)
    assert made_with(loaded, streaming, [tokens], offload)[0].tokens == made_with(loaded, streaming, [tokens])[0].tokens


def test_parts_of_a_prompt_are_whole_pages_of_a_lossy_format(loaded, pipeline, tokens):
    """So that what a query sees of a page does not depend on them; of a lossless one they may be anything that is whole blocks."""
    for stage in pipeline.stages:
        stage.query_block_tok = 16
    offload = Offload("host", device_tok=LEAST_TOK, format="fp8")
    with pytest.raises(ConfigError, match=r"model\.prefill_chunk_tok=96 must be whole pages of 64 tokens"):
        made_with(loaded, pipeline, [tokens], offload, prefill_chunk_tok=96)
    answers = {tuple(made_with(loaded, pipeline, [tokens[:700]], offload, prefill_chunk_tok=n)[0].tokens) for n in (64, 192, 704)}
    assert len(answers) == 1
    made_with(loaded, pipeline, [tokens], Offload("host", device_tok=LEAST_TOK), prefill_chunk_tok=96)


def test_everything_is_closed_whatever_one_store_raises(loaded, pipeline, tokens, monkeypatch):
    from hipexp.cache.tiers import Tiers

    closed, close = [], Tiers.close

    def interrupted(tiers: Tiers) -> None:
        close(tiers)
        closed.append(tiers)
        if len(closed) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Tiers, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made_with(loaded, pipeline, [tokens[:500], tokens[100:600]], Offload("host", device_tok=LEAST_TOK, prefetch=True))
    assert len(closed) == 2 * LAYERS


def test_a_full_disk_is_an_error_that_leaves_nothing(loaded, pipeline, tokens, tmp_path):
    offload = Offload("disk", device_tok=LEAST_TOK, host_tok=PAGE_TOK, disk_tok=4 * PAGE_TOK, disk_dir=str(tmp_path))
    gc.collect()
    before = open_files()
    with pytest.raises(OSError, match=r"raise offload\.disk_bytes or offload\.disk_tok"):
        made_with(loaded, pipeline, [tokens], offload)
    assert open_files() == before and os.listdir(tmp_path) == []
    (short,) = made_with(loaded, pipeline, [tokens[:300]], offload)
    assert short.tokens == made_with(loaded, pipeline, [tokens[:300]])[0].tokens


@pytest.mark.parametrize("prefill_bytes", [0, 1 << 30])
def test_a_cancelled_prompt_leaves_nothing(loaded, pipeline, tokens, tmp_path, prefill_bytes):
    offload = Offload("disk", device_tok=LEAST_TOK, host_tok=PAGE_TOK, disk_dir=str(tmp_path), prefill_bytes=prefill_bytes)
    gc.collect()  # what earlier tests left
    before, stores = open_files(), count_stores()

    def cancel(n_tok: int) -> None:
        assert open_files() > before  # it had begun
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_with(loaded, pipeline, [tokens], offload, progress=cancel, prefill_chunk_tok=512)
    gc.collect()
    assert open_files() == before and count_stores() == stores
    assert made_with(loaded, pipeline, [tokens], offload)[0].tokens == made_with(loaded, pipeline, [tokens])[0].tokens


@pytest.mark.slow
def test_many_requests_leave_memory_where_it_was(loaded, pipeline, tokens, tmp_path):
    offload = Offload("disk", device_tok=LEAST_TOK, host_tok=2 * PAGE_TOK, disk_dir=str(tmp_path))
    prompts, levels = [tokens[:700], tokens[200:500]], []
    gc.collect()
    for _ in range(6):
        made_with(loaded, pipeline, prompts, offload)
        gc.collect()
        levels.append((open_files(), count_stores(), resident_bytes()))
    assert len({level[:2] for level in levels}) == 1
    assert levels[-1][2] - levels[2][2] < 3 * 700 * TOKEN_BYTES * LAYERS  # six requests more, and not their keys and values


def test_padding_is_refused(loaded, pipeline, tokens):
    offload = Offload("host", device_tok=LEAST_TOK)
    ids, mask = torch.tensor([tokens[:700]]), torch.ones(1, 700, dtype=torch.int64)
    mask[:, :64] = 0
    with install(loaded.model, pipeline, 512, offload=offload) as installed, torch.inference_mode():
        cache = SequenceCache(LAYERS, decoding=False, new_store=installed.new_sequence())
        loaded.model(ids[:, :448], attention_mask=mask[:, :448], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask\[0\] marks padding, and an offloaded cache"):
            loaded.model(ids[:, 448:], attention_mask=mask, past_key_values=cache)


def test_both_ways_to_read_a_prompt_leave_the_same_behind(loaded, pipeline, tokens):
    pages = []
    with install(loaded.model, pipeline, 512, offload=Offload("host", device_tok=LEAST_TOK)) as installed, torch.inference_mode():
        for read in (prefill, prefill_layer_major):
            cache = SequenceCache(LAYERS, decoding=False, new_store=installed.new_sequence())
            read(loaded.model, cache, tokens, 256)
            stores = [row.store for layer in cache.layers for row in layer.rows]
            pages.append([x.run(0, store.length) for store in stores for x in store.view()])
    assert all(torch.equal(a, b) for a, b in zip(*pages, strict=True))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def count_stores() -> int:
    from hipexp.cache.offloaded import OffloadedStore

    return sum(isinstance(thing, OffloadedStore) for thing in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
