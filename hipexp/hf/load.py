"""Load a model and its tokenizer from the package, a local folder or the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from hipexp_kernels.dispatch import has_triton
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from hipexp.config.compiler import check_compiler
from hipexp.config.model import files_of, model_folder
from hipexp.config.processes import check_started, started
from hipexp.config.schema import ConfigError, Model, spans
from hipexp.hf.kinds import LayerKind, decoder_of, kept_layers, layer_kinds
from hipexp.hf.parallel import check_plan, note_of
from hipexp.hf.quantized import Quantization, compute_dtype, is_quantized, quantization_of
from hipexp.hf.rotary import original_tok, rope_type, turned_layers
from hipexp.hf.window import check_transformers

# That a class of modules is compiled for before torch gives up on more of them: with or without a batch, parts of a prompt of any length,
# decode steps, and norms of heads all over again.
SHAPES = 64


@dataclass
class Loaded:
    """A model ready for inference, its tokenizer and its trained length.

    ``own_layers``: those that keep the model's own attention under a pipeline; ``notes``: which, why, and what else is peculiar.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trained_tok: int
    n_layers: int
    dtype: str
    own_layers: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load(config: Model) -> Loaded:
    """Load ``config.path`` in evaluation mode, on the GPU if there is one, spread as ``config.device_map`` says, or split over processes.

    Quantised weights are loaded as they are stored, by the package that transformers has for them. Raises ConfigError if a local folder has
    no ``config.json``, the model cannot be attached or split, or such a package is missing, and what the hub raises.
    """
    check_transformers()
    check_started(config)
    check_compiler(config)
    source, hub = _source(config)
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        built = AutoConfig.from_pretrained(source, **hub)
    except ValueError as failure:
        known = f"transformers {transformers.__version__}"
        raise ConfigError(f"model.path={config.path} is no model that {known} has: {_first(failure)}") from failure
    text = built.get_text_config()
    # torch's own attention does not cap logits; hipexp's replaces either
    attention = "eager" if getattr(text, "attn_logit_softcapping", None) else None
    stored = quantization_of(built, config.path)
    on_gpu = torch.cuda.is_available() and not config.device_map and not config.tp_plan
    device_map = "cuda" if on_gpu and stored else config.device_map  # quantised weights go where they belong as they are read
    spread: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if config.tp_plan:
        check_plan(built, config.path)
        spread = {"distributed_config": DistributedConfig(tp_size=started().count, tp_plan=config.tp_plan)}
    with _refusals(config, stored):
        model = AutoModelForCausalLM.from_pretrained(
            source, config=built, dtype=dtype, attn_implementation=attention, **spread, **hub
        ).eval()
        if on_gpu and not stored:
            model = model.to("cuda")
        kinds = layer_kinds(model)
        notes = notes_of(model, kinds)  # its first pass: some methods ask for their kernels only then
    trained_tok, form = config.trained_tok or text.max_position_embeddings, str(compute_dtype(model)).removeprefix("torch.")
    if config.compile:
        notes.append(f"compiled by torch: {', '.join(compile_parts(model))}")
    if stored:
        read = "" if is_quantized(model) else f", which transformers turned into {form} while loading"
        notes.append(f"weights: {stored}{read}; hipexp did not test it")
    own_layers = [i for i, kind in enumerate(kinds) if kind.keeps]
    return Loaded(model, load_tokenizer(config), trained_tok, text.num_hidden_layers, form, own_layers, notes)


def compile_parts(model: PreTrainedModel) -> list[str]:
    """Let torch compile every norm and MLP of a model, when they first run; return their classes.

    Raises ConfigError for a model that has none, that accelerate spread over several devices (what it does before and after every module
    cuts all of them into pieces of their own), whose quantised weights do not compile, and on a GPU without Triton.
    """
    parts = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "LayerNorm", "MLP"))]
    quantizer = getattr(model, "hf_quantizer", None)
    if not parts:
        raise ConfigError(f"model.compile=true: no module of {type(model).__name__} is called so (RMSNorm, LayerNorm, MLP); leave it out")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ConfigError("model.compile=true needs a model on one device, and model.device_map has spread it; leave one of them out")
    if is_quantized(model) and not getattr(quantizer, "is_compileable", False):
        raise ConfigError(f"model.compile=true: transformers says that {type(quantizer).__name__}'s weights do not compile; leave it out")
    if model.device.type == "cuda" and not has_triton():
        raise ConfigError("model.compile=true needs Triton on a GPU, which is not installed: python -m pip install 'hipexp[triton]'")
    torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
    for module in parts:
        module.compile()
    return sorted({type(module).__name__ for module in parts})


@contextmanager
def _refusals(config: Model, stored: Quantization | None) -> Iterator[None]:
    """Turn what transformers cannot do with quantised weights, or with ``model.device_map``, into ConfigError; memory that ends stays."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (ValueError, ImportError, RuntimeError) as failure:
        if stored and (stored.missing or not config.device_map):
            raise stored.refusal(config.path, _first(failure)) from failure
        if config.device_map:
            raise ConfigError(f"model.device_map={config.device_map} is not possible here: {_first(failure)}") from failure
        raise


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The tokens that end an answer: those of the model's generation configuration, and the tokenizer's end of text."""
    told = getattr(model.generation_config, "eos_token_id", None)
    ids = {*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id if tokenizer else None}
    return {i for i in ids if i is not None}


def _first(error: Exception) -> str:
    """What an error of transformers says, or why: it needs code from the model's repository."""
    if "trust_remote_code" in str(error):
        return "its code lies in its own repository (remote code), which hipexp does not run; use a model whose type is built in"
    return str(error).splitlines()[0]


def notes_of(model: PreTrainedModel, kinds: list[LayerKind]) -> list[str]:
    """What is peculiar about the layers of a model: which keep their own attention, which have no RoPE, two sets of factors."""
    decoder = decoder_of(model)
    turned = turned_layers(model, decoder)
    plain = [i for i, kind in enumerate(kinds) if kind.attends and not kind.keeps and i not in turned]
    notes = kept_layers(kinds)
    if plain:
        notes.append(f"layer{'s' if len(plain) > 1 else ''} {spans(plain)}: no RoPE")
    if rope_type(decoder) == "longrope":
        notes.append(f"RoPE of type longrope: long factors for prompts of more than {original_tok(model)} tokens, fixed for the request")
    return notes + note_of(model)


def load_tokenizer(config: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights; it never warns about long text, that being the point. Raises as :func:`load`.

    Beside that of a served model there need not be a ``config.json``.
    """
    source, hub = _source(config)
    place = "{}={!r}".format(*files_of(config))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub)
    except ValueError as failure:
        also = " (or its tokenizer was never fetched: `hf download` the model)" if hub else ""
        raise ConfigError(f"{place} must come with a tokenizer that transformers can load{also}: {failure}") from failure
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _source(config: Model) -> tuple[str, dict[str, str | None]]:
    """What transformers is asked for: a folder, or a hub id with its revision."""
    folder = model_folder(config)
    if folder is None:
        return files_of(config)[1], {"revision": config.revision}
    if config.base_url is None and not (folder / "config.json").exists():
        raise ConfigError(f"model.path={config.path!r} must be a folder with config.json, or a hub id; {folder} has none")
    return str(folder), {}
