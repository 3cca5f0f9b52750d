"""The cache that a model sees while hipexp is installed: stores and refresh state, keyed by sequence."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from hipexp.attention import Memory
from hipexp.attention.blocks import Step
from hipexp.cache.offloaded import OffloadedStore
from hipexp.cache.resident import ResidentStore
from hipexp.cache.store import KVStore

NewStore = Callable[[int], KVStore]  # an empty store for a layer


@dataclass
class SequenceState:
    """What one sequence keeps in one layer: keys and values, what its method notes of them (``shared``: in all layers), the refresh state,
    how many leading tokens are padding, how many query blocks did not see all their keys, and where the device reads at which decode step
    it is (see :mod:`hipexp.hf.graphs`; None: nowhere)."""

    store: KVStore = field(default_factory=ResidentStore)
    state: Any = None
    shared: dict[Any, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    padding: int = 0
    pruned_blocks: int = 0
    step: Step | None = None


class SequenceLayer(CacheLayerMixin):
    """One layer's states, one per batch row. ``update`` hands *itself* to the attention function in place of key and value tensors.

    ``decoding`` says whether the next tokens are decode steps; None: a single token behind others is one. ``new_store``: makes a row's.
    ``shared``: by row, what all layers share.
    """

    is_sliding = False

    def __init__(
        self,
        reserve_tok: int = 0,
        decoding: bool | None = None,
        new_store: Callable[[], KVStore] = ResidentStore,
        shared: dict[int, dict] | None = None,
    ):
        super().__init__()
        self._shared = defaultdict(dict) if shared is None else shared
        self.rows: list[SequenceState] = []
        self.reserve_tok, self.decoding, self.new_store = reserve_tok, decoding, new_store
        self.holding = False
        self.next: SequenceLayer | None = None  # of the same sequences

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if not self.rows:
            self.rows = [SequenceState(self.new_store(), shared=self._shared[b]) for b in range(key_states.shape[0])]
            self.hold(self.holding)
            for row, key in zip(self.rows, key_states, strict=True):
                row.store.reserve(self.reserve_tok, key)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for row, key, value in zip(self.rows, key_states, value_states, strict=True):
            row.store.decoding = self.decodes(key.shape[1])
            if row.step and isinstance(row.store, ResidentStore):
                row.store.write(row.step.position, key, value)
            else:
                row.store.append(key, value)
        return self, self

    def to(self, *args: Any, **kwargs: Any) -> SequenceLayer:
        """Itself: models whose layers share keys move them to their own device. Here every layer takes what it needs."""
        return self

    def hold(self, holding: bool) -> None:
        """Whether everything that is appended stays on the device for now, however much is offloaded."""
        self.holding = holding
        for row in self.rows:
            if isinstance(row.store, OffloadedStore):
                row.store.hold = holding
                row.store.settle()

    def decodes(self, n_tok: int) -> bool:
        """Whether ``n_tok`` next tokens are a decode step, if others lie before them."""
        return self.decoding if self.decoding is not None else n_tok == 1

    def get_seq_length(self) -> int:
        return max((row.store.length for row in self.rows), default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    # What transformers would do here works on `keys` and `values`, which stay None: it would fail by AttributeError or do nothing. And it
    # would need the refresh state of a shorter or another sequence, which nobody kept.
    def _refused(self, *args, **kwargs):
        raise NotImplementedError("hipexp's cache only grows: no crop, reset, reordering or repetition (beam search, assisted decoding)")

    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = _refused


class SequenceCache(Cache):
    """A cache of :class:`SequenceLayer`; ``reserve_tok``: how many tokens will come. ``new_store``: makes that of a layer.

    ``without_keys``: layers of linear attention and the like, whose state transformers keeps.
    """

    def __init__(
        self,
        n_layers: int,
        reserve_tok: int = 0,
        decoding: bool | None = None,
        new_store: NewStore | None = None,
        without_keys: Collection[int] = (),
    ):
        makers = [partial(new_store, layer) if new_store else ResidentStore for layer in range(n_layers)]
        shared: dict[int, dict] = defaultdict(dict)
        super().__init__(
            layers=[
                LinearAttentionLayer() if i in without_keys else SequenceLayer(reserve_tok, decoding, make, shared)
                for i, make in enumerate(makers)
            ]
        )
        for layer, following in itertools.pairwise(self.layers):
            if isinstance(layer, SequenceLayer) and isinstance(following, SequenceLayer):
                layer.next = following

    @classmethod
    @contextmanager
    def of(cls, caches: list[SequenceCache]) -> Iterator[SequenceCache]:
        """One cache for a decode step whose batch rows are the sequences of ``caches``, sharing their state."""
        without = [i for i, layer in enumerate(caches[0].layers) if not isinstance(layer, SequenceLayer)]
        merged = cls(len(caches[0].layers), decoding=True, without_keys=without)
        for i, layer in enumerate(merged.layers):
            if isinstance(layer, SequenceLayer):
                layer.rows = [row for cache in caches for row in cache.layers[i].rows]
                layer.is_initialized = True
        for i in without:
            merged.layers[i] = caches[0].layers[i] if len(caches) == 1 else _stacked([cache.layers[i] for cache in caches])
        yield merged
        for i in without if len(caches) > 1 else ():
            _hand_back(merged.layers[i], [cache.layers[i] for cache in caches])

    @property
    def own_layers(self) -> list[SequenceLayer]:
        """The layers that keep keys and values here."""
        return [layer for layer in self.layers if isinstance(layer, SequenceLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, the same in every layer."""
        return self.own_layers[0].get_seq_length()

    @property
    def pruned_blocks(self) -> int:
        """Query blocks, over all layers and rows, that did not see all their keys."""
        return sum(row.pruned_blocks for layer in self.own_layers for row in layer.rows)

    @property
    def traffic(self) -> dict[str, Any]:
        """Tidy rows of what offload moved (see :mod:`hipexp.cache.traffic`), and bytes off the device; empty if nothing is offloaded."""
        layers = [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, SequenceLayer)]
        stores = [(i, row.store) for i, layer in layers for row in layer.rows if isinstance(row.store, OffloadedStore)]
        if not stores:
            return {}
        for _, store in stores:
            store.wait()
        rows = [row for layer, store in stores for row in store.traffic.rows(layer)]
        return {"rows": rows, "host_bytes": sum(s.host_bytes for _, s in stores), "disk_bytes": sum(s.disk_bytes for _, s in stores)}

    def close(self) -> None:
        """The sequences are finished: give back what they hold."""
        with ExitStack() as closing:  # every one, whatever one of them raises
            for layer in self.own_layers:
                for row in layer.rows:
                    closing.callback(row.store.close)

    @property
    def bytes(self) -> int:
        """Bytes on the device of keys and values, of what the method notes of them, and of what decode steps hold ready."""
        return sum(
            row.store.bytes + (row.state.bytes if row.state else 0) + (row.memory.held.bytes if row.memory.held else 0)
            for layer in self.own_layers
            for row in layer.rows
        )


def _stacked(layers: list[LinearAttentionLayer]) -> LinearAttentionLayer:
    """The states of sequences as rows of one layer."""
    made, first = LinearAttentionLayer(layers[0].number_of_states), layers[0]
    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size"):
        setattr(made, name, dict(getattr(first, name)))
    made.dtype, made.device = first.dtype, first.device
    for states in ("conv_states", "recurrent_states"):
        for i, state in getattr(first, states).items():
            rows = [getattr(layer, states)[i] for layer in layers]
            getattr(made, states)[i] = None if state is None else torch.cat(rows)
    return made


def _hand_back(stacked: LinearAttentionLayer, layers: list[LinearAttentionLayer]) -> None:
    """The rows of ``stacked`` to the sequences that they are of."""
    for states in ("conv_states", "recurrent_states"):
        for i, state in getattr(stacked, states).items():
            for layer, row in zip(layers, () if state is None else state.split(1), strict=state is not None):
                getattr(layer, states)[i] = row.clone()
