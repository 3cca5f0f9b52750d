"""Norms and MLPs by torch.compile: the same answers; refused where nothing can compile."""

import shutil

import pytest
import torch

from hipexp.config.compiler import missing_compiler
from hipexp.config.schema import ConfigError, Model, Pipeline, Stage
from hipexp.hf import end_tokens, generate, install, load
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
    assert (tokens, "norms and MLPs are compiled by torch" in notes) == (answer(False)[0], True)


def test_refused_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"model\.compile=true needs a C\+\+ compiler"):
        load(Model(path="hipexp/needle/model", compile=True))
