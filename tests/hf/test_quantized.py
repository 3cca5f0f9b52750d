"""Quantised checkpoints: told what is missing, loaded where nothing is, and everything that is sized by a number's format."""

import json
from importlib import import_module

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, Model, Offload
from hipexp.hf import generate, install, load, quantized
from hipexp.hf.families import FAMILIES, make
from hipexp.hf.quantized import compute_dtype, quantization_of
from hipexp.run.models_table import checkpoint, pruning, tokens_of
from hipexp.run.strategy import describe
from tiny import tiny

FOUR = {"input_activations": {"num_bits": 8}, "weights": {"num_bits": 4, "type": "int"}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": FOUR}}
# What config.json says, what hipexp says, and a package that transformers needs.
STORED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits", "optimum, gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "awq, 4 bits", "gptqmodel"),
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits", "bitsandbytes"),
    "bitsandbytes 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits", "bitsandbytes"),
    "compressed-tensors": (COMPRESSED, "compressed-tensors, 4 bits", "compressed-tensors"),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}, "torchao", "torchao"),
    "hqq": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, "hqq, 4 bits", "hqq"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "quanto", "optimum-quanto"),
}  # fmt: skip
LOADING = import_module("hipexp.hf.load")  # the name in the package is the function
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}

reads_fp8 = pytest.mark.skipif(transformers.__version__ == "5.16.0", reason="its own error: update_tp_plan, for models without experts")


def stored(folder, told):
    """The Llama checkpoint in ``folder``, whose configuration says that its weights are quantised."""
    config = json.loads((checkpoint(FAMILIES["Llama 3"], folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    return Model(path=str(folder))


def in_fp8(folder, dtype):
    """The same with weights that really are: of 8 bits, with a scale for 32 times 32 of them."""
    model = stored(folder, FP8)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        weights[name] = weight.to(dtype)
        if "_proj" in name:
            blocks = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
            scale = blocks.abs().amax((1, 3)) / 448
            weights[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return model


@pytest.mark.parametrize("case", STORED)
def test_a_package_that_is_missing_is_named(case, tmp_path):
    told, words, packages = STORED[case]
    if any(map(quantized._installed, packages.split(", "))):
        pytest.skip(f"{packages} is here")  # then nothing is missing that could be named
    with pytest.raises(ConfigError) as refused:
        load(stored(tmp_path, told))
    message = str(refused.value)
    assert message.startswith(f"model.path={tmp_path} has quantised weights ({words}), which transformers cannot load here: ")
    repair = f"missing: {packages}; install with `pip install {packages.replace(',', '')}`, or take the checkpoint that is not quantised"
    assert message.endswith(repair) and "\n" not in message


def test_it_is_not_the_device_map_that_is_wrong(tmp_path):
    model = stored(tmp_path, STORED["gptq"][0])
    model.device_map = "auto"
    with pytest.raises(ConfigError, match=r"has quantised weights \(gptq, 4 bits\)"):
        load(model)


@pytest.mark.parametrize(("told", "what"), [({"quant_method": "exl3", "bits": 4}, "exl3"), ({"bits": 4}, "None")])
def test_a_method_that_transformers_would_skip_is_refused(told, what, tmp_path):
    """It warns, and loads a model without the weights that it cannot read."""
    message = rf"quantised weights \({what}, 4 bits\).*config\.quant_method={what} in its config\.json is none that transformers .* knows"
    with pytest.raises(ConfigError, match=message):
        load(stored(tmp_path, told))


@reads_fp8
def test_an_error_of_the_first_pass_is_told_too(tmp_path, monkeypatch):
    """fp8 asks for its kernels only then."""

    def fails(model, kinds):
        raise ImportError("finegrained-fp8 kernel unavailable: `kernels` is missing.")

    monkeypatch.setattr(LOADING, "notes_of", fails)
    with pytest.raises(ConfigError, match=r"\(fp8\), which transformers cannot load here: finegrained-fp8 kernel .*pip install kernels"):
        load(in_fp8(tmp_path, torch.bfloat16))


def test_memory_that_ends_is_no_mistake_in_the_configuration(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(torch.OutOfMemoryError):
        load(stored(tmp_path, STORED["gptq"][0]))


@pytest.mark.parametrize("told", [None, STORED["bitsandbytes 4"][0]])
def test_quantised_weights_are_read_to_the_gpu_and_never_moved(told, tmp_path, monkeypatch):
    """``model.to`` is not for all of them."""
    config, seen = stored(tmp_path, told), {}

    class Model:
        is_quantized = True

        def eval(self):
            return self

        def to(self, device):
            seen["moved"] = device
            return self

        def parameters(self):
            return [torch.zeros(1, dtype=torch.int8), torch.zeros(1, dtype=torch.float8_e4m3fn), torch.zeros(1, dtype=torch.bfloat16)]

    def read(source, **words):
        seen.update(words)
        return Model()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(LOADING, "layer_kinds", lambda model: [])
    monkeypatch.setattr(LOADING, "notes_of", lambda model, kinds: [])
    loaded = load(config)
    assert loaded.dtype == "bfloat16"
    if told is None:
        assert seen["moved"] == "cuda" and "device_map" not in seen and loaded.notes == []
    else:
        assert seen["device_map"] == "cuda" and "moved" not in seen
        assert loaded.notes == ["weights: bitsandbytes, 4 bits; hipexp did not test it"]


@reads_fp8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp8")
def test_fp8_on_a_cpu_is_dequantised_by_transformers(dtype, tmp_path):
    loaded = load(in_fp8(tmp_path, dtype))
    name = str(dtype).removeprefix("torch.")
    assert loaded.dtype == name
    note = f"weights: fp8, which transformers turned into {name} while loading; hipexp did not test it"
    assert loaded.notes == [note] and f"  {note}" in describe(compose(["+pipeline=3stage"]).pipeline, 4, None, [], loaded.notes)
    plain, ids = make(FAMILIES["Llama 3"]).to(dtype), torch.tensor([tokens_of(100, 1)])
    with torch.inference_mode():
        ours, exact = (model(ids).logits.float() for model in (loaded.model, plain))
    assert 0 < float((ours - exact).norm() / exact.norm()) < 0.3
    with install(loaded.model, pruning()) as installed:
        (done,) = generate(loaded, [tokens_of(300, 2)], max_new_tok=4, prefill_chunk_tok=64, installed=installed)
    assert len(done.tokens) == 4 and not done.exact


def test_keys_and_values_are_as_large_as_what_is_computed_with(pipeline):
    """Whatever the weights are stored in: the sizes of an offload, in bytes, are those of a model in bf16."""
    plain, eight = make(FAMILIES["Llama 3"]).to(torch.bfloat16), make(FAMILIES["Llama 3"]).to(torch.bfloat16)
    weight = eight.get_input_embeddings().weight
    eight.get_input_embeddings().stored = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    eight.get_input_embeddings()._parameters = dict(reversed(eight.get_input_embeddings()._parameters.items()))
    assert eight.dtype == torch.float8_e4m3fn and compute_dtype(eight) == compute_dtype(plain) == torch.bfloat16
    offload, sizes = Offload("host", device_bytes=2**20), []
    for model in (plain, eight):
        with install(model, pipeline, offload=offload) as installed:
            sizes.append(installed.sizes)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({**COMPRESSED, "config_groups": {"a": FOUR, "b": {"weights": {"num_bits": 8}}}}, "compressed-tensors"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": None}}}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        (FP8, "fp8"),
    ],
)
def test_what_is_said_of_the_weights(told, words):
    config = make(FAMILIES["Llama 3"]).config
    assert quantization_of(config, "here") is None
    config.quantization_config = told
    assert str(quantization_of(config, "here")) == words


class Stepped(torch.nn.Linear):
    """What goes in is rounded to 8 bits, by a step for every token."""

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_with_rounded_activations_passes_the_check(pipeline, dtype):
    model = make(FAMILIES["Llama 3"]).to(dtype)
    for layer in model.model.layers:
        for part in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(part, torch.nn.Linear):
                part.__class__ = Stepped
    model.is_quantized = True
    with install(model, pipeline):
        pass


def test_the_check_on_installation_allows_for_rounded_activations(pipeline, monkeypatch):
    """In fp32 too: an attention whose scale is 2 % off is refused there, and not where activations are quantised."""
    module = import_module("hipexp.hf.install")
    made = module._layer_attentions

    def off(*args):
        layers = made(*args)
        for layer in layers.values():
            layer.scale *= 1.02
        return layers

    monkeypatch.setattr(module, "_layer_attentions", off)
    model = make(FAMILIES["Llama 3"])
    with pytest.raises(ConfigError, match="is not supported"), install(model, pipeline):
        pass
    model.is_quantized = True
    with install(model, pipeline):
        pass


def test_the_check_on_installation_still_finds_what_is_wrong(pipeline):
    model = tiny("GptOssConfig", layer_types=["full_attention"] * 2, head_dim=16, num_local_experts=2, num_experts_per_tok=1)
    model.is_quantized = True
    with pytest.raises(ConfigError, match="'gpt_oss' is not supported"), install(model, pipeline):
        pass
