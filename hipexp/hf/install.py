"""Install a pipeline into a transformers model, and take it out again."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from hipexp.attention import LayerAttention, Memory
from hipexp.attention.method import SelectingMethod
from hipexp.attention.reads import unit_tok_of
from hipexp.cache.offloaded import OffloadedStore
from hipexp.cache.placement import Placement
from hipexp.cache.recent import RecentStore
from hipexp.cache.resident import ResidentStore
from hipexp.cache.store import KVStore
from hipexp.cache.tiers import Disk
from hipexp.config.model import ModelFacts, head_sizes
from hipexp.config.offload import Sizes, check_sizes, disk_folder, sizes
from hipexp.config.schema import ConfigError, Heads, LayerPlan, Offload, Pipeline, PruneRope, spans
from hipexp.hf.cache import NewStore, SequenceLayer, SequenceState
from hipexp.hf.dense import attend_dense
from hipexp.hf.devices import device_of
from hipexp.hf.kinds import LayerKind, check_some_attached, decoder_of, layer_kinds
from hipexp.hf.own import OwnAttention, check_positions, left_padding
from hipexp.hf.parallel import sharing_heads
from hipexp.hf.quantized import compute_dtype
from hipexp.hf.rotary import Rotary, check_fixed, turned_by_nothing, turned_layers
from hipexp.hf.selfcheck import same_as_before
from hipexp.hf.window import check_transformers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NAME = "hipexp_{}"  # in transformers' registries; every installation has its own
_NUMBERS = itertools.count()


@dataclass
class Installed:
    """What :func:`install` put into a model: the attention of attached layers (none if the pipeline is None), every layer's kind.

    ``processes``: those that share the heads of its layers, and the bytes of ``sizes``; None: all are here. ``records``: whether decode
    steps may be recorded (see :mod:`hipexp.hf.graphs`); no longer once that failed.
    """

    pipeline: Pipeline | None
    layers: dict[int, LayerAttention]
    kinds: list[LayerKind]
    rotary: Rotary
    devices: dict[int, torch.device]
    offload: Offload
    sizes: Sizes | None
    placements: dict[int, Placement]
    processes: ProcessGroup | None
    records: bool = True

    def new_sequence(self) -> NewStore:
        """What makes the stores of a new sequence, layer by layer; those of a sliding window keep what it sees."""

        def resident(layer: int) -> KVStore:
            window_tok = self.kinds[layer].window_tok
            return RecentStore(window_tok - 1) if window_tok else ResidentStore()

        if self.sizes is None:
            return resident
        folder, limit_tok = disk_folder(self.offload), self.sizes.disk_tok
        limit_bytes = None if limit_tok is None else self.sizes.bytes_of(limit_tok) // (self.processes.size() if self.processes else 1)
        disk = Disk(folder, limit_bytes) if folder else None
        ahead = ThreadPoolExecutor(1, "hipexp-ahead") if self.offload.prefetch else None
        return lambda layer: OffloadedStore(self.placements[layer], disk, ahead) if layer in self.placements else resident(layer)

    def fix_rope(self, n_tok: int | None) -> None:
        """Under longrope: a request with a prompt of ``n_tok`` tokens begins, whose factors stay; None: it is over. Else nothing to do."""
        self.rotary.fix(n_tok)
        for i, layer in self.layers.items() if self.rotary.original_tok else ():
            layer.tables = self.rotary.tables(self.devices[i]) if layer.tables else None

    def reads_by_layer(self, n_tok: int) -> bool:
        """Whether a prompt of ``n_tok`` tokens is read layer by layer, as keys and values of one layer fit ``offload.prefill_bytes``."""
        return self.sizes is not None and n_tok * self.sizes.token_bytes <= self.offload.prefill_bytes

    @property
    def pruned_blocks(self) -> int:
        """Query blocks, over all layers, that did not see all their keys since the installation."""
        return sum(layer.pruned_blocks for layer in self.layers.values())


@contextmanager
def install(
    model: PreTrainedModel, pipeline: Pipeline | None, trained_tok: int | None = None, offload: Offload | None = None
) -> Iterator[Installed]:
    """Let ``model`` attend through ``pipeline`` inside the context (None: dense, by torch's fastest path); after it the model is as before.

    Attached layers keep raw keys in their cache: a hook hands them a rotation by nothing, and the pipeline rotates by its own
    positions. ``trained_tok`` is what position strategies take for the trained length (None: the config's
    ``max_position_embeddings``). ``offload``: where :func:`hipexp.hf.generate` keeps keys and values, once it is given the installation
    (None: on the device). Raises ConfigError for a model whose decoder does not have the parts that this needs, whose heads
    do not divide by the processes that it is split over, that does not compute the same under hipexp's attention where it should, or that
    has an installation already.
    """
    check_transformers()
    before = str(model.config._attn_implementation)
    if before.startswith(NAME.format("")):
        raise ConfigError(f"model type {model.config.model_type!r}: this model has a pipeline installed already; leave that context first")
    decoder, kinds, softcap = decoder_of(model), layer_kinds(model), _softcap(model)
    processes = sharing_heads(model)
    if softcap and before == "sdpa":
        raise ConfigError(
            f"model type {model.config.model_type!r} caps its attention logits, which torch's own attention (sdpa) does not do; "
            "load it with attn_implementation='eager'"
        )
    if pipeline is not None:
        check_some_attached(model, kinds)
    trained_tok = trained_tok or model.config.get_text_config().max_position_embeddings
    rotary = Rotary(model, decoder, trained_tok)
    devices = {i: device_of(layer) for i, layer in enumerate(decoder.layers)}
    layers = {} if pipeline is None else _layer_attentions(model, decoder, kinds, pipeline, rotary, devices, processes)
    own = OwnAttention(before)
    first = next(i for i, kind in enumerate(kinds) if kind.attends)
    checks = next((i for i, kind in enumerate(kinds) if not kind.keeps), first)  # whose cache tells which positions are due
    offload = offload or Offload()
    told, placements = _places(model, layers, offload)
    installed = Installed(pipeline, layers, kinds, rotary, devices, offload, told, placements, processes)
    loose: dict[int, dict] = defaultdict(dict)  # by row, what layers share in a pass without our cache

    def attend(
        module: nn.Module,
        query: Tensor,
        key,
        value,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        position_ids: Tensor | None = None,
        **more,
    ):
        i = module.layer_idx
        if i == first:
            loose.clear()
            if not rotary.fixed:  # the model was asked by somebody else than our loop
                installed.fix_rope(None)
        positions = position_ids if i == checks else None
        if kinds[i].keeps:
            return own.attend(module, query, key, value, attention_mask, kinds[i].window_tok, scaling, positions, **more), None
        if offload.prefetch and isinstance(key, SequenceLayer) and key.next and key.decodes(query.shape[2]) and i + 1 in layers:
            _read_ahead(key.next, layers[i + 1].plan)
        return _attend_batch(layers.get(i), query, key, value, attention_mask, positions, scaling, softcap, loose), None

    name = NAME.format(next(_NUMBERS))
    with same_as_before(model, decoder, layers.values()) as check, ExitStack() as stack:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, flash_attention_mask)
        stack.callback(_unregister, name)
        stack.enter_context(rotary.in_charge())
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(name)
        stack.enter_context(turned_by_nothing(decoder.layers[i].self_attn for i in layers))
        check()
        yield installed


def _softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None)


def _layer_attentions(
    model: PreTrainedModel,
    decoder: nn.Module,
    kinds: list[LayerKind],
    pipeline: Pipeline,
    rotary: Rotary,
    devices: dict[int, torch.device],
    processes: ProcessGroup | None,
) -> dict[int, LayerAttention]:
    check_fixed(model, decoder)
    turned, layers = turned_layers(model, decoder), {}
    for plan in pipeline.plan(len(decoder.layers)):
        if not kinds[plan.layer].keeps:
            own = rotary.tables(devices[plan.layer]) if plan.layer in turned else None
            scaling = decoder.layers[plan.layer].self_attn.scaling
            layers[plan.layer] = LayerAttention(plan if own else _without_rope(plan), own, scaling, _softcap(model), processes=processes)
    for i, layer in layers.items():
        if processes is not None and not layer.method.splits:
            raise ConfigError(
                f"pipeline.method={pipeline.method} does not say that it works with some of the heads, and this model is split over "
                f"{processes.size()} processes; leave model.tp_plan out, or see `splits` of hipexp.attention.method.Method"
            )
        source = layer.method.takes_from if isinstance(layer.method, SelectingMethod) else None
        if source is not None and source not in layers:
            raise ConfigError(
                f"pipeline.method={pipeline.method}: layer {i} takes over what layer {source} selects, and that one keeps the model's own "
                f"attention ({kinds[source].keeps}); choose among layers {spans(sorted(layers))}, as in pipeline.params.anchors"
            )
    return layers


def _places(model: PreTrainedModel, layers: dict[int, LayerAttention], offload: Offload) -> tuple[Sizes | None, dict[int, Placement]]:
    """How large the tiers are and where each layer's keys and values go; nothing if all stay on the device."""
    if offload.name == "none":
        return None, {}
    facts = ModelFacts(len(layers), 0, *head_sizes(model.config.get_text_config().to_dict()), compute_dtype(model).itemsize)
    told = sizes(offload, [layer.plan for layer in layers.values()], facts)
    check_sizes(offload, [layer.plan for layer in layers.values()], facts)
    return told, {
        i: Placement(
            unit_tok=unit_tok_of(layer.plan), per_head=layer.plan.heads is Heads.per_kv, sink_tok=layer.plan.sink_tok,
            window_tok=layer.plan.window_tok, page_tok=told.page_tok, device_tok=told.device_tok, host_tok=told.host_tok,
            format=offload.format, policy=offload.policy,
        )
        for i, layer in layers.items()
    }  # fmt: skip


def _without_rope(plan: LayerPlan) -> LayerPlan:
    stages, decode = ([dataclasses.replace(s, rope=PruneRope.none) for s in part] for part in (plan.stages, plan.decode))
    return dataclasses.replace(plan, stages=stages, decode=decode)


def _unregister(name: str) -> None:
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(name, None)


def _attend_batch(
    layer: LayerAttention | None,
    query: Tensor,
    key,
    value,
    mask: Tensor | None,
    positions: Tensor | None,
    scaling: float,
    softcap: float | None,
    loose: dict[int, dict],
) -> Tensor:
    """Attention of every batch row by itself: ``[B, Q, H, D]`` from queries ``[B, H, Q, D]``.

    ``key`` is our cache layer, or plain tensors ``[B, K, T, D]`` where the caller brought another cache or none.
    ``mask`` ``[B, T]`` marks padding, which has to be on the left. ``positions`` ``[B or 1, Q]``, if given, are checked.
    """
    B, H, Q, D = query.shape
    ours = isinstance(key, SequenceLayer)
    states = key.rows if ours else _states_of(key, value, loose)
    decoding = key.decodes(Q) if ours else Q == 1
    out = query.new_zeros(B, Q, H, D) if B > 1 or mask is not None else None
    for b, state in enumerate(states):
        if mask is not None:
            padding = left_padding(mask, b, mask.shape[-1])
            if padding != state.padding:  # the sequence begins elsewhere
                state.padding, state.state, state.memory = padding, None, Memory()
        k, v = state.store.room if state.step and isinstance(state.store, ResidentStore) else state.store.view()
        if state.padding:
            if not isinstance(k, Tensor) or not isinstance(v, Tensor):
                raise ValueError(
                    f"attention_mask[{b}] marks padding, and an offloaded cache holds sequences without; prefill rows one by one"
                )
            k, v = k[:, state.padding :], v[:, state.padding :]
        begin = k.shape[1] - Q
        skip = max(0, -begin)  # queries that are padding themselves
        if skip == Q:
            continue
        if positions is not None and state.step is None:
            check_positions(positions[b if len(positions) > 1 else 0, skip:], begin + skip, state.padding)
        q = query[b, :, skip:]
        if layer is None:
            rows = attend_dense(q, k, v, scaling, softcap)
        else:
            if torch.is_grad_enabled() and query.requires_grad:
                raise RuntimeError("pruned attention has no gradient; call the model under torch.inference_mode()")
            pruned = layer.pruned_blocks
            decode_step = decoding and begin > 0
            if not decode_step:  # what was selected for the tokens before says nothing about these
                state.memory = Memory()
            if state.state is None and begin + skip == 0:
                state.state = layer.method.new_state()
            memory = state.memory if decode_step else None
            rows = layer(q, k, v, begin + skip, memory, state.step, state=state.state, shared=state.shared)
            state.pruned_blocks += layer.pruned_blocks - pruned
            if not decode_step:
                state.store.settle()
        if out is None:
            return rows.transpose(0, 1)[None]
        out[b, skip:] = rows.transpose(0, 1)
    assert out is not None
    return out


def _read_ahead(layer: SequenceLayer, plan: LayerPlan) -> None:
    """Let a layer's stores read in the background what its next decode step will probably ask for."""
    for state in layer.rows:
        expected = state.memory.expected(plan.decode, plan.shift_steps)
        if expected and isinstance(state.store, OffloadedStore):
            (starts, counts), chunk_tok = expected
            state.store.expect(starts[:, 0], counts[:, 0], chunk_tok)


def _states_of(key: Tensor, value: Tensor, shared: dict[int, dict]) -> list[SequenceState]:
    states = [SequenceState(memory=Memory(held=None), shared=shared[b]) for b in range(key.shape[0])]  # of this call only
    for state, k, v in zip(states, key, value, strict=True):
        state.store.append(k, v)
    return states
