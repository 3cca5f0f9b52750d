"""Points without a model: what ``tests/run``, ``tests/repro`` and ``tests/tune`` share."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

import hipexp
from hipexp.config.schema import Experiment, Model, Offload, Pipeline, Task
from hipexp.run import environment, identity

sys.path.insert(0, str(Path(__file__).parent))
import fake_hf


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "max_position_embeddings": 512, **heads}))
    (folder / "model.safetensors").write_bytes(b"none")
    return folder


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The fake model in place of ``hipexp.hf``, and an empty ``runs`` folder. Torch is not asked for its version, for speed."""
    module = fake_hf.as_module()
    monkeypatch.setitem(sys.modules, "hipexp.hf", module)
    monkeypatch.setattr(hipexp, "hf", module, raising=False)
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(environment, "describe_environment", dict)
    monkeypatch.setattr(identity, "machine", lambda: {"device": "fake"})
    for name, value in (("seconds", 0.0), ("fail", None), ("calls", 0)):
        monkeypatch.setattr(fake_hf.SETTINGS, name, value)
    return fake_hf.SETTINGS


@pytest.fixture
def experiment(model_folder):
    """``experiment(task=..., pipeline=...)`` makes a small one."""

    def make(pipeline: Pipeline | None = None, name: str = "infbench", **task):
        settings = {"subtasks": ["passkey", "kv_retrieval"], "samples": 4, "length_tok": 600} if name == "infbench" else {}
        return Experiment(model=Model(path=str(model_folder), name="fake"), task=Task(name=name, **(settings | task)), pipeline=pipeline)

    return make


@pytest.fixture
def offloaded(experiment):
    """``offloaded(offload, task=...)``: a small one with sink and window, whose keys and values are off the device."""

    def make(offload: Offload | None = None, **task):
        return dataclasses.replace(
            experiment(Pipeline("streaming", "streaming"), **task), offload=offload or Offload("host", device_tok=16384)
        )

    return make
