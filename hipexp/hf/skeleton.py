"""A model without weights: transformers' own classes on torch's ``meta`` device, where shapes are computed and nothing is held."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from hipexp.cache.recent import RecentStore
from hipexp.cache.store import KVStore
from hipexp.cache.traffic import TrafficLog
from hipexp.config.schema import ConfigError
from hipexp.hf.cache import SequenceCache
from hipexp.hf.kinds import LayerKind, decoder_of
from hipexp.hf.live import LiveBytes
from hipexp.hf.own import QUERIES, OwnAttention
from hipexp.hf.window import check_transformers

NAME = "hipexp_skeleton_{}"  # in transformers' registries; every pass has its own
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Pass:
    """Bytes that one pass of a model holds at most besides what it was given, weights, and keys and values of layers that see all tokens.

    ``beside``: while no attached layer attends; ``at_attention``: when one of them begins to, its queries and its output among them.
    ``recent``: keys and values that sliding windows keep behind it, which are not in the others.
    """

    beside: int
    at_attention: int
    recent: int


def skeleton(folder: Path, dtype: str) -> PreTrainedModel:
    """The model that the ``config.json`` in ``folder`` describes, with all its parameters on ``meta``; ``dtype`` as in ``Model``.

    Raises ConfigError for a kind of model that transformers does not have.
    """
    check_transformers()
    try:
        config = AutoConfig.from_pretrained(folder)
        return without_weights(config, config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype))
    except (ValueError, OSError) as failure:
        raise ConfigError(
            f"{folder / 'config.json'} describes no causal language model that transformers {transformers.__version__} has: "
            f"{str(failure).splitlines()[0]}"
        ) from failure


def without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration of transformers, with all its parameters on ``meta``. Raises ValueError if there is none."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; what is tied counts once."""
    return sum({id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}.values())


@torch.inference_mode()
def measure_pass(model: PreTrainedModel, kinds: list[LayerKind], rows: int, n_tok: int, before_tok: int) -> Pass:
    """Run ``rows`` sequences of ``n_tok`` tokens each through a :func:`skeleton`, behind ``before_tok`` others, and watch what is alive.

    Attention of a sliding window is in it, that of the others is not: it depends on the method.
    """
    without = [i for i, kind in enumerate(kinds) if not kind.attends]
    cache = SequenceCache(len(kinds), decoding=False, new_store=lambda i: _store(kinds[i]), without_keys=without)
    watched = _Watched(kinds, before_tok)
    with watched.installed(model), watched.live:
        for begin in (0, n_tok) if before_tok and any(kind.keeps for kind in kinds) else (0,):
            watched.restart()
            ids = torch.empty(rows, n_tok, dtype=torch.int64, device="meta")
            at = torch.arange(begin, begin + n_tok, device="meta")[None].expand(rows, -1)
            model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Pass(watched.live.peak - cache.bytes, watched.at_attention - cache.bytes, cache.bytes)


def _store(kind: LayerKind) -> KVStore:
    return RecentStore(kind.window_tok - 1) if kind.window_tok else _Nowhere()


class _Watched:
    """Stands for the attention of all layers, and notes what is alive when it is asked."""

    def __init__(self, kinds: list[LayerKind], before_tok: int) -> None:
        self.kinds, self.before_tok = kinds, before_tok
        self.live, self.at_attention = LiveBytes(), 0

    def restart(self) -> None:
        """Forget what was the most so far."""
        self.live.peak, self.at_attention = self.live.live, 0

    def attend(self, module: nn.Module, query: Tensor, key: Any, value: Any, mask: Any, *, scaling: float, **more: Any) -> Any:
        kind, softcap = self.kinds[module.layer_idx], getattr(module.config, "attn_logit_softcapping", None)
        if softcap and kind.window_tok:
            return OwnAttention("eager").attend(module, query, key, value, None, kind.window_tok, scaling, **more), None
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
        if kind.keeps:
            query.new_empty(own_bytes(query, min(kind.window_tok or self.before_tok, self.before_tok)), dtype=torch.uint8)
        else:
            self.at_attention = max(self.at_attention, self.live.live)
        return out, None

    @contextmanager
    def installed(self, model: PreTrainedModel) -> Iterator[None]:
        """Let this be asked by ``model`` inside the context."""
        rotary, name = decoder_of(model).rotary_emb, NAME.format(next(_NUMBERS))
        with ExitStack() as stack:
            for registry, function in ((AttentionInterface, self.attend), (AttentionMaskInterface, flash_attention_mask)):
                registry.register(name, function)
                stack.callback(registry._global_mapping.pop, name)
            stack.callback(model.set_attn_implementation, str(model.config._attn_implementation))
            model.set_attn_implementation(name)
            stack.enter_context(_AnyFormat())
            if getattr(rotary, "rope_type", None) == "longrope":  # values decide which factors count, and there are none
                stack.callback(setattr, rotary, "rope_type", "longrope")
                rotary.rope_type = "default"
            yield


def own_bytes(query: Tensor, before_tok: int) -> int:
    """What torch's attention takes, ``QUERIES`` queries ``[B, H, Q, D]`` at a time that see ``before_tok`` others, besides the output.

    Keys and values once for every query head, a mask as bools and as numbers, and the parts of the output before they are one.
    """
    _, H, Q, D = query.shape
    at_once = min(QUERIES, Q)
    seen = at_once + before_tok
    return 2 * H * seen * D * query.itemsize + at_once * seen * (1 + query.itemsize) + 2 * H * Q * D * query.itemsize


class _AnyFormat(TorchFunctionMode):
    """Experts in other formats than bfloat16, which torch multiplies but of whose products it does not know the shape on ``meta``."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        return function(*args, **(kwargs or {}))


class _Nowhere(KVStore):
    """A store that keeps nothing."""

    def __init__(self) -> None:
        self.length, self.decoding, self.traffic = 0, False, TrafficLog()

    def append(self, k: Tensor, v: Tensor) -> None:
        self.length += k.shape[1]

    def view(self) -> Any:
        raise ValueError("nothing is kept here")

    def reserve(self, tokens: int, like: Tensor) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def bytes(self) -> int:
        return 0
