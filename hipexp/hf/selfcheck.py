"""Does a model still compute what it did? A short prompt before and after an installation, every query of which attends to everything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hipexp.attention import LayerAttention
from hipexp.config.schema import ConfigError
from hipexp.hf.devices import input_device
from hipexp.hf.parallel import anywhere, processes_of
from hipexp.hf.quantized import is_quantized

PROBE_TOK = 48
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest output
# In half precision, where rounding came to 0.009 at most over all families, and a scale that is 10 % off to 0.04 or more in most. And where
# activations are quantised too, which rounding moves by a step: 8 bits of them in bf16 came to 0.013.
COARSE_TOLERANCE = 0.03
_PASSED: WeakKeyDictionary[PreTrainedModel, set[bool]] = WeakKeyDictionary()  # with a pipeline, without


@contextmanager
def same_as_before(model: PreTrainedModel, decoder: nn.Module, layers: Collection[LayerAttention]) -> Iterator[Callable[[], None]]:
    """Run a short prompt, and hand out a check that runs it again: to be called once the attention is replaced.

    ``decoder``: the part of the model with ``layers``; ``layers``: their new attentions, none if all are dense. Every attention is given
    what it was given before, so that rounding of many layers does not add up. The check raises ConfigError if one puts out something that
    differs by more than rounding does, and names the first; of a model split over processes in all of them, if one does in one. A model
    that passed is not checked again.
    """
    kind = bool(layers)
    if kind in _PASSED.get(model, ()):
        yield lambda: None
        return
    before = _passes(model, decoder)

    def check() -> None:
        for layer in layers:
            layer.everything = True
        after = _passes(model, decoder, given=[one.given for one in before])
        for layer in layers:
            layer.everything = False
        allowed = COARSE_TOLERANCE if is_quantized(model) else TOLERANCE.get(model.dtype, COARSE_TOLERANCE)
        wrong = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if differ(old.out, new.out, allowed)]
        if anywhere(bool(wrong), processes_of(model), input_device(model)):
            told = _told(wrong[0], before[wrong[0]].out, after[wrong[0]].out) if wrong else "a layer does something else on another process"
            raise ConfigError(
                f"model type {model.config.model_type!r} is not supported: on {PROBE_TOK} tokens, where every key is seen, {told}"
            )
        _PASSED.setdefault(model, set()).add(kind)

    yield check


def _told(layer: int, old: Tensor, new: Tensor) -> str:
    apart, largest = float((new - old).abs().max()), float(old.abs().max())
    return (
        f"the attention of layer {layer} does something else: under hipexp's it puts out numbers that are {apart:.3g} "
        f"away from the model's own (the largest is {largest:.3g})"
    )


def differ(old: Tensor, new: Tensor, allowed: float) -> bool:
    """Whether two outputs are apart by more than a part of the largest number; not-a-number always is."""
    return not float((new - old).abs().max()) <= allowed * float(old.abs().max())


class _Pass(NamedTuple):
    """What an attention (of a layer without keys: the layer) was given, and what it put out."""

    given: Tensor
    out: Tensor


@torch.inference_mode()
def _passes(model: PreTrainedModel, decoder: nn.Module, given: Sequence[Tensor] = ()) -> list[_Pass]:
    """Every layer's attention on a short prompt; ``given``: what each is given, in place of what comes out of the layer before."""
    heard: list[Tensor] = []
    found: list[_Pass] = []

    def hear(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        named = "hidden_states" in kwargs
        heard.append(given[len(heard)] if given else kwargs["hidden_states"] if named else args[0])
        return (args, kwargs | {"hidden_states": heard[-1]}) if named else ((heard[-1], *args[1:]), kwargs)

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(_Pass(heard[len(found)], (output[0] if isinstance(output, tuple) else output).float()))

    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(1, PROBE_TOK + 1, device=input_device(model)) * 7919 % vocab
    with ExitStack() as hooks:
        for module in (getattr(layer, "self_attn", layer) for layer in decoder.layers):
            hooks.callback(module.register_forward_pre_hook(hear, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(keep).remove)
        model(input_ids=ids[None], use_cache=False)
    return found
