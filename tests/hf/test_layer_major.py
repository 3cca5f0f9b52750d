"""Layer-major prefill: the bits of chunked prefill, in another order, and a model that is as before whatever happens."""

import gc
import signal
import weakref
from functools import partial

import pytest
import torch

from hipexp.config.schema import ConfigError, Pipeline, Stage
from hipexp.hf import Generation, install
from hipexp.hf.cache import SequenceCache
from hipexp.hf.layer_major import run_layer_major
from hipexp.hf.loop import decode, prefill, prefill_layer_major
from tiny import tiny as tiny_model

ALL_FULL = {"layer_types": ["full_attention"] * 3, "head_dim": 16}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2, capped": ("Gemma2Config", {**ALL_FULL, "attn_logit_softcapping": 2.0}),
    "smollm3, a layer without RoPE": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {}),
    "stablelm": ("StableLmConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
}


def tiny(config, **changes):
    """A model of three layers, for texts of up to 2048 tokens."""
    return tiny_model(config, num_hidden_layers=3, max_position_embeddings=2048, **changes)


@pytest.fixture
def fine():
    """A pipeline whose query blocks are of 16 tokens."""
    return Pipeline(stages=[Stage(32, 256, 16, 4, 16), Stage(8, 96, 16, 1, 4)], sink_tok=8, window_tok=32)


def calls(model, cache, prompt, chunk_tok):
    """The forward passes of a prompt's chunks, each returning all its logits."""
    ids = torch.tensor([prompt])
    positions = torch.arange(len(prompt))[None]
    return [
        lambda ids=i, positions=p: model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
        for i, p in zip(ids.split(chunk_tok, 1), positions.split(chunk_tok, 1), strict=True)
    ]


def one_by_one(_, calls):
    return [call() for call in calls]


def contents(cache):
    """All that a cache knows, as tensors and numbers."""
    for layer in cache.layers:
        for row in layer.rows:
            yield from row.store.view()
            yield torch.tensor([row.padding, row.pruned_blocks, row.memory.step, row.store.bytes, row.state.bytes if row.state else 0])
            if row.state is not None:
                yield from (level.upto(level.n_pieces) for level in row.state._levels.values())


@torch.inference_mode()
def read(model, prompt, chunk_tok, run):
    """Every chunk's logits and what the cache then holds."""
    cache = SequenceCache(len(model.model.layers), reserve_tok=len(prompt), decoding=False)
    return [*run(model, calls(model, cache, prompt, chunk_tok)), *contents(cache)]


def same_bits(model, prompt, chunk_tok):
    ours, theirs = (read(model, prompt, chunk_tok, run) for run in (run_layer_major, one_by_one))
    assert len(ours) == len(theirs) > -(-len(prompt) // chunk_tok)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def is_restored(model):
    return not any("forward" in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_bits_of_chunked_prefill(family, pipeline, tokens):
    name, changes = FAMILIES[family]
    model = tiny(name, **changes)
    with install(model, pipeline) as installed:
        same_bits(model, tokens[:900], 128)
        assert installed.pruned_blocks
    if "capped" not in family:
        with install(model, None):
            same_bits(model, tokens[:300], 128)
    assert is_restored(model)


def test_a_family_with_rope_by_kind_of_layer(tokens):
    """Gemma 3: no pipeline takes it so far."""
    with install(model := tiny("Gemma3TextConfig", **ALL_FULL), None):
        same_bits(model, tokens[:300], 128)


@pytest.mark.parametrize(("length", "chunk_tok"), [(1400, 256), (1024, 256), (961, 64), (1000, 8192), (40, 64), (1, 64)])
def test_any_chunks(loaded, any_pipeline, tokens, length, chunk_tok):
    with install(loaded.model, any_pipeline):
        same_bits(loaded.model, tokens[:length], chunk_tok)


@pytest.mark.slow
def test_more_than_64_chunks(loaded, fine, tokens):
    with install(loaded.model, fine) as installed:
        same_bits(loaded.model, tokens[:1393], 16)
        assert installed.pruned_blocks


@torch.inference_mode()
def test_a_prompt_goes_on_as_after_chunked_prefill(loaded, any_pipeline, tokens):
    out = []
    with install(loaded.model, any_pipeline):
        for way in (prefill, prefill_layer_major):
            cache = SequenceCache(loaded.n_layers, reserve_tok=1024, decoding=False)
            first = way(loaded.model, cache, tokens[:1000], 192, not_first={7})
            assert way(loaded.model, SequenceCache(loaded.n_layers, decoding=False), tokens[:1000], 192, None, {first}) != first
            out.append(Generation())
            decode(loaded.model, [cache], [first], out[-1:], 24, set())
    assert out[0].tokens == out[1].tokens and len(out[0].tokens) == 24


def test_longrope_is_a_matter_of_each_chunk(tokens):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 256}
    rope = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "longrope", **factors}}
    with install(model := tiny("Phi3Config", sliding_window=None, original_max_position_embeddings=256, **rope), None):
        same_bits(model, tokens[:600], 64)


@torch.inference_mode()
def test_the_order(loaded, pipeline, tokens):
    """Layers one after the other, chunks in order, and the cache of one layer only ever incomplete."""
    cache, seen = SequenceCache(loaded.n_layers, decoding=False), []

    def lengths():
        return [layer.get_seq_length() for layer in cache.layers]

    with install(loaded.model, pipeline):
        run_layer_major(
            loaded.model, calls(loaded.model, cache, tokens[:200], 64), before_layer=lambda layer: seen.append(("before", layer, lengths())),
            after_layer=lambda layer: seen.append(("after", layer, lengths())), progress=lambda *at: seen.append((*at, lengths())),
        )  # fmt: skip
    expected = []
    for layer in range(4):
        at = [[200] * layer + [n] + [0] * (3 - layer) for n in (0, 64, 128, 192, 200)]
        expected += [("before", layer, at[0]), *((i, layer, at[i + 1]) for i in range(4)), ("after", layer, at[4])]
    assert seen == expected


@torch.inference_mode()
def test_progress_is_told_the_tokens_of_the_prompt(loaded, pipeline, tokens):
    told = []
    with install(loaded.model, pipeline):
        cache = SequenceCache(loaded.n_layers, decoding=False)
        prefill_layer_major(loaded.model, cache, tokens[:201], 64, told.append)
    assert told == [16, 16, 16, 2] * 3 + [16, 16, 16, 3]


@torch.inference_mode()
def test_only_what_goes_from_layer_to_layer_is_kept(loaded, pipeline, tokens):
    """Of hidden states there is one per chunk, none behind the last layer; embeddings do not outlive their pass."""
    model, embedded, hidden, kept = loaded.model, [], [], []

    def note(into, module, args, output):
        if isinstance(output, torch.Tensor):
            into.append(weakref.ref(output))

    def look(chunk, layer):
        kept.append([sum(ref() is not None for ref in refs) for refs in (embedded, hidden)])

    hooks = []
    gc.disable()  # what only a collection would find stays
    try:
        with install(model, pipeline):  # which runs the model, if it did not before
            hooks += [model.model.embed_tokens.register_forward_hook(partial(note, embedded))]
            hooks += [layer.register_forward_hook(partial(note, hidden)) for layer in model.model.layers]
            run_layer_major(model, calls(model, SequenceCache(loaded.n_layers, decoding=False), tokens[:256], 64), progress=look)
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()
    assert len(embedded) == len(hidden) == 16 and kept == [[0, n] for n in (1, 2, 3, 4, *[4] * 8, 3, 2, 1, 0)]


def interrupt():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def fail():
    raise torch.OutOfMemoryError("no memory left")


@pytest.mark.parametrize(("happens", "error"), [(interrupt, KeyboardInterrupt), (fail, torch.OutOfMemoryError)])
@pytest.mark.parametrize(("place", "time"), {"attention": 4, "embedding": 7, "before_layer": 3, "after_layer": 3, "progress": 7}.items())
def test_whatever_happens_the_model_is_as_before(loaded, pipeline, tokens, place, time, happens, error):
    model, times = loaded.model, []
    modules = {"attention": model.model.layers[1].self_attn.o_proj, "embedding": model.model.embed_tokens}

    def at_its_time(*_):
        times.append(1)
        if len(times) == time:
            happens()

    with install(model, pipeline):
        hook = modules[place].register_forward_hook(at_its_time) if place in modules else None
        callbacks = {} if hook else {place: at_its_time}
        with pytest.raises(error) as caught:
            read(model, tokens[:256], 64, partial(run_layer_major, **callbacks))
        if hook:
            hook.remove()
        assert happens.__name__ in [entry.name for entry in caught.traceback] and is_restored(model)
        same_bits(model, tokens[:256], 64)


def test_logits_that_are_not_finite_are_an_error(loaded, pipeline, tokens):
    def spoil(module, args, output):
        return output * float("nan") if 3 in args[0][0, -1:] else output

    prompt = [5 if token == 3 else token for token in tokens[:256]]
    prompt[127] = 3  # the last one of the second chunk
    hook = loaded.model.model.embed_tokens.register_forward_hook(spoil)
    try:
        with install(loaded.model, pipeline), pytest.raises(FloatingPointError, match="not finite at position 127"), torch.inference_mode():
            prefill_layer_major(loaded.model, SequenceCache(loaded.n_layers, decoding=False), prompt, 64)
    finally:
        hook.remove()
    assert is_restored(loaded.model)


def test_a_forward_that_somebody_put_into_a_layer_is_used_and_stays(pipeline, tokens):
    model, seen = tiny("LlamaConfig"), []
    layer = model.model.layers[1]
    layer.forward = watched = lambda *args, forward=layer.forward, **kwargs: seen.append(1) or forward(*args, **kwargs)
    with install(model, pipeline):
        seen.clear()
        read(model, tokens[:256], 64, run_layer_major)
    assert len(seen) == 4 and layer.forward is watched


def test_outside_an_installation_it_is_refused(loaded, tokens):
    with pytest.raises(ValueError, match=r"inside hipexp\.hf\.install\(model, …\) only"):
        read(loaded.model, tokens[:256], 64, run_layer_major)


def test_dynamic_rope_is_refused(tokens):
    rope = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}}
    with (
        install(model := tiny("LlamaConfig", **rope), None),
        pytest.raises(ConfigError, match=r"'dynamic' depend on .*: set offload\.prefill_bytes=0"),
    ):
        read(model, tokens[:256], 64, run_layer_major)
    assert is_restored(model)


def scaled(module, args, output):
    return output * 0.5


def scaled_by_torch(module, args, output):
    return torch.mul(torch.ones(()), output)


def added(module, args):
    return (args[0] + 1, *args[1:])


def exchanged(module, args, output):
    return output.clone()


@pytest.mark.parametrize("between", [scaled, scaled_by_torch, added, exchanged])
def test_a_model_that_computes_between_layers_is_refused(between, pipeline, tokens):
    model = tiny("LlamaConfig")
    layer = model.model.layers[1]
    hook = (layer.register_forward_pre_hook if between is added else layer.register_forward_hook)(between)
    with (
        install(model, pipeline),
        pytest.raises(ConfigError, match=r"computes with the hidden states between two layers; .*: set offload\.prefill_bytes=0"),
    ):
        read(model, tokens[:256], 64, run_layer_major)
    assert is_restored(model) and hook


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1], "has 3 layers and called 2"),
        ([0, 2, 1], "calls its layer 2 where layer 1 is next"),
        ([0, 1, 2, 2], "calls its layer 2 where layer 3 is next"),
        ([0, 1, 0, 1, 2], "calls its layer 0 where layer 2 is next"),
    ],
)
def test_layers_in_another_order_are_refused(order, message, pipeline, tokens, monkeypatch):
    model = tiny("LlamaConfig")
    with install(model, pipeline):
        plain = type(model.model.layers)
        monkeypatch.setattr(
            plain,
            "__getitem__",
            lambda self, i, get=plain.__getitem__: [get(self, n) for n in order] if isinstance(i, slice) else get(self, i),
        )
        with pytest.raises(ConfigError, match=message):
            read(model, tokens[:256], 64, run_layer_major)
    assert is_restored(model)


def test_a_layer_that_is_not_handed_the_output_of_the_one_before_is_refused(pipeline, tokens):
    model = tiny("LlamaConfig")
    first = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: first.append(output))
    model.model.layers[2].register_forward_pre_hook(lambda module, args: (first[-1], *args[1:]))
    with install(model, pipeline), pytest.raises(ConfigError, match="layer 2 is handed something else than what layer 1 put out"):
        read(model, tokens[:256], 64, run_layer_major)
