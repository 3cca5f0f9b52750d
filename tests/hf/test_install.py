"""A pipeline in a transformers model: exact when it fits, invisible when it is gone."""

import pytest
import torch
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from hipexp.config.schema import AttendRope, ConfigError
from hipexp.hf import install


@torch.inference_mode()
def logits(model, ids, **kwargs):
    return model(torch.tensor([ids]), use_cache=False, **kwargs).logits[0]


@pytest.mark.parametrize("attend", list(AttendRope))
def test_equal_to_the_untouched_model_when_everything_fits(loaded, pipeline, tokens, attend):
    pipeline.rope.attend = attend
    before = logits(loaded.model, tokens[:256])
    with install(loaded.model, pipeline) as installed:
        assert torch.allclose(logits(loaded.model, tokens[:256]), before, atol=1e-4)
        assert installed.pruned_blocks == 0
        logits(loaded.model, tokens[:320])
        assert installed.pruned_blocks > 0


def test_dense_is_the_untouched_model(loaded, tokens):
    before = logits(loaded.model, tokens[:700])
    with install(loaded.model, None):
        assert torch.allclose(logits(loaded.model, tokens[:700]), before, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored(loaded, pipeline, tokens, fails):
    model, before = loaded.model, logits(loaded.model, tokens[:400])
    try:
        with install(model, pipeline):
            assert not torch.allclose(logits(model, tokens[:400]), before, atol=1e-3)
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert torch.equal(logits(model, tokens[:400]), before)
    assert model.config._attn_implementation == "sdpa"
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    assert "hipexp" not in AttentionInterface._global_mapping


def test_left_padding_changes_nothing(loaded, pipeline, tokens):
    with install(loaded.model, pipeline), torch.inference_mode():
        alone = logits(loaded.model, tokens[:700])
        ids = torch.tensor([[0] * 37 + tokens[:700], tokens[:737]])
        mask = torch.ones_like(ids)
        mask[0, :37] = 0
        both = loaded.model(ids, attention_mask=mask, use_cache=False).logits
        assert torch.allclose(both[0, 37:], alone, atol=1e-4)
        assert torch.allclose(both[1], logits(loaded.model, tokens[:737]), atol=1e-4)


def test_right_padding_is_refused(loaded, pipeline, tokens):
    mask = torch.ones(1, 300, dtype=torch.long)
    mask[0, 250:] = 0
    with install(loaded.model, pipeline), pytest.raises(ValueError, match="only padding on the left"):
        loaded.model(torch.tensor([tokens[:300]]), attention_mask=mask)


def test_a_model_without_a_rotary_module_is_refused(pipeline):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=32))
    with pytest.raises(ConfigError, match=r"gpt2.*cannot be attached"), install(model, pipeline):
        pass
