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
    """What the checks need to know of a model: ``layers`` (0: served, and nobody's business) and the trained length ``trained_tok``."""

    layers: int
    trained_tok: int


def files_of(model: Model) -> tuple[str, str]:
    """The key that says where a model's files are, and its value; of a served model they are those of its tokenizer."""
    return ("model.path", model.path) if model.tokenizer is None else ("model.tokenizer", model.tokenizer)


def model_folder(model: Model) -> Path | None:
    """The folder of a model (of a served one, of its tokenizer) that is on this machine, or None for a hub id.

    ``hipexp/…`` lies inside this package, wherever it is installed; anything else is a folder if it exists, else a hub
    id if it looks like one. Raises ConfigError if it is neither, and for a revision of a served model's folder.
    """
    key, path = files_of(model)
    inside = path.startswith("hipexp/")
    folder = PACKAGE / path.removeprefix("hipexp/") if inside else Path(path).expanduser()
    if inside or folder.is_dir():
        if model.base_url is not None and model.revision is not None:
            raise ConfigError(f"model.revision={model.revision} is for a tokenizer on a hub, and {key}={path} is a folder; leave it out")
        return folder
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        return None
    served = model.base_url is not None and model.tokenizer is None
    repair = "name the served model's tokenizer, as in model.tokenizer=<folder or hub id>" if served else "check the path"
    raise ConfigError(f"{key}={path} is no folder here and no hub id like 'org/model'; {repair}")


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
        key, place = files_of(model)
        repair = "train it with `make needle`" if place.startswith("hipexp/") else "check the path"
        repair = "set model.trained_tok" if model.base_url is not None else repair
        raise ConfigError(f"{key}={place} must hold a model, but {path.parent} has no readable config.json; {repair}") from error
    return config


def facts_in(path: Path, model: Model) -> ModelFacts:
    """Layers and trained length from the ``config.json`` at ``path``. Raises ConfigError if they are not there."""
    served = model.base_url is not None
    if served and model.trained_tok:
        return ModelFacts(0, model.trained_tok)
    config = read_config(path, model)
    config = config.get("text_config", config)
    layers, trained_tok = config.get("num_hidden_layers"), model.trained_tok or config.get("max_position_embeddings")
    if not (layers or served) or not trained_tok:
        raise ConfigError(
            f"{'='.join(files_of(model))}: config.json must give num_hidden_layers and max_position_embeddings; "
            "for a missing trained length set model.trained_tok"
        )
    return ModelFacts(0 if served else layers, trained_tok)
