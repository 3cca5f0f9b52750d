"""Shared by the configuration tests: a folder that looks like a model of five layers."""

import json

import pytest


@pytest.fixture
def model_path(tmp_path):
    """Overrides for a model of which only ``config.json`` exists: 5 layers, trained on 6144 tokens."""
    folder = tmp_path / "five-layers"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 5, "max_position_embeddings": 6144}))
    return ["model=hf", f"model.path={folder}"]
