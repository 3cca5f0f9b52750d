"""Longrope: one set of factors for prompts up to the original length, another one beyond it, for as long as a request lasts."""

import pytest
import torch

from hipexp.config.schema import Pipeline, Stage
from hipexp.hf import Loaded, generate, install
from hipexp.hf.families import rope
from hipexp.hf.rotary import turned_layers
from tiny import tiny

ORIGINAL = 128
FACTORS = rope(
    "longrope", short_factor=[1.0] * 8, long_factor=[2.0 + 0.5 * i for i in range(8)], original_max_position_embeddings=ORIGINAL, factor=4.0
)


def phi(**changes):
    return tiny("Phi3Config", sliding_window=None, original_max_position_embeddings=ORIGINAL, **FACTORS, **changes)


@torch.inference_mode()
def logits(model, ids, **more):
    return model(torch.tensor([ids]), **more).logits[0]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("n_tok", [ORIGINAL - 20, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL])
def test_a_prompt_has_the_factors_of_its_length(pruned, n_tok, pipeline, tokens):
    """As the untouched model reads it in one pass."""
    model = phi()
    before = logits(model, tokens[:n_tok], use_cache=False)
    others = logits(model, tokens[:250], use_cache=False)
    with install(model, pipeline if pruned else None):
        for _ in range(2):
            torch.testing.assert_close(logits(model, tokens[:n_tok], use_cache=False), before, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(logits(model, tokens[:250], use_cache=False), others, atol=2e-4, rtol=1e-4)
    assert model.model.rotary_emb.rope_type == "longrope"
    assert torch.equal(logits(model, tokens[:n_tok], use_cache=False), before)


def by_hand(model, prompt, n_new):
    """Greedy tokens where all angles are those of the prompt's length: by reading everything again, the module's frequencies fixed."""
    module = model.model.rotary_emb
    logits(model, prompt, use_cache=False)  # chooses them
    module.rope_type = "default"
    out = list(prompt)
    for _ in range(n_new):
        out.append(int(logits(model, out, use_cache=False)[-1].argmax()))
    module.rope_type = "longrope"
    return out[len(prompt) :]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("part", [64, 4096])
def test_a_request_keeps_its_factors(pruned, part, pipeline, tokens):
    """Across the original length while decoding, in parts of which the first lies below it, and beside requests of the other kind."""
    model = phi()
    prompts = [tokens[: ORIGINAL - 2], tokens[100 : 100 + 2 * ORIGINAL], tokens[40:90], tokens[300 : 301 + ORIGINAL]]
    expected = [by_hand(model, prompt, 6) for prompt in prompts]
    with install(model, pipeline if pruned else None) as installed:
        loaded = Loaded(model, None, 512, 2, "float32")
        done = generate(loaded, prompts, max_new_tok=6, prefill_chunk_tok=part, installed=installed)
        assert [one.tokens for one in done] == expected
        assert not installed.rotary.fixed


def test_pruned_long_prompts_are_turned_by_the_long_factors(tokens):
    small = Pipeline(stages=[Stage(16, 128, 64, 4, 4), Stage(8, 64, 64, 1, 2)], sink_tok=8, window_tok=64)
    model = phi()
    with install(model, small) as installed:
        logits(model, tokens[:600])
        (table,) = {id(layer.tables) for layer in installed.layers.values()}
        cpu = torch.device("cpu")
        assert table == id(installed.rotary.tables(cpu)) and installed.rotary.long and installed.pruned_blocks
        long = installed.rotary.tables(cpu).upto(300)
        logits(model, tokens[:100])
        short = installed.rotary.tables(cpu).upto(300)
    assert not torch.allclose(long.cos[:300], short.cos[:300], atol=0.1)


def test_which_layers_are_turned():
    models = [phi(), tiny("SmolLM3Config", no_rope_layers=[0, 1]), tiny("LlamaConfig")]
    assert [turned_layers(model, model.model) for model in models] == [{0, 1}, {1}, {0, 1}]
