"""Where the parts of a model compute: on one device, or spread by accelerate over several, the CPU and the disk."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes: that of its hooks, where its weights come from elsewhere, else of its weights."""
    for part in module.modules():
        for hook in _hooks(getattr(part, "_hf_hook", None)):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model wants its tokens: that of its embedding."""
    return device_of(model.get_input_embeddings())


def _hooks(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):  # several in a row
            yield from _hooks(inner)
