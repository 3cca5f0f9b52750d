"""The generation loop: same tokens however the prompt is fed."""

import pytest
import torch

from hipexp.hf import generate, install


def run(loaded, prompts, chunk, n=24, **kwargs):
    return generate(loaded, prompts, max_new_tok=n, prefill_chunk_tok=chunk, **kwargs)


@pytest.mark.parametrize("dense", [True, False])
def test_same_tokens_for_any_chunk_alone_and_in_a_batch(loaded, pipeline, tokens, dense):
    prompts = [tokens[:1000], tokens[3:1400], tokens[5:600], tokens[:40]]
    with install(loaded.model, None if dense else pipeline):
        alone = [[run(loaded, [p], chunk)[0].tokens for chunk in (64, 192, 8192)] for p in prompts]
        together = [result.tokens for result in run(loaded, prompts, 128)]
    for each, batched in zip(alone, together, strict=True):
        assert each == [batched] * 3 and len(batched) == 24


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
    assert result.exact and result.cache_bytes >= 4 * 2 * 2 * 204 * 16 * 4


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
