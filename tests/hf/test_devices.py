"""Models whose weights are spread over the CPU and the disk answer as one that is whole."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, Model
from hipexp.hf import Loaded, generate, install, load
from hipexp.hf.devices import device_of, input_device
from hipexp.hf.families import FAMILIES
from hipexp.run.identity import key_of
from hipexp.run.models_table import checkpoint, pruning, tokens_of


@pytest.mark.parametrize("on_disk", [["model.layers.1", "model.layers.2"], ["model.embed_tokens", "model.layers.0", "lm_head"]])
@pytest.mark.parametrize("family", ["Llama 3", "Gemma 2 (windows, soft cap)", "Phi-3, Phi-4-mini (longrope, partial RoPE)"])
def test_weights_on_the_disk(family, on_disk, tmp_path):
    folder = checkpoint(FAMILIES[family], tmp_path / "model")
    whole = load(Model(path=str(folder))).model
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {part: "disk" if part in on_disk else "cpu" for part in parts}
    spread = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "weights", attn_implementation=FAMILIES[family].attention
    ).eval()
    assert {next(layer.parameters()).device.type for layer in spread.model.layers} == {"cpu", "meta"}
    assert input_device(spread) == device_of(spread.model.layers[1]) == torch.device("cpu")
    answers = []
    for model in (whole, spread):
        with install(model, pruning()) as installed:
            done = generate(
                Loaded(model, None, 512, 4, "float32"), [tokens_of(300, 1), tokens_of(200, 2)], max_new_tok=4, prefill_chunk_tok=64,
                installed=installed,
            )  # fmt: skip
            answers.append([one.tokens for one in done])
    assert answers[0] == answers[1]


def test_a_device_map_of_the_command_line(tmp_path):
    folder = checkpoint(FAMILIES["Llama 3"], tmp_path / "model")
    for device_map in ("cpu", "auto"):
        assert input_device(load(Model(path=str(folder), device_map=device_map)).model).type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match=r"model\.device_map=nowhere is not possible here: "):
        load(Model(path=str(folder), device_map="nowhere"))


def test_where_weights_lie_is_no_other_result(tmp_path):
    folder = checkpoint(FAMILIES["Llama 3"], tmp_path / "model")
    words = ["model=hf", f"model.path={folder}", "task=passkey", "task.lengths_tok=[300]"]
    one, other = (key_of(compose([*words, *more])) for more in ([], ["model.device_map=auto"]))
    assert one == other
    timed = [*words[:2], "task=latency", "task.lengths_tok=[300]"]
    assert key_of(compose(timed)) != key_of(compose([*timed, "model.device_map=auto"]))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
