"""Queries and keys of a model as its attention sees them, before rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hipexp.attention import LayerAttention
from hipexp.config.schema import Pipeline
from hipexp.hf.devices import input_device
from hipexp.hf.install import install
from hipexp.hf.load import Loaded


@dataclass
class _Listening(LayerAttention):
    """A layer's attention that keeps what it was asked."""

    heard: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.heard = q.clone(), k.clone()
        return super().__call__(q, k, v, *args, **kwargs)


def _listening(attention: LayerAttention) -> _Listening:
    return _Listening(**{item.name: getattr(attention, item.name) for item in fields(attention) if item.init})


@torch.inference_mode()
def activations(loaded: Loaded, tokens: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Raw queries ``[H, T, D]`` and keys ``[K, T, D]`` of every attached layer of a model that reads ``tokens`` densely."""
    everything = Pipeline(method="streaming", window_tok=len(tokens) + 1)
    with install(loaded.model, everything, loaded.trained_tok) as installed:
        listening = {i: _listening(attention) for i, attention in installed.layers.items()}
        installed.layers.update(listening)
        loaded.model(input_ids=torch.tensor([list(tokens)], device=input_device(loaded.model)), use_cache=False, logits_to_keep=1)
    return {i: one.heard for i, one in listening.items() if one.heard is not None}
