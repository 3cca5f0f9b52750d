"""What each layer of a model does, and which models cannot be attached at all."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers import PreTrainedModel

from hipexp.config.schema import ConfigError, spans

FULL, SLIDING = "full_attention", "sliding_attention"
WITHOUT_KEYS = ("linear_attention", "conv", "mamba")  # layers whose state does not grow


@dataclass(frozen=True)
class LayerKind:
    """``name`` as in the model's ``layer_types``. ``window_tok``: how many keys a query sees, its own among them; None: all.

    ``keeps``: why the layer keeps its own attention, RoPE and positions; empty if the pipeline attends for it.
    """

    name: str = FULL
    window_tok: int | None = None
    keeps: str = ""

    @property
    def attends(self) -> bool:
        """Whether it has keys and values."""
        return self.name not in WITHOUT_KEYS


def layer_kinds(model: PreTrainedModel) -> list[LayerKind]:
    """The kind of every layer of a model's decoder. Raises ConfigError for a model that cannot be attached, also as :func:`decoder_of`."""
    decoder, config = decoder_of(model), model.config.get_text_config()
    n, window = len(decoder.layers), getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None
    names = list(getattr(config, "layer_types", None) or [])
    if not names:  # a window as long as anything that was trained hides nothing
        names = [FULL if window is None or window >= config.max_position_embeddings else SLIDING] * n
    kinds = [_kind(model, name, window) for name in names[:n]]
    for layer, source in _shared(config, names[:n]).items():
        kinds[layer] = LayerKind(names[layer], kinds[layer].window_tok, f"uses keys and values of layer {source}")
        kinds[source] = LayerKind(names[source], kinds[source].window_tok, kinds[source].keeps or "later layers use its keys and values")
    return kinds


def check_some_attached(model: PreTrainedModel, kinds: list[LayerKind]) -> None:
    """Raise ConfigError if a pipeline has nothing to do in a model."""
    if all(kind.keeps for kind in kinds):
        reasons = ", ".join(dict.fromkeys(kind.keeps for kind in kinds))
        raise _refusal(model, f"no layer of it sees all tokens ({reasons}), so that a pipeline has nothing to do")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module with ``layers`` and ``rotary_emb``. Raises ConfigError for a model whose attention cannot be replaced."""
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(model, "it has an encoder and a decoder; only decoders can be attached")
    if getattr(config, "kv_lora_rank", None):
        raise _refusal(model, "it has multi-head latent attention (MLA), whose cache holds no keys that could be pruned")
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise _refusal(model, "its positions are ALiBi, a bias on the logits; RoPE or none is needed")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)
    if not (hasattr(decoder, "layers") and hasattr(decoder, "rotary_emb")):
        raise _refusal(model, "it needs decoder.layers and decoder.rotary_emb")
    attentions = [layer.self_attn for layer in decoder.layers if hasattr(layer, "self_attn")]
    if not attentions:
        raise _refusal(model, "it needs decoder.layers[i].self_attn")
    if not hasattr(attentions[0], "scaling"):
        raise _refusal(model, "its attention has no scaling, so it does not use transformers' attention interface")
    if _interleaved(type(attentions[0]).__module__):
        raise _refusal(model, "its RoPE turns pairs of neighbouring dimensions (interleaved), and hipexp's halves")
    return decoder


def kept_layers(kinds: list[LayerKind]) -> list[str]:
    """A line for each reason why layers keep their own attention, as in ``layers 0-4,6-10: a sliding window of 1024 tokens``."""
    reasons = dict.fromkeys(kind.keeps for kind in kinds if kind.keeps)
    layers = {reason: [i for i, kind in enumerate(kinds) if kind.keeps == reason] for reason in reasons}
    return [f"layer{'s' if len(found) > 1 else ''} {spans(found)}: own attention ({reason})" for reason, found in layers.items()]


def _kind(model: PreTrainedModel, name: str, window: int | None) -> LayerKind:
    if name == FULL:
        return LayerKind()
    if name in WITHOUT_KEYS:
        return LayerKind(name, keeps=name.replace("_", " "))
    if name == SLIDING and window:
        return LayerKind(name, window, f"a sliding window of {window} tokens")
    raise _refusal(model, f"it has layers of kind {name}; {FULL}, {SLIDING} and {', '.join(WITHOUT_KEYS)} are known here")


def _shared(config: object, names: list[str]) -> dict[int, int]:
    """Layers that have no keys of their own, and whose they use, as in Gemma-3n: of the last layer before them of the same kind."""
    first = len(names) - (getattr(config, "num_kv_shared_layers", None) or 0)
    own = names[:first]
    return {i: len(own) - 1 - own[::-1].index(names[i]) for i in range(first, len(names)) if names[i] in own}


@cache
def _interleaved(file: str) -> bool:
    """Whether the RoPE of a model's file pairs neighbouring dimensions."""
    rotate = getattr(sys.modules[file], "rotate_half", None)
    try:
        return rotate is not None and "::2]" in inspect.getsource(rotate)
    except (OSError, TypeError):
        return False  # without its source: the check on installation tells


def _refusal(model: PreTrainedModel, why: str) -> ConfigError:
    return ConfigError(f"model type {model.config.model_type!r} cannot be attached: {why}")
