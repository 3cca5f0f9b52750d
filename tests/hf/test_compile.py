"""Norms and MLPs by torch.compile: the same answers; refused where nothing can compile."""

import shutil
import sysconfig
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from hipexp.config.compiler import missing_compiler
from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, Model, Pipeline, Stage
from hipexp.hf import end_tokens, generate, install, load
from hipexp.hf.load import compile_parts
from hipexp.run.point import check_point
from hipexp.suites import infbench
from hipexp.suites.sample import LineEncoder

PIPELINE = Pipeline(stages=[Stage(32, 256, 64, 4, 4), Stage(8, 128, 64, 1, 2)], sink_tok=32, window_tok=64)


def answer(compiled):
    loaded = load(Model(path="hipexp/needle/model", compile=compiled))
    sample = infbench.make_sample("passkey", 0, 1, 600, LineEncoder(loaded.tokenizer), 0, "default")
    with install(loaded.model, PIPELINE, loaded.trained_tok) as installed:
        asked = dict(max_new_tok=12, prefill_chunk_tok=128, stop_ids=end_tokens(loaded.model, loaded.tokenizer))
        (made,) = generate(loaded, [sample.tokens], installed=installed, **asked)
    return made.tokens, loaded.notes


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason="nothing compiles without a C++ compiler")
def test_answers_are_those_of_a_model_that_is_not_compiled():
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    tokens, notes = answer(True)
    assert compiled["unique_graphs"] >= before + 2, "norms and MLPs are graphs"
    assert (tokens, "compiled by torch: LlamaMLP, LlamaRMSNorm" in notes) == (answer(False)[0], True)


@pytest.mark.parametrize(("nothing", "told"), [((shutil, "which"), r"no C\+\+ compiler"), ((sysconfig, "get_path"), "no Python.h")])
def test_refused_before_anything_loads_where_nothing_compiles(monkeypatch, nothing, told):
    monkeypatch.setattr(*nothing, lambda name: "")
    with pytest.raises(ConfigError, match=rf"model\.compile=true needs .*, and there is {told} here; install g\+\+ and python3-dev"):
        load(Model(path="nowhere", compile=True))
    with pytest.raises(ConfigError, match=told):
        check_point(compose(["model.compile=true"]))


def tiny():
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=99
    )
    return AutoModelForCausalLM.from_config(Qwen3Config(**sizes)).eval()


def test_every_shape_is_compiled_that_comes(monkeypatch):
    """Norms of tokens and of heads are one class, for which there are parts of prompts, decode steps and batches of both."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    given_up = torch._dynamo.utils.counters["unimplemented"]
    given_up.clear()
    model = tiny()
    assert compile_parts(model) == ["Qwen3MLP", "Qwen3RMSNorm"]
    with torch.inference_mode():
        for n_tok in (64, 30, 1, 17):
            for rows in (1, 2, 3):
                model(input_ids=torch.ones(rows, n_tok, dtype=torch.long), use_cache=False)
    assert not given_up


def test_models_that_do_not_compile_are_refused():
    spread, quantised = tiny(), tiny()
    spread.model.norm._hf_hook = object()
    with pytest.raises(ConfigError, match=r"one device, and model\.device_map has spread it"):
        compile_parts(spread)
    quantised.is_quantized, quantised.hf_quantizer = True, SimpleNamespace(is_compileable=False)
    with pytest.raises(ConfigError, match="SimpleNamespace's weights do not compile"):
        compile_parts(quantised)
    with pytest.raises(ConfigError, match="no module of Linear is called so"):
        compile_parts(torch.nn.Linear(2, 2))
    quantised.hf_quantizer.is_compileable = True
    assert compile_parts(quantised)
