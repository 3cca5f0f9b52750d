"""A pipeline in a transformers model: exact when it fits, invisible when it is gone."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    StaticCache,
)  # fmt: skip

from hipexp.config.schema import AttendRope, ConfigError, LayerGroup, Pipeline, PruneRope, Rope, Stage, StageOverride
from hipexp.hf import generate, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.families import rope
from tiny import tiny


@torch.inference_mode()
def logits(model, ids, **kwargs):
    return model(torch.tensor([ids]), use_cache=False, **kwargs).logits[0]


ALL_FULL = {"layer_types": ["full_attention"] * 2, "head_dim": 16}


def is_restored(model):
    assert model.config._attn_implementation == "eager"
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.get_decoder().layers)
    assert not registered()


def registered():
    return [name for table in (AttentionInterface, AttentionMaskInterface) for name in table._global_mapping if name.startswith("hipexp")]


def test_a_softcap_is_taken_over(pipeline, tokens):
    model = tiny("Gemma2Config", **ALL_FULL, attn_logit_softcapping=2.0)
    before = logits(model, tokens[:250])
    with install(model, pipeline) as installed:
        assert {layer.softcap for layer in installed.layers.values()} == {2.0}
        torch.testing.assert_close(logits(model, tokens[:250]), before, atol=2e-4, rtol=1e-4)
    with install(model, None):
        torch.testing.assert_close(logits(model, tokens[:250]), before, atol=2e-4, rtol=1e-4)


def test_layers_without_rope_are_not_rotated(pipeline):
    with install(tiny("SmolLM3Config", no_rope_layers=[1, 0]), pipeline) as installed:
        rotated, plain = installed.layers[0], installed.layers[1]
    assert plain.tables is None and {stage.rope for stage in plain.plan.stages + plain.plan.decode} == {PruneRope.none}
    assert rotated.tables is not None and PruneRope.none not in {stage.rope for stage in rotated.plan.stages + rotated.plan.decode}


REFUSED = {
    "interleaved RoPE, glm": ("GlmConfig", {"head_dim": 16}, "'glm' cannot be attached: its RoPE turns pairs of neighbouring dimensions"),
    "interleaved RoPE, cohere": ("CohereConfig", {}, "'cohere' cannot be attached: its RoPE turns pairs"),
    "sliding window": ("MistralConfig", {"sliding_window": 64}, "'mistral' .* no layer of it sees all tokens .a sliding window of 64 tokens"),
    "attention sinks": (
        "GptOssConfig",
        {**ALL_FULL, "num_local_experts": 2, "num_experts_per_tok": 1},
        "'gpt_oss' is not supported.*the attention of layer 0 does something else: .* away from the model's own",
    ),
    "dynamic RoPE": ("LlamaConfig", rope("dynamic", factor=4.0), "RoPE of type 'dynamic'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_a_pipeline_cannot_serve_are_refused_and_restored(case, pipeline, tokens):
    name, changes, message = REFUSED[case]
    model = tiny(name, **changes)
    before = logits(model, tokens[:100])
    with pytest.raises(ConfigError, match=message), install(model, pipeline):
        pass
    assert torch.equal(logits(model, tokens[:100]), before)
    is_restored(model)


@pytest.mark.parametrize("dense", [True, False])
def test_a_second_installation_is_refused_and_the_first_one_stays(loaded, pipeline, tokens, dense):
    with install(loaded.model, pipeline):
        before = logits(loaded.model, tokens[:400])
        with (
            pytest.raises(ConfigError, match="installed already; leave that context first"),
            install(loaded.model, None if dense else pipeline),
        ):
            pass
        assert torch.equal(logits(loaded.model, tokens[:400]), before)


def test_two_models_at_once_do_not_disturb_each_other(loaded, pipeline, tokens):
    other, pruned = tiny("LlamaConfig"), lambda: logits(loaded.model, tokens[:400])
    dense = logits(other, tokens[:400])
    with install(loaded.model, pipeline):
        before = pruned()
        with install(other, None):
            assert torch.equal(pruned(), before)
            assert torch.allclose(logits(other, tokens[:400]), dense, atol=2e-4)
        assert torch.equal(pruned(), before) and torch.equal(logits(other, tokens[:400]), dense)
    assert not registered()


def test_every_layer_gets_its_own_plan(pipeline):
    """Also after the check on installation, which widens the windows for a while."""
    pipeline.window_tok = 64
    pipeline.layers["late"] = LayerGroup("1", window_tok=96, stages={"2": StageOverride(keep_tok=64)})
    with install(tiny("LlamaConfig"), pipeline) as installed:
        plans = [installed.layers[i].plan for i in (0, 1)]
    assert plans == pipeline.plan(2) and (plans[0].window_tok, plans[1].window_tok, plans[1].stages[2].keep_tok) == (64, 96, 64)
    assert installed.pruned_blocks == 0


def test_a_pipeline_that_sees_less_than_the_check_needs_can_be_installed():
    small = Pipeline(stages=[Stage(8, 8, query_block_tok=16)], sink_tok=4, window_tok=16)
    with install(tiny("LlamaConfig"), small) as installed:
        assert [layer.plan.window_tok for layer in installed.layers.values()] == [16, 16] and installed.pruned_blocks == 0


@pytest.mark.parametrize("strategy", [Rope(PruneRope.dynamic), Rope(PruneRope.self_extend), Rope(attend=AttendRope.dynamic)])
def test_the_trained_length_reaches_the_strategies(loaded, pipeline, tokens, strategy):
    pipeline = dataclasses.replace(pipeline, rope=strategy, layers={})

    def under(trained):
        with install(loaded.model, pipeline, trained):
            return logits(loaded.model, tokens[:700])[-64:]

    assert torch.equal(under(None), under(512)), "that of the config"
    assert not torch.allclose(under(128), under(512), atol=1e-2)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mask", r"attention_mask \(1, 1, 300, 300\) must be \[batch, tokens\]"),
        ("packed", "position_ids run from 0 to 149 for the 300 tokens from 0 on"),
        ("stretched", "position_ids run from 0 to 897 for the 300 tokens"),
        ("static", "no packing, no static cache"),
    ],
)
def test_calls_that_are_not_understood_are_refused(loaded, pipeline, tokens, dense, what, message):
    call = {
        "mask": lambda: dict(attention_mask=torch.zeros(1, 1, 300, 300), use_cache=False),
        "packed": lambda: dict(position_ids=(torch.arange(300) % 150)[None], use_cache=False),
        "stretched": lambda: dict(position_ids=3 * torch.arange(300)[None], use_cache=False),
        "static": lambda: dict(past_key_values=StaticCache(config=loaded.model.config, max_cache_len=512)),
    }
    with install(loaded.model, None if dense else pipeline), pytest.raises(ValueError, match=message), torch.inference_mode():
        loaded.model(torch.tensor([tokens[:300]]), **call[what]())


def test_a_call_that_would_need_gradients_is_refused(pipeline, tokens):
    model = tiny("LlamaConfig")
    with install(model, pipeline), pytest.raises(RuntimeError, match=r"pruned attention has no gradient; .* torch\.inference_mode"):
        model(torch.tensor([tokens[:64]]) % 256)


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
    assert not registered()


def test_left_padding_changes_nothing(loaded, any_pipeline, tokens):
    with install(loaded.model, any_pipeline), torch.inference_mode():
        alone = logits(loaded.model, tokens[:700])
        ids = torch.tensor([[0] * 37 + tokens[:700], tokens[:737]])
        mask = torch.ones_like(ids)
        mask[0, :37] = 0
        both = loaded.model(ids, attention_mask=mask, use_cache=False).logits
        assert torch.allclose(both[0, 37:], alone, atol=1e-4)
        assert torch.allclose(both[1], logits(loaded.model, tokens[:737]), atol=1e-4)


def padded(tokens, padding):
    """Two prompts of the same length, the first with ``padding`` on its left, and their mask."""
    ids = torch.tensor([[0] * padding + tokens[:600], tokens[: 600 + padding]])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


@pytest.mark.parametrize("dense", [True, False])
def test_generate_of_transformers_with_left_padding_and_our_cache(loaded, pipeline, tokens, dense):
    ids, mask = padded(tokens, 37)
    with install(loaded.model, None if dense else pipeline), torch.inference_mode():
        cache = SequenceCache(loaded.n_layers)
        out = loaded.model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=14, do_sample=False, pad_token_id=0)
        for row, prompt in zip(out, (tokens[:600], tokens[:637]), strict=True):
            assert row[637:].tolist() == generate(loaded, [prompt], max_new_tok=14, prefill_chunk_tok=8192)[0].tokens
        assert {row.memory.step for layer in cache.layers for row in layer.rows} == {0 if dense else 13}


@pytest.mark.parametrize("make", [lambda loaded: SequenceCache(loaded.n_layers), lambda loaded: DynamicCache(config=loaded.model.config)])
def test_chunks_in_which_a_row_is_all_padding(loaded, any_pipeline, tokens, make):
    """128 tokens of padding: in the first two chunks of 64 only the second row has queries."""
    ids, mask = padded(tokens, 128)
    with install(loaded.model, any_pipeline), torch.inference_mode():
        cache = make(loaded)
        for part in torch.arange(ids.shape[1]).split(64):
            end, shift = int(part[-1]) + 1, torch.tensor([[128], [0]])
            positions = (part[None] - shift).clamp(min=0)
            out = loaded.model(ids[:, part], attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache).logits[:, -1]
        for mine, prompt in zip(out, (tokens[:600], tokens[:728]), strict=True):
            assert torch.allclose(mine, logits(loaded.model, prompt)[-1], atol=1e-4)


def test_a_sequence_that_begins_elsewhere_forgets_what_was_selected(loaded, pipeline, tokens):
    with install(loaded.model, pipeline), torch.inference_mode():
        cache = SequenceCache(loaded.n_layers)
        loaded.model(torch.tensor([tokens[:600]]), past_key_values=cache)
        loaded.model(torch.tensor([tokens[600:601]]), past_key_values=cache)
        before = [layer.rows[0].memory for layer in cache.layers]
        assert all(memory.step == 1 and memory.held.bytes > 0 for memory in before)
        mask = torch.ones(1, 602, dtype=torch.long)
        mask[0, :5] = 0
        loaded.model(torch.tensor([tokens[601:602]]), attention_mask=mask, past_key_values=cache)
        assert not any(layer.rows[0].memory is memory for layer, memory in zip(cache.layers, before, strict=True))


@torch.inference_mode()
def test_a_method_that_remembers_needs_our_cache():
    ids, model = torch.randint(0, 256, (1, 65), generator=torch.Generator().manual_seed(0)), tiny("LlamaConfig")
    with install(model, Pipeline(method="h2o", sink_tok=0, window_tok=16, params={"keep_tok": 16})):
        for cache in (SequenceCache(2), DynamicCache(config=model.config)):
            model(ids[:, :64], past_key_values=cache)
            if isinstance(cache, SequenceCache):
                assert model(ids[:, 64:], past_key_values=cache).logits.isfinite().all()
        with pytest.raises(ValueError, match=r"method h2o .* nothing was kept"):
            model(ids[:, 64:], past_key_values=cache)


def test_our_cache_only_grows():
    cache = SequenceCache(2)
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    row = torch.tensor([0])
    for method, arguments in dict(
        crop=(3,), reset=(), reorder_cache=(row,), batch_repeat_interleave=(2,), batch_select_indices=(row,)
    ).items():
        # Beam search and assisted decoding call these; a silent no-op would leave refresh state that belongs to other tokens. It is this
        # error because transformers' interface has these methods and this cache, by design, does not do them.
        with pytest.raises(NotImplementedError, match="only grows"):
            getattr(cache, method)(*arguments)
    assert cache.get_seq_length() == 5


def test_right_padding_is_refused(loaded, pipeline, tokens):
    mask = torch.ones(1, 300, dtype=torch.long)
    mask[0, 250:] = 0
    with install(loaded.model, pipeline), pytest.raises(ValueError, match="only padding on the left"):
        loaded.model(torch.tensor([tokens[:300]]), attention_mask=mask)


def test_a_model_without_a_rotary_module_is_refused(pipeline):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=32))
    with pytest.raises(ConfigError, match=r"gpt2.*cannot be attached"), install(model, pipeline):
        pass


@pytest.mark.parametrize(
    "pipeline",
    [Pipeline(method="lm_infinite", window_tok=16), Pipeline(method="self_extend", params={"group_tok": 2, "neighbour_tok": 16})],
    ids=lambda pipeline: pipeline.method,
)
def test_the_check_of_a_model_needs_no_room_in_a_method_with_an_attention_of_its_own(pipeline):
    """It is of the model: what such a method does of the check's prompt says nothing about it."""
    model, ids = tiny("LlamaConfig"), list(range(3, 67))
    with install(model, pipeline, 512):
        pruned = logits(model, ids)
    assert not torch.allclose(pruned, logits(model, ids), atol=1e-3)


def test_what_an_angle_of_zero_would_do_is_not_done(loaded, pipeline, tokens, monkeypatch):
    """Also where two models of a family have a pipeline, and the first one is done first; all is as before in the end."""
    from transformers.models.llama import modeling_llama

    calls, original = [], modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    here, ids = modeling_llama.apply_rotary_pos_emb, torch.tensor([tokens[:64]])
    other = LlamaForCausalLM(copy.deepcopy(loaded.model.config)).eval()
    first, second = install(loaded.model, pipeline), install(other, pipeline)
    with torch.inference_mode():
        first.__enter__()
        second.__enter__()
        calls.clear()
        loaded.model(ids)
        first.__exit__(None, None, None)
        other(ids)
        assert not calls
        loaded.model(ids)
        second.__exit__(None, None, None)
    assert len(calls) == 4 and modeling_llama.apply_rotary_pos_emb is here
