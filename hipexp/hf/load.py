"""Load a model and its tokenizer from the package, a local folder or the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hipexp.config.model import model_folder
from hipexp.config.schema import ConfigError, Model
from hipexp.hf.window import check_transformers

@dataclass
class Loaded:
    """A model ready for inference. ``revision``: content hash of a local folder, or the hub commit."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trained_tok: int
    n_layers: int
    revision: str
    dtype: str


def folder_revision(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's files (README aside), first 16 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix != ".md"):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def load(config: Model) -> Loaded:
    """Load ``config.path`` in evaluation mode. Raises ConfigError if a local folder has no ``config.json``, and what the hub raises."""
    check_transformers()
    folder = model_folder(config)
    if folder is not None and not (folder / "config.json").exists():
        raise ConfigError(f"model.path={config.path!r} must be a folder with config.json, or a hub id; {folder} has none")
    source, hub = (str(folder), {}) if folder else (config.path, {"revision": config.revision})
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **hub).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    revision = folder_revision(folder) if folder else (getattr(model.config, "_commit_hash", None) or str(config.revision))
    text = model.config.get_text_config()
    trained = config.trained_tok or text.max_position_embeddings
    return Loaded(model, tokenizer, trained, text.num_hidden_layers, revision, str(model.dtype).removeprefix("torch."))
