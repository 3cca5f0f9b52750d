"""Install a pipeline into a transformers model, and take it out again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.rope import RopeTables
from hipexp.config.schema import ConfigError, LayerPlan, Pipeline, PruneRope
from hipexp.hf.cache import SequenceLayer, SequenceState
from hipexp.hf.dense import attend_dense

NAME = "hipexp"


@dataclass
class Installed:
    """What :func:`install` put into a model: the attention of each attached layer (dense if the pipeline is None)."""

    pipeline: Pipeline | None
    layers: dict[int, LayerAttention]

    @property
    def pruned_blocks(self) -> int:
        """Query blocks, over all layers, that did not see all their keys since the installation."""
        return sum(layer.pruned_blocks for layer in self.layers.values())


@contextmanager
def install(model: PreTrainedModel, pipeline: Pipeline | None) -> Iterator[Installed]:
    """Let ``model`` attend through ``pipeline`` inside the context (None: dense, by torch's fastest path); after it the model is as before.

    Attached layers keep raw keys in their cache: a hook hands them a rotation by nothing, and the pipeline rotates by its own
    positions. Raises ConfigError for a model whose decoder does not have the parts that this needs.
    """
    decoder = _decoder(model)
    layers = {} if pipeline is None else _layer_attentions(model, decoder, pipeline)
    installed = Installed(pipeline, layers)

    def attend(module: nn.Module, query: Tensor, key, value, attention_mask: Tensor | None, *, scaling: float, **_):
        layer = layers.get(module.layer_idx)
        return _attend_batch(layer, query, key, value, attention_mask, scaling), None

    before = model.config._attn_implementation
    with ExitStack() as stack:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, flash_attention_mask)
        stack.callback(_unregister)
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(NAME)
        for i in layers:
            hook = decoder.layers[i].self_attn.register_forward_pre_hook(_rotate_by_nothing, with_kwargs=True)
            stack.callback(hook.remove)
        yield installed


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not (hasattr(decoder, "layers") and hasattr(decoder, "rotary_emb") and hasattr(decoder.layers[0], "self_attn")):
        raise ConfigError(
            f"model type {model.config.model_type!r} cannot be attached: it needs decoder.layers[i].self_attn and decoder.rotary_emb"
        )
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(
            f"model type {model.config.model_type!r} has layers of kind {', '.join(sorted(kinds))}; only full_attention is supported so far"
        )
    return decoder


def _layer_attentions(model: PreTrainedModel, decoder: nn.Module, pipeline: Pipeline) -> dict[int, LayerAttention]:
    config = model.config

    def cos_sin(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.zeros(1, 1, 1, device=model.device)
        cos, sin = decoder.rotary_emb(like, positions[None].to(model.device))
        return cos[0, :, : cos.shape[-1] // 2], sin[0, :, : sin.shape[-1] // 2]

    tables = RopeTables(cos_sin, config.max_position_embeddings)
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(decoder.layers)
    layers = {}
    for plan in pipeline.plan(len(decoder.layers)):
        module = decoder.layers[plan.layer].self_attn
        own = tables if rotated[plan.layer] else None
        softcap = getattr(config, "attn_logit_softcapping", None)
        layers[plan.layer] = LayerAttention(plan if own else _without_rope(plan), pipeline.method, own, module.scaling, softcap)
    return layers


def _without_rope(plan: LayerPlan) -> LayerPlan:
    stages, decode = ([dataclasses.replace(s, rope=PruneRope.none) for s in part] for part in (plan.stages, plan.decode))
    return dataclasses.replace(plan, stages=stages, decode=decode)


def _rotate_by_nothing(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos[:1, :1]), torch.zeros_like(sin[:1, :1]))}


def _unregister() -> None:
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(NAME, None)


def _attend_batch(layer: LayerAttention | None, query: Tensor, key, value, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of every batch row by itself: ``[B, Q, H, D]`` from queries ``[B, H, Q, D]``.

    ``key`` is our cache layer, or plain tensors ``[B, K, T, D]`` where the caller brought another cache or none.
    ``mask`` ``[B, T]`` marks padding, which has to be on the left.
    """
    B, H, Q, D = query.shape
    states = key.rows if isinstance(key, SequenceLayer) else _states_of(key, value)
    out = query.new_zeros(B, Q, H, D)
    for b, state in enumerate(states):
        if mask is not None:
            state.padding = int((mask[b].long().cumsum(0) == 0).sum())
            if not bool(mask[b, state.padding :].all()):
                raise ValueError(f"attention_mask[{b}] masks tokens after the first real one; only padding on the left is supported")
        k, v = (x[:, state.padding :] for x in state.store.view())
        begin = k.shape[1] - Q
        skip = max(0, -begin)  # queries that are padding themselves
        q = query[b, :, skip:]
        if layer is None:
            rows = attend_dense(q, k, v, scaling)
        else:
            decoding = Q == 1 and begin > 0
            rows = layer(q, k, v, begin + skip, state.memory if decoding else None)
        out[b, skip:] = rows.transpose(0, 1)
    return out


def _states_of(key: Tensor, value: Tensor) -> list[SequenceState]:
    states = [SequenceState(memory=Memory()) for _ in range(key.shape[0])]
    for state, k, v in zip(states, key, value, strict=True):
        state.store.append(k, v)
    return states
