"""The generation loop: same tokens however the prompt is fed."""

import dataclasses

import pytest
import torch
from hipexp_kernels import score_chunks
from transformers import DynamicCache

from hipexp.attention.methods import hip
from hipexp.config.schema import Representative
from hipexp.hf import Generation, generate, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.loop import decode


def run(loaded, prompts, chunk, n=24, **kwargs):
    return generate(loaded, prompts, max_new_tok=n, prefill_chunk_tok=chunk, **kwargs)


def test_dense_gives_the_same_tokens_for_any_chunk_alone_and_in_a_batch(loaded, tokens):
    same_tokens_for_any_chunk_alone_and_in_a_batch(loaded, None, tokens)


def test_pipelines_give_the_same_tokens_for_any_chunk_alone_and_in_a_batch(loaded, any_pipeline, tokens):
    same_tokens_for_any_chunk_alone_and_in_a_batch(loaded, any_pipeline, tokens)


def same_tokens_for_any_chunk_alone_and_in_a_batch(loaded, pipeline, tokens):
    prompts = [tokens[:1000], tokens[3:1400], tokens[5:600], tokens[:40]]
    with install(loaded.model, pipeline):
        alone = [[run(loaded, [p], chunk)[0].tokens for chunk in (64, 192, 8192)] for p in prompts]
        together = [result.tokens for result in run(loaded, prompts, 128)]
    for each, batched in zip(alone, together, strict=True):
        assert each == [batched] * 3 and len(batched) == 24


@pytest.mark.parametrize("length", [961, 1025])
def test_a_last_chunk_of_one_token_is_still_prefill(loaded, pipeline, tokens, length):
    """1 more than 15 or 16 times 64: with some chunk sizes the last token of the prompt comes alone, like a decode step."""
    prompts = [tokens[:length], tokens[3:600]]
    with install(loaded.model, pipeline):
        alone = [run(loaded, [prompts[0]], chunk)[0].tokens for chunk in (64, 192, 320, 8192)]
        together = run(loaded, prompts, 64)[0].tokens
        assert alone == [together] * 4 and len(together) == 24
        last = [prefilled(loaded, prompts[0], chunk) for chunk in (64, 192, 320, 8192)]
    for cache, logits in last:
        assert torch.allclose(logits, last[-1][1], atol=1e-4)
        assert all(row.memory.step == 0 for layer in cache.layers for row in layer.rows)


@torch.inference_mode()
def test_more_text_after_decode_steps_is_a_prefill_of_its_own(loaded, pipeline, tokens):
    """What was selected before the second turn knows nothing of it: the next step starts from all candidates."""
    with install(loaded.model, pipeline):
        cache, _ = prefilled(loaded, tokens[:1024], 1024)
        states = [row for layer in cache.layers for row in layer.rows]
        for at in range(1024, 1088):
            with SequenceCache.of([cache]) as step:
                loaded.model(torch.tensor([tokens[at : at + 1]]), position_ids=torch.tensor([[at]]), past_key_values=step)
        assert all(state.memory.step == 64 and state.memory.lists for state in states)
        loaded.model(torch.tensor([tokens[1088:1300]]), position_ids=torch.arange(1088, 1300)[None], past_key_values=cache)
        assert all(state.memory.step == 0 and not state.memory.lists for state in states)


@torch.inference_mode()
def prefilled(loaded, prompt, chunk):
    """The cache after a prompt, and the logits of its last token."""
    cache, ids = SequenceCache(loaded.n_layers, decoding=False), torch.tensor([prompt])
    for part in ids.split(chunk, 1):
        positions = torch.arange(cache.get_seq_length(), cache.get_seq_length() + part.shape[1])[None]
        logits = loaded.model(part, position_ids=positions, past_key_values=cache, use_cache=True).logits[0, -1]
    return cache, logits


def test_a_chunk_that_cuts_a_query_block_is_refused(loaded, pipeline, tokens):
    with (
        install(loaded.model, pipeline),
        pytest.raises(ValueError, match=r"begins at token 100 .* inside a query block; .* by multiples of 64"),
    ):
        run(loaded, [tokens[:300]], 100)


def test_decode_steps_refresh_stages_as_scheduled(loaded, pipeline, tokens, monkeypatch):
    """Refresh 16/8/4: of nine steps the first runs three stages, the fifth one and the ninth two, in each of four layers."""
    scored = []
    monkeypatch.setattr(hip, "score_chunks", lambda *args, **kwargs: scored.append(1) or score_chunks(*args, **kwargs))
    with install(loaded.model, pipeline):
        cache, _ = prefilled(loaded, tokens[:900], 8192)
        scored.clear()
        out = [Generation()]
        with torch.inference_mode():
            decode(loaded.model, [cache], [5], out, 10, set())
    assert len(out[0].decode_ms) == 9 and len(scored) == (3 + 1 + 2) * 4
    assert [row.memory.step for layer in cache.layers for row in layer.rows] == [9] * 4


def test_exact_is_said_of_every_sequence_by_itself(loaded, pipeline, tokens):
    with install(loaded.model, pipeline):
        assert [result.exact for result in run(loaded, [tokens[:40], tokens[:900], tokens[:200]], 64, n=2)] == [True, False, True]
        assert run(loaded, [tokens[:40]], 64, n=2)[0].exact
        assert [result.exact for result in run(loaded, [tokens[:270]], 64, n=2)] == [False], "a decode step counts too"


def test_dense_agrees_with_generate_of_transformers(loaded, tokens):
    with torch.inference_mode():
        expected = loaded.model.generate(torch.tensor([tokens[:300]]), max_new_tokens=24, do_sample=False)[0, 300:].tolist()
    with install(loaded.model, None):
        assert run(loaded, [tokens[:300]], 64)[0].tokens == expected


def test_stop_tokens_end_a_sequence_but_not_the_batch(loaded, pipeline, tokens):
    prompts = [tokens[:600], tokens[5:700]]
    with install(loaded.model, pipeline):
        free = run(loaded, prompts, 128)
        stop = free[0].tokens[5]
        stopped = run(loaded, prompts, 128, stop_ids={stop})
    assert stopped[0].tokens == free[0].tokens[: free[0].tokens.index(stop)] and stopped[0].stopped
    assert len(stopped[1].tokens) == [*free[1].tokens, stop].index(stop)
    assert not stopped[0].exact


def test_what_is_measured(loaded, pipeline, tokens):
    seen = []
    with install(loaded.model, pipeline):
        result = run(loaded, [tokens[:200]], 64, n=5, progress=seen.append)[0]
    assert seen == [64, 64, 64, 8] and len(result.decode_ms) == 4 and result.prefill_ms > 0
    assert result.exact and result.cache_bytes == 4 * 2 * 2 * 205 * 16 * 4


def test_summaries_and_what_decode_holds_are_counted(loaded, pipeline, tokens):
    pipeline.stages[0].representative = Representative.bounds
    with install(loaded.model, pipeline):
        result = run(loaded, [tokens[:1000]], 8192, n=5)[0]
    pieces = (1000 - 16) // 64
    held = 2 * (16 + 128) + 128 + 32  # sinks and final selection with their values; the window's keys, and room for a quarter more
    assert result.cache_bytes == 4 * 2 * (2 * 1005 + 2 * pieces + held) * 16 * 4


def test_logits_that_are_not_finite_are_an_error(loaded, pipeline, tokens):
    weight = loaded.model.model.norm.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = float("nan")
        with install(loaded.model, pipeline), pytest.raises(FloatingPointError, match="not finite"):
            run(loaded, [tokens[:80]], 64)
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_an_empty_prompt_is_refused(loaded):
    with pytest.raises(ValueError, match="at least one token"):
        run(loaded, [[]], 64)


@torch.inference_mode()
def test_a_prompt_of_one_token_through_transformers(loaded, pipeline):
    """The single token of the prompt is prefill, the four that follow the first new one are decode steps."""
    with install(loaded.model, pipeline):
        cache = SequenceCache(loaded.n_layers)
        loaded.model.generate(torch.tensor([[5]]), past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert {row.memory.step for layer in cache.layers for row in layer.rows} == {4}


@torch.inference_mode()
def test_another_cache_is_ours_with_a_refresh_at_every_step(loaded, pipeline, tokens):
    every = dataclasses.replace(pipeline, stages=[dataclasses.replace(stage, refresh_steps=1) for stage in pipeline.stages])
    with install(loaded.model, every):
        ids = torch.tensor([tokens[:640]])
        out = loaded.model.generate(ids, past_key_values=DynamicCache(config=loaded.model.config), max_new_tokens=12, do_sample=False)
        assert out[0, 640:].tolist() == run(loaded, [tokens[:640]], 8192, 12)[0].tokens


def test_no_answer_begins_with_what_is_ruled_out(loaded, tokens):
    with install(loaded.model, None):
        (plain,) = run(loaded, [tokens[:100]], 64, 3)
        (other,) = run(loaded, [tokens[:100]], 64, 3, not_first={plain.tokens[0]})
    assert other.tokens[0] != plain.tokens[0]
