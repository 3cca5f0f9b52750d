"""Layer-major prefill: a layer reads all chunks of a prompt before the next one begins, so only one layer's keys and values are in use.

No model code is repeated here. Every chunk's pass is made once per layer, by the model itself: the layers before do nothing, the layer
computes from what it was handed the last time, and the pass ends where the next layer begins; only passes for the last layer go on to the
logits. What a model does beside its layers (embedding, angles, mask) is done again each time: little against a layer, and not kept. What is
kept from layer to layer is one ``[B, Q, hidden_size]`` per chunk, so ``hidden_size`` numbers per token of the prompt: for 1M tokens, 4096
and 2 bytes a number, 8.6 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from hipexp.config.schema import ConfigError
from hipexp.hf.install import NAME
from hipexp.hf.kinds import decoder_of

T = TypeVar("T")
REPAIR = "so prompts cannot be read layer by layer: set offload.prefill_bytes=0"


def run_layer_major(
    model: PreTrainedModel,
    calls: Sequence[Callable[[], T]],
    *,
    before_layer: Callable[[int], None] | None = None,
    after_layer: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """What ``calls`` return, each a forward pass of the model over the next chunk, run as layer 0 of every chunk, then layer 1, …

    Each call is made once per layer but returns for the last one only: it gives positions itself, and does nothing before its pass that
    must not be done again. ``before_layer`` and ``after_layer`` run before a layer's first and after its last chunk; ``progress`` is told
    ``(chunk, layer)`` after each. The bits are those of the calls one after the other, if layers depend on earlier chunks through their
    own layer of the cache only, as in every decoder that :func:`hipexp.hf.install` takes; this must be inside of it. Raises ConfigError for
    a model that computes between its layers, whose layers share keys, or whose RoPE depends on what was asked before, ValueError outside an
    installation, and what a call or callback raises. The model is then as before, and the cache holds parts that nobody can go on from.
    """
    layers = _layers(model)
    one = _OneLayer(len(layers))
    hidden: list[Tensor | None] = [None] * len(calls)
    results: list[T] = []
    with _replaced(layers, one):
        for layer in range(len(layers)):
            if before_layer:
                before_layer(layer)
            for i, call in enumerate(calls):
                one.begin(layer, hidden[i])
                try:
                    results.append(call())
                except _Passed:
                    pass
                hidden[i] = one.end()
                if progress:
                    progress(i, layer)
            if after_layer:
                after_layer(layer)
    return results


class _Passed(BaseException):
    """Ends a pass behind the layer that it was for. Nobody but :func:`run_layer_major` may catch it."""


class _Skipped:
    """What a layer that did nothing puts out: handed to the next layer it is fine, whoever computes with it is refused."""

    def _refuse(self, *args: Any) -> Any:
        raise ConfigError(f"something computes with the hidden states between two layers; {REPAIR}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls()._refuse()

    __getattr__ = __getitem__ = __iter__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = _refuse


class _OneLayer:
    """A pass in which one of ``n_layers`` layers computes: those before it do nothing, and where the next one begins it ends."""

    def __init__(self, n_layers: int):
        self.n_layers = n_layers
        self.layer = self.expected = 0
        self.hidden: Tensor | None = None
        self.skipped: _Skipped | None = None

    def begin(self, layer: int, hidden: Tensor | None) -> None:
        """Start the pass for ``layer``, whose input is ``hidden`` (None: that of the first layer is the model's own)."""
        self.layer, self.expected, self.hidden, self.skipped = layer, 0, hidden, None

    def end(self) -> Tensor | None:
        """The input of the next layer; None behind the last one. Raises ConfigError if the pass did not get there."""
        _check(self.expected == min(self.layer + 2, self.n_layers), f"the model has {self.n_layers} layers and called {self.expected}")
        hidden, self.hidden, self.skipped = self.hidden, None, None
        return hidden

    def call(self, layer: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for ``forward`` of every layer."""
        _check(layer == self.expected, f"the model calls its layer {layer} where layer {self.expected} is next")
        self.expected += 1
        hidden = args[0] if args else kwargs.get("hidden_states")
        if layer > self.layer:
            self.hidden = hidden
            raise _Passed
        _check(hidden is self.skipped or not layer, f"layer {layer} is handed something else than what layer {layer - 1} put out")
        if layer < self.layer:
            self.skipped = _Skipped()
            return self.skipped
        if layer:
            args, kwargs = ((self.hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.hidden})
        self.hidden = None
        return forward(*args, **kwargs)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"{what}; {REPAIR}")


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    if not str(model.config._attn_implementation).startswith(NAME.format("")):
        raise ValueError(
            "prompts are read layer by layer inside hipexp.hf.install(model, …) only: other attentions' masks depend on the cache's length"
        )
    decoder = decoder_of(model)
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", None)
    _check(not shared, f"its last {shared} layers use the keys of other layers, of the same pass")
    kinds = decoder.rotary_emb.rope_type  # Gemma 3 has one per kind of layer
    by_history = "dynamic" in (kinds.values() if isinstance(kinds, dict) else [kinds])
    _check(not by_history, "angles of RoPE of type 'dynamic' depend on the lengths asked for before")
    return list(decoder.layers)


@contextmanager
def _replaced(layers: list[nn.Module], one: _OneLayer) -> Iterator[None]:
    """Let ``one`` stand for the layers' own ``forward`` inside the context."""
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(_restore, layer, vars(layer).get("forward"))
            layer.forward = partial(one.call, i, layer.forward)
        yield


def _restore(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a layer its own ``forward`` back: its class's (None), or one that somebody else had put in its place."""
    vars(layer).pop("forward", None)
    if forward is not None:
        layer.forward = forward
