"""The RoPE of a model: tables of its angles, which layers are turned at all, and factors that change with the length (longrope)."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hipexp.attention.rope import RopeTables
from hipexp.config.schema import ConfigError
from hipexp.hf.devices import device_of, input_device
from hipexp.hf.kinds import FULL

LISTEN = "hipexp_listen_{}"  # in transformers' registries; every search has its own
_NUMBERS = itertools.count()
_TURNED: WeakKeyDictionary[PreTrainedModel, frozenset[int]] = WeakKeyDictionary()


class Rotary:
    """The angles of a model's full-attention layers, as ``tables`` on the device of a layer.

    Under longrope there are two sets of factors. Until :meth:`fix` says otherwise, those of the tokens so far count, as in transformers;
    keys are kept raw, so a later switch turns all of them anew.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module, trained_tok: int):
        self.module, self.trained_tok = decoder.rotary_emb, trained_tok
        self.device = device_of(self.module)
        kind = rope_type(decoder)
        self.original_tok = original_tok(model) if kind == "longrope" else None
        self.long, self.fixed = False, False
        self._tables: dict[tuple[bool, torch.device], RopeTables] = {}
        if self.original_tok is None:
            return
        long = ROPE_INIT_FUNCTIONS[kind](model.config.get_text_config(), self.device, seq_len=self.original_tok + 1)[0]
        self._frequencies = [self.module.original_inv_freq.to(self.device), long.to(self.device)]

    def tables(self, device: torch.device) -> RopeTables:
        """The angles that count now, for layers on a device."""
        key = self.long, device
        if key not in self._tables:
            cos_sin = self._from_module if self.original_tok is None else self._turning_by(self._frequencies[self.long])
            self._tables[key] = RopeTables(lambda positions: _to(device, cos_sin(positions)), self.trained_tok)
        return self._tables[key]

    def fix(self, n_tok: int | None) -> None:
        """Under longrope: take the factors for a prompt of ``n_tok`` tokens, for as long as it lasts; None: again those of what comes."""
        self.fixed = n_tok is not None
        if n_tok is not None:
            self._choose(n_tok)

    def is_long(self, n_tok: int) -> bool:
        """Whether a prompt of so many tokens has the long factors of longrope."""
        return self.original_tok is not None and n_tok > self.original_tok

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Let this decide, and no longer the module itself, by what it was asked last, which of longrope's factors count."""
        if self.original_tok is None:
            yield
            return
        kind, hook = self.module.rope_type, self.module.register_forward_pre_hook(self._asked, with_kwargs=True)
        self.module.rope_type = "default"
        try:
            yield
        finally:
            hook.remove()
            self._choose(0)
            self.module.rope_type = kind

    def _asked(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.fixed:
            positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            self._choose(int(positions.max()) + 1)

    def _choose(self, n_tok: int) -> None:
        if self.original_tok is not None:
            self.long = self.is_long(n_tok)
            self.module.register_buffer("inv_freq", self._frequencies[self.long], persistent=False)

    def _from_module(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        more = (FULL,) if "layer_type" in inspect.signature(self.module.forward).parameters else ()
        cos, sin = self.module(torch.zeros(1, 1, 1, device=self.device), positions[None].to(self.device), *more)
        return cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]

    def _turning_by(self, frequency: Tensor) -> Any:
        def cos_sin(positions: Tensor) -> tuple[Tensor, Tensor]:
            angles = positions.to(frequency.device).float()[:, None] * frequency.float()
            return angles.cos() * self.module.attention_scaling, angles.sin() * self.module.attention_scaling

        return cos_sin


def _to(device: torch.device, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors[0].to(device), tensors[1].to(device)


def check_fixed(model: PreTrainedModel, decoder: nn.Module) -> None:
    """Raise ConfigError for angles of which no table can be made."""
    if rope_type(decoder) == "dynamic":
        raise ConfigError(
            f"model type {model.config.model_type!r} has RoPE of type 'dynamic', whose angles depend on the length; a pipeline needs "
            "fixed ones: default, linear, llama3, yarn or longrope"
        )
    if hasattr(decoder.rotary_emb, "mrope_section"):
        raise ConfigError(
            f"model type {model.config.model_type!r} cannot be attached: its RoPE takes three positions for every token (M-RoPE); a "
            "pipeline knows one"
        )


def rope_type(decoder: nn.Module) -> str | None:
    """The type of RoPE of a decoder's full-attention layers."""
    kind = getattr(decoder.rotary_emb, "rope_type", None)
    return kind.get(FULL) if isinstance(kind, dict) else kind


def original_tok(model: PreTrainedModel) -> int:
    """The length up to which longrope has short factors."""
    return model.config.get_text_config().rope_parameters["original_max_position_embeddings"]


def turned_layers(model: PreTrainedModel, decoder: nn.Module) -> frozenset[int]:
    """The layers whose keys depend on positions: found by handing them angles and none, while no attention adds anything.

    So what goes into each layer is the same both times. A model is asked once.
    """
    if model not in _TURNED:
        with_angles, without = _keys(model, decoder, turn=True), _keys(model, decoder, turn=False)
        _TURNED[model] = frozenset(i for i, keys in with_angles.items() if not torch.equal(keys, without[i]))
    return _TURNED[model]


@torch.inference_mode()
def _keys(model: PreTrainedModel, decoder: nn.Module, turn: bool) -> dict[int, Tensor]:
    """The keys of a few tokens as attention gets them, by layer."""
    found: dict[int, Tensor] = {}

    def listen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        found[module.layer_idx] = key
        return torch.zeros_like(query.transpose(1, 2)), None

    before, name = model.config._attn_implementation, LISTEN.format(next(_NUMBERS))
    with ExitStack() as stack:
        AttentionInterface.register(name, listen)
        AttentionMaskInterface.register(name, lambda *_, **__: None)
        for registry in (AttentionInterface, AttentionMaskInterface):
            stack.callback(registry._global_mapping.pop, name)
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(name)
        if not turn:
            stack.enter_context(turned_by_nothing(layer.self_attn for layer in decoder.layers if hasattr(layer, "self_attn")))
        model(input_ids=torch.arange(1, 5, device=input_device(model))[None], use_cache=False)
    return found


@contextmanager
def turned_by_nothing(attentions: Iterable[nn.Module]) -> Iterator[None]:
    """Let attentions have an angle of zero for every position, so that their keys stay raw.

    The function of transformers that would multiply by ones and add zeros is not run for them, where it is found.
    """
    attentions = list(attentions)
    with ExitStack() as stack:
        for name in {type(attention).__module__ for attention in attentions}:
            stack.enter_context(_leaving(sys.modules[name]))
        for attention in attentions:
            stack.callback(attention.register_forward_pre_hook(_turn_by_nothing, with_kwargs=True).remove)
        yield


def _turn_by_nothing(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook before an attention."""
    cos, _ = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": _nothing(cos.shape[-1], cos.ndim, cos.dtype, cos.device)}


@cache
def _nothing(size: int, ndim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of an angle of zero."""
    with torch.inference_mode(False):
        cos, sin = (make((1,) * (ndim - 1) + (size,), dtype=dtype, device=device) for make in (torch.ones, torch.zeros))
    cos.turns_nothing = True
    return cos, sin


@contextmanager
def _leaving(module: ModuleType) -> Iterator[None]:
    """Let a modeling module's ``apply_rotary_pos_emb`` return what an angle of zero would, as it is."""
    found = vars(module).get("apply_rotary_pos_emb")
    if found is None:
        yield
        return
    shared = found if isinstance(found, _Leaving) else _Leaving(found)
    vars(module)["apply_rotary_pos_emb"] = shared
    shared.users += 1
    try:
        yield
    finally:
        shared.users -= 1
        if not shared.users and vars(module)["apply_rotary_pos_emb"] is shared:
            vars(module)["apply_rotary_pos_emb"] = shared.original


class _Leaving:
    """``apply_rotary_pos_emb`` of a module, while it has ``users``: models whose keys stay raw."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]):
        self.original, self.users = original, 0

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return (q, k) if hasattr(cos, "turns_nothing") else self.original(q, k, cos, *more, **named)
