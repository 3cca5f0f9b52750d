"""Where a model lies and what its ``config.json`` says, without loading it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError, Model

PACKAGE = Path(__file__).parents[1]
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """What the checks need to know of a model: ``layers`` (0: served, and nobody's business) and the trained length ``trained_tok``.

    ``kv_heads``, ``head_dim`` (0: not said) and ``itemsize``, bytes of a number, make the size of its keys and values.
    """

    layers: int
    trained_tok: int
    kv_heads: int = 0
    head_dim: int = 0
    itemsize: int = 4


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
    """What the model's ``config.json`` says; None for a hub id. Raises ConfigError if it cannot be read."""
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
    """What the ``config.json`` at ``path`` says. Raises ConfigError if layers or trained length are not there."""
    served = model.base_url is not None
    if served and model.trained_tok:
        return ModelFacts(0, model.trained_tok)
    whole = read_config(path, model)
    config = whole.get("text_config", whole)
    layers, trained_tok = config.get("num_hidden_layers"), model.trained_tok or config.get("max_position_embeddings")
    if not (layers or served) or not trained_tok:
        raise ConfigError(
            f"{'='.join(files_of(model))}: config.json must give num_hidden_layers and max_position_embeddings; "
            "for a missing trained length set model.trained_tok"
        )
    return ModelFacts(0, trained_tok) if served else ModelFacts(layers, trained_tok, *head_sizes(config), _itemsize(model, config, whole))


def head_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Key/value heads and head dimension, 0 for what is not said."""
    heads = config.get("num_attention_heads") or 0
    head_dim = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    return config.get("num_key_value_heads") or heads, head_dim


def _itemsize(model: Model, config: dict[str, Any], whole: dict[str, Any]) -> int:
    """Bytes of a number: of the configured format, or for ``auto`` of that in ``config.json``, float32 where it names none."""
    told = (
        model.dtype
        if model.dtype != "auto"
        else next((part[key] for part in (config, whole) for key in ("dtype", "torch_dtype") if part.get(key)), "")
    )
    return ITEMSIZE.get(str(told).removeprefix("torch."), ITEMSIZE["float32"])
