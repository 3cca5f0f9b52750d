"""Where a model lies and what its ``config.json`` says, without loading it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError, Model

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class ModelFacts:
    """What the checks need to know of a model: ``layers`` and the trained length ``trained_tok``."""

    layers: int
    trained_tok: int


def model_folder(model: Model) -> Path | None:
    """The folder of a model that is on this machine, or None for a hub id.

    ``hipexp/…`` lies inside this package, wherever it is installed; anything else is a folder if it exists, else a hub
    id if it looks like one. Raises ConfigError if it is neither.
    """
    if model.path.startswith("hipexp/"):
        return PACKAGE / model.path.removeprefix("hipexp/")
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model.path):
        return None
    raise ConfigError(f"model.path={model.path} is no folder here and no hub id like 'org/model'; check the path")


def read_facts(model: Model) -> ModelFacts | None:
    """Layers and trained length from the model's ``config.json``; None for a hub id. Raises ConfigError if it cannot be read."""
    folder = model_folder(model)
    return None if folder is None else facts_in(folder / "config.json", model)


def read_config(path: Path, model: Model) -> dict[str, Any]:
    """What the ``config.json`` of a model holds. Raises ConfigError if it cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        repair = "train it with `make needle`" if model.path.startswith("hipexp/") else "check the path"
        raise ConfigError(f"model.path={model.path} must hold a model, but {path.parent} has no readable config.json; {repair}") from error
    return config


def facts_in(path: Path, model: Model) -> ModelFacts:
    """Layers and trained length from the ``config.json`` at ``path``. Raises ConfigError if they are not there."""
    config = read_config(path, model)
    config = config.get("text_config", config)
    layers, trained_tok = config.get("num_hidden_layers"), model.trained_tok or config.get("max_position_embeddings")
    if not layers or not trained_tok:
        raise ConfigError(
            f"model.path={model.path}: config.json must give num_hidden_layers and max_position_embeddings; "
            "for a missing trained length set model.trained_tok"
        )
    return ModelFacts(layers, trained_tok)
