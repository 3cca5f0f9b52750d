"""Does a model still compute what it did? A short prompt before and after an installation, every query of which attends to everything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hipexp.attention import LayerAttention
from hipexp.config.schema import ConfigError

PROBE_TOK = 48
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest output
HALF_TOLERANCE = 0.05  # in half precision
_PASSED: WeakKeyDictionary[PreTrainedModel, set[bool]] = WeakKeyDictionary()  # with a pipeline, without


@contextmanager
def same_as_before(model: PreTrainedModel, layers: Collection[LayerAttention]) -> Iterator[Callable[[], None]]:
    """Run a short prompt, and hand out a check that runs it again: to be called once the attention is replaced.

    ``layers``: the new attentions, none if all are dense. The check raises ConfigError if the outputs differ by more than rounding
    does. A model that passed is not checked again.
    """
    kind = bool(layers)
    if kind in _PASSED.get(model, ()):
        yield lambda: None
        return
    before = _outputs(model)

    def check() -> None:
        for layer in layers:
            layer.everything = True
        after = _outputs(model)
        for layer in layers:
            layer.everything = False
        apart, largest = float((after - before).abs().max()), float(before.abs().max())
        if not apart <= TOLERANCE.get(model.dtype, HALF_TOLERANCE) * largest:
            raise ConfigError(
                f"model type {model.config.model_type!r} is not supported: on {PROBE_TOK} tokens, where every key is seen, its outputs "
                f"under hipexp's attention are {apart:.3g} away from its own (the largest is {largest:.3g}); "
                "its attention does something else"
            )
        _PASSED.setdefault(model, set()).add(kind)

    yield check


@torch.inference_mode()
def _outputs(model: PreTrainedModel) -> Tensor:
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(1, PROBE_TOK + 1, device=model.device) * 7919 % vocab
    return model(input_ids=ids[None], use_cache=False)[0].float()
