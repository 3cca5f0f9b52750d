"""Queries and keys of a model as its attention sees them, before rotation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hipexp.attention import LayerAttention
from hipexp.config.schema import Pipeline
from hipexp.hf.install import install
from hipexp.hf.load import Loaded


class _Listening:
    """A layer's attention that keeps what it was asked."""

    def __init__(self, attention: LayerAttention):
        self._attention, self.pruned_blocks = attention, 0
        self.heard: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        self.heard = q.clone(), k.clone()
        return self._attention(q, k, v, *args, **kwargs)


@torch.inference_mode()
def activations(loaded: Loaded, tokens: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Raw queries ``[H, T, D]`` and keys ``[K, T, D]`` of every attached layer of a model that reads ``tokens`` densely."""
    everything = Pipeline(method="streaming", window_tok=len(tokens) + 1)
    with install(loaded.model, everything, loaded.trained_tok) as installed:
        listening = {i: _Listening(attention) for i, attention in installed.layers.items()}
        installed.layers.update(listening)  # type: ignore[arg-type]
        loaded.model(input_ids=torch.tensor([list(tokens)], device=loaded.model.device), use_cache=False, logits_to_keep=1)
    return {i: one.heard for i, one in listening.items() if one.heard is not None}
