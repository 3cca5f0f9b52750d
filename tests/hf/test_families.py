"""Every family of models: layers that see all tokens get the pipeline, the others stay as they are, and nothing else changes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import StaticCache

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, LayerGroup, Model, Offload, Pipeline, Stage
from hipexp.hf import Loaded, families, generate, install, load
from hipexp.hf.families import FAMILIES as ALL
from hipexp.hf.families import FULL, make
from hipexp.hf.kinds import kept_layers, layer_kinds
from hipexp.run import models_table
from hipexp.run.strategy import describe
from tiny import tiny

FAMILIES = {name: family for name, family in ALL.items() if any(word in name for word in ("windows", "linear attention", "shared keys"))}
MIXED = {"num_hidden_layers": 4, **families.MIXED}


@pytest.fixture
def small():
    """A pipeline that prunes from 200 tokens on."""
    return Pipeline(stages=[Stage(16, 128, 64, 4, 4), Stage(8, 64, 64, 1, 2)], sink_tok=8, window_tok=64, layers={"l": LayerGroup("0-1")})


@torch.inference_mode()
def logits(model, ids, **more):
    return model(torch.tensor([ids]), **more).logits[0]


@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize("family", ALL)
def test_equal_to_the_untouched_model_while_everything_fits(family, attention, pipeline, tokens):
    """Far beyond the sliding window; also the model's own cache, and no pipeline at all."""
    model = make(dataclasses.replace(ALL[family], attention=attention or ALL[family].attention))
    before = logits(model, tokens[:250], use_cache=False)
    for installed in (None, pipeline):
        with install(model, installed) as now:
            for use_cache in (False, True):
                torch.testing.assert_close(logits(model, tokens[:250], use_cache=use_cache), before, atol=2e-4, rtol=1e-4)
            assert now.pruned_blocks == 0
    torch.testing.assert_close(logits(model, tokens[:250], use_cache=False), before, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_layers_that_see_all_tokens_are_attached(family, small, tokens):
    model = make(FAMILIES[family])
    with install(model, small) as installed:
        logits(model, tokens[:600])
        pruned = {i for i, layer in installed.layers.items() if layer.pruned_blocks}
    full = {i for i, kind in enumerate(model.config.layer_types) if kind == FULL}
    if "shared" in family:
        full = {0}  # layer 2 lends its keys to layer 4
        assert kept_layers(layer_kinds(model))[1:] == [
            "layer 2: own attention (later layers use its keys and values)",
            "layer 4: own attention (uses keys and values of layer 2)",
            "layer 5: own attention (uses keys and values of layer 3)",
        ]
    assert pruned == set(installed.layers) == full


@pytest.mark.parametrize("family", ALL)
def test_our_loop_gives_the_tokens_of_the_model_itself(family, pipeline, tokens):
    """While everything fits: of prompts longer than the window, alone and in a batch of several lengths, in parts of any size."""
    model = make(ALL[family])
    loaded = Loaded(model, None, 512, model.config.num_hidden_layers, "float32")
    prompts = [tokens[:90], tokens[100:137], tokens[200:330]]
    expected = [model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    for installed in (None, pipeline):
        with install(model, installed) as now:
            for part in (64, 4096):
                done = generate(loaded, prompts, max_new_tok=8, prefill_chunk_tok=part, installed=now)
                assert [one.tokens for one in done] == expected
            (alone,) = generate(loaded, prompts[:1], max_new_tok=8, prefill_chunk_tok=64, installed=now)
            assert alone.tokens == expected[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_nothing(family, pipeline, tokens):
    """Under ``model.generate``, with transformers' own cache."""
    model, padding = make(FAMILIES[family]), 37
    prompts, length = [tokens[:140], tokens[200:303]], 140
    ids = torch.tensor([prompts[0], [0] * padding + prompts[1]])
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :padding] = 0
    with install(model, pipeline):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, length:].tolist()
        alone = [model.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    assert together == alone


def test_sliding_layers_keep_what_their_window_sees(small, tokens):
    model = tiny("Gemma2Config", **MIXED)
    loaded = Loaded(model, None, 512, 4, "float32")
    with install(model, small) as installed:
        new_store = installed.new_sequence()
        stores = [new_store(layer) for layer in range(4)]
        k = torch.zeros(2, 300, 16)
        for store in stores:
            store.append(k, k)
            store.append(k[:, :1], k[:, :1])
        assert [store.view()[0].shape[1] for store in stores] == [40, 301, 40, 301] and {store.length for store in stores} == {301}
        long, short = (generate(loaded, [tokens[:n]], max_new_tok=2, prefill_chunk_tok=64, installed=installed)[0] for n in (1200, 600))
    kept = 2 * 2 * 2 * 16 * 4 * 2  # heads, keys and values, layers, numbers, bytes: of a token in both full layers
    assert long.cache_bytes - short.cache_bytes <= 600 * kept * 1.2


def test_offload_is_for_the_attached_layers(small, tokens):
    model = tiny("Gemma2Config", **MIXED)
    loaded = Loaded(model, None, 512, 4, "float32")
    answers = []
    for offload in (None, Offload("host", device_tok=512)):
        with install(model, small, offload=offload) as installed:
            answers.append(generate(loaded, [tokens[:900]], max_new_tok=6, prefill_chunk_tok=128, installed=installed)[0])
    assert answers[0].tokens == answers[1].tokens
    assert {row["layer"] for row in answers[1].traffic["rows"]} == {1, 3}


def test_a_layer_cannot_take_over_what_a_sliding_one_would_select():
    words = ["+pipeline=kascade", "pipeline.params.anchors=[0,2]", "pipeline.params.keep_tok=32"]
    message = r"layer 1 takes over what layer 0 selects, and that one keeps .* choose among layers 1,3, as in pipeline.params.anchors"
    with pytest.raises(ConfigError, match=message), install(make(FAMILIES["Gemma 3 (windows)"]), compose(words).pipeline):
        pass


def test_a_model_of_windows_only_is_read_as_it_is(tokens):
    """Dense: without a pipeline there is nothing that it could not do."""
    model = tiny("MistralConfig", "sdpa", sliding_window=40)
    expected = model.generate(torch.tensor([tokens[:190]]), max_new_tokens=5, do_sample=False)[0, 190:].tolist()
    with install(model, None) as installed:
        for part in (16, 64, 4096):
            done = generate(
                Loaded(model, None, 512, 2, "float32"), [tokens[:190]], max_new_tok=5, prefill_chunk_tok=part, installed=installed
            )
            assert done[0].tokens == expected


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_are_no_single_sequence_are_refused(family, pruned, small, tokens):
    """Also where the first layer keeps its own attention, which asks for no positions."""
    positions = torch.cat([torch.arange(50), torch.arange(50)])[None]
    model = make(FAMILIES[family])
    with install(model, small if pruned else None), pytest.raises(ValueError, match="one sequence per row"):
        logits(model, tokens[:100], position_ids=positions, use_cache=False)


WINDOWS_ONLY = {
    "Mistral": ("MistralConfig", {"sliding_window": 40}),
    "Phi-3": ("Phi3Config", {"sliding_window": 40}),
    "StarCoder 2": ("Starcoder2Config", {"sliding_window": 40}),
    "Qwen 3": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0, "head_dim": 16}),
}


@pytest.mark.parametrize("name", WINDOWS_ONLY)
@pytest.mark.parametrize("what", ["packed", "stretched", "behind", "static"])
def test_positions_are_checked_also_where_all_layers_have_windows(name, what, tokens):
    """Dense: without hipexp such a model would see the packing; its own attention here is asked row by row, in order."""
    config, changes = WINDOWS_ONLY[name]
    model, n = tiny(config, "sdpa", **changes), 20 if what == "static" else 100
    more = {
        "packed": lambda: dict(position_ids=(torch.arange(100) % 50)[None], use_cache=False),
        "stretched": lambda: dict(position_ids=3 * torch.arange(100)[None], use_cache=False),
        "behind": lambda: dict(position_ids=7 + torch.arange(100)[None], use_cache=False),
        "static": lambda: dict(past_key_values=StaticCache(config=model.config, max_cache_len=512)),
    }
    with install(model, None), pytest.raises(ValueError, match="one sequence per row"):
        logits(model, tokens[:n], **more[what]())


@pytest.mark.parametrize("name", WINDOWS_ONLY)
def test_windows_with_the_cache_of_transformers_are_read_as_they_are(name, tokens):
    """It drops keys that no window sees, so where a step begins is no longer known; with padding in it and behind it."""
    config, changes = WINDOWS_ONLY[name]
    model = tiny(config, "sdpa", **changes)
    ids = torch.tensor([tokens[:130], [0] * 37 + tokens[200:293]])
    mask = (ids > 0).long() | torch.tensor([[1], [0]])
    asked = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **asked)
    with install(model, None):
        assert torch.equal(model.generate(ids, **asked), expected)
        for part in (16, 64):
            assert torch.equal(model.generate(ids, prefill_chunk_size=part, **asked), expected)


def test_layers_that_share_keys_are_not_read_one_by_one(small, tokens):
    model = make(ALL["Gemma 3n (shared keys)"])
    loaded = Loaded(model, None, 512, 6, "float32")
    with install(model, small, offload=Offload("host", device_tok=512, prefill_bytes=1 << 30)) as installed:
        with pytest.raises(ConfigError, match=r"its last 2 layers use the keys of other layers.*set offload.prefill_bytes=0"):
            generate(loaded, [tokens[:600]], max_new_tok=2, prefill_chunk_tok=64, installed=installed)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DeepseekV3Config", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}, "multi-head latent attention"),
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "its positions are ALiBi"),
        ("Cohere2Config", {**MIXED}, "pairs of neighbouring dimensions"),
        ("Qwen3_5TextConfig", {"layer_types": [FULL, FULL], "head_dim": 16}, "three positions for every token"),
        ("Llama4TextConfig", {"num_local_experts": 2, "head_dim": 16}, "chunked_attention|pairs of neighbouring"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused_by_name(name, changes, message, pipeline):
    model = tiny(name, **changes)
    with (
        pytest.raises(ConfigError, match=f"model type '{model.config.model_type}' cannot be attached: .*{message}"),
        install(model, pipeline),
    ):
        pass


def test_encoders_are_refused(pipeline):
    import transformers as tf

    config = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with (
        pytest.raises(ConfigError, match="'t5' cannot be attached: it has an encoder"),
        install(tf.T5ForConditionalGeneration(config), pipeline),
    ):
        pass


def test_a_window_as_long_as_anything_that_was_trained_is_none():
    model = tiny("MistralConfig", sliding_window=512)
    assert [kind.keeps for kind in layer_kinds(model)] == ["", ""]
    assert [kind.window_tok for kind in layer_kinds(tiny("MistralConfig", sliding_window=511))] == [511, 511]


def test_every_preset_has_a_family_and_every_family_is_in_the_docs():
    root = Path(__file__).parents[2]
    presets = {path.stem for path in (root / "conf" / "model").glob("*.yaml")} - {"needle", "hf", "openai"}
    named = [preset for family in ALL.values() for preset in family.presets]
    assert sorted(named) == sorted(presets)
    table = (root / "docs" / "models.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if "Config` |" in line] == list(ALL)


@pytest.mark.parametrize("family", ["Gemma 3 (windows)", "Phi-3, Phi-4-mini (longrope, partial RoPE)"])
def test_the_row_of_a_family(family):
    """A checkpoint is written, loaded by the public path, and compared."""
    found = models_table.measure(ALL[family])
    assert float(found["difference"]) < 1e-4
    assert [found[name] for name in ("same tokens", "in parts", "in a batch", "padded")] == ["yes"] * 4


def test_what_a_card_says_of_a_model(tmp_path):
    loaded = load(Model(path=str(models_table.checkpoint(ALL["EXAONE 4 (windows, full layers without RoPE)"], tmp_path))))
    assert loaded.own_layers == [0, 2]
    assert loaded.notes == ["layers 0,2: own attention (a sliding window of 40 tokens)", "layers 1,3: no RoPE"]
    told = describe(compose(["+pipeline=3stage"]).pipeline, 4, None, loaded.own_layers, loaded.notes)
    assert (
        told[1].startswith("  layer 1 (early): ")
        and "  layer 3: " in "\n".join(told)
        and told[-2:] == [f"  {note}" for note in loaded.notes]
    )


def test_remote_code_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nobodys", "auto_map": {"AutoConfig": "configuration_nobodys.TheirConfig"}})
    )
    with pytest.raises(ConfigError, match=r"no model that transformers .* has: its code lies in its own repository"):
        load(Model(path=str(tmp_path)))
