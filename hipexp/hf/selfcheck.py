"""Does a model still compute what it did? A short prompt before and after an installation, every query of which attends to everything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
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
HALF_TOLERANCE = 0.05  # in half precision
# Where activations are quantised too, rounding moves some of them by a step: 8 bits of both, in bf16, sdpa against eager differ by 0.073.
QUANTIZED_TOLERANCE = 0.15
_PASSED: WeakKeyDictionary[PreTrainedModel, set[bool]] = WeakKeyDictionary()  # with a pipeline, without


@contextmanager
def same_as_before(model: PreTrainedModel, decoder: nn.Module, layers: Collection[LayerAttention]) -> Iterator[Callable[[], None]]:
    """Run a short prompt, and hand out a check that runs it again: to be called once the attention is replaced.

    ``decoder``: the part of the model with ``layers``; ``layers``: their new attentions, none if all are dense. The check raises
    ConfigError if the logits differ by more than rounding does, and names the first layer whose attention does; of a model split over
    processes in all of them, if they do in one. A model that passed is not checked again.
    """
    kind = bool(layers)
    if kind in _PASSED.get(model, ()):
        yield lambda: None
        return
    before = _outputs(model, decoder)

    def check() -> None:
        for layer in layers:
            layer.everything = True
        after = _outputs(model, decoder)
        for layer in layers:
            layer.everything = False
        allowed = QUANTIZED_TOLERANCE if is_quantized(model) else TOLERANCE.get(model.dtype, HALF_TOLERANCE)
        if anywhere(differ(before[-1], after[-1], allowed), processes_of(model), input_device(model)):
            apart, largest = float((after[-1] - before[-1]).abs().max()), float(before[-1].abs().max())
            at = next((i for i, pair in enumerate(zip(before, after, strict=True)) if differ(*pair, allowed)), len(before) - 1)
            raise ConfigError(
                f"model type {model.config.model_type!r} is not supported: on {PROBE_TOK} tokens, where every key is seen, its logits "
                f"under hipexp's attention are {apart:.3g} away from its own (the largest is {largest:.3g}); "
                f"the attention of layer {min(at, len(before) - 2)} does something else"
            )
        _PASSED.setdefault(model, set()).add(kind)

    yield check


def differ(old: Tensor, new: Tensor, allowed: float) -> bool:
    """Whether two outputs are apart by more than a part of the largest number; not-a-number always is."""
    return not float((new - old).abs().max()) <= allowed * float(old.abs().max())


@torch.inference_mode()
def _outputs(model: PreTrainedModel, decoder: nn.Module) -> list[Tensor]:
    """What the attention of every layer puts out (of a layer without keys: the layer), and the logits."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).float())

    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(1, PROBE_TOK + 1, device=input_device(model)) * 7919 % vocab
    hooks = [getattr(layer, "self_attn", layer).register_forward_hook(keep) for layer in decoder.layers]
    try:
        logits = model(input_ids=ids[None], use_cache=False)[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, logits]
