"""Decode steps as CUDA graphs: one for every pattern of refreshes, replayed for all tokens that follow.

A graph repeats what the device did, at the same places in memory. So whatever changes from token to token is read there: the token, its
position, how many first candidates it has. Keys and values are written where the position says, into room for all tokens that will come.
What the host decides, which stages of which layer run again, is the pattern by which a graph is chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hipexp.attention import LayerAttention
from hipexp.attention.blocks import Step
from hipexp.attention.method import EVERYTHING, SelectingMethod
from hipexp.cache.resident import ResidentStore
from hipexp.cache.summaries import KeySummaries
from hipexp.hf.cache import SequenceCache, SequenceState
from hipexp.hf.parallel import processes_of

if TYPE_CHECKING:
    from hipexp.hf.install import Installed

LOG = logging.getLogger("hipexp")
NUMBERS = 3  # of a Step
PATIENCE = 16  # steps before the first is recorded: a short answer would not get back what that costs

Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]


@dataclass(frozen=True)
class _Part:
    """A sequence in a layer, and where the device reads at which step it is."""

    layer: LayerAttention
    state: SequenceState
    sequence: int
    step: Step

    @property
    def store(self) -> ResidentStore:
        assert isinstance(self.state.store, ResidentStore)
        return self.state.store

    def due(self) -> int:
        """The first stage that runs again."""
        return self.state.memory.first_stage_due(self.layer.plan.decode, self.layer.plan.shift_steps)


@dataclass(frozen=True)
class _Graph:
    """A recorded step: its logits ``[B, V]``, written anew by every replay, and by part how many query blocks were pruned."""

    logits: Tensor
    replay: Replay
    pruned: list[int]


def steps_until_recorded(period: int) -> int:
    """Steps, whole refresh periods of ``period`` each, behind which every pattern has its graph.

    They are those of ``PATIENCE``, and two more periods: the first step of a sequence is unlike those that begin later ones.
    """
    return (2 + -(-PATIENCE // period)) * period


class GraphedSteps:
    """The decode steps of some sequences together, each with its own ``cache``; nothing else may write into those meanwhile.

    A pattern that comes again is recorded, once ``PATIENCE`` steps were made: the first time everything it needs is compiled and has its
    place. Where that fails, steps run as they are, under this installation from then on, and the log says why. ``record`` runs a function,
    on the device or not, and returns its result, which it writes again when what else it returns is called; it raises RuntimeError if it
    cannot.
    """

    def __init__(self, model: PreTrainedModel, installed: Installed, caches: Sequence[SequenceCache], record: Record):
        self._model, self._installed, self._record, self._patience = model, installed, record, PATIENCE
        self._known: dict[tuple[int, ...], _Graph | None] = {}
        with SequenceCache.of(list(caches)) as merged:  # no layer has states of its own to hand back
            self._cache = merged
        states = [(installed.layers[i], layer.rows) for i, layer in enumerate(merged.own_layers)]
        B, n_parts = len(caches), sum(len(rows) for _, rows in states)
        device = states[0][1][0].store.view()[0].device
        pinned = device.type == "cuda"
        self._host = torch.zeros(2 * B + NUMBERS * n_parts, dtype=torch.long, pin_memory=pinned)
        self._numbers = self._host.to(device)
        steps = map(Step, self._numbers[2 * B :].split(NUMBERS))
        self._parts = [_Part(layer, row, b, next(steps)) for layer, rows in states for b, row in enumerate(rows)]
        for part in self._parts:
            part.state.step = part.step
            if isinstance(part.state.state, KeySummaries):
                part.state.state.reserve(part.store.room[0].shape[1])
        self._prepare(B)

    @classmethod
    def of(
        cls, model: PreTrainedModel, installed: Installed | None, caches: Sequence[SequenceCache], record: Record | None = None
    ) -> GraphedSteps | None:
        """Such steps, by CUDA graphs unless ``record`` is given; None where they cannot be recorded, or cannot yet.

        That is: on another device or several, shared with other processes, with offload, for layers without the pipeline, for methods and
        schedules that do not allow it, and while a sequence is so short that its layers see everything. Sequences that made such steps
        already go on with them, also where a record failed meanwhile: what they hold is as the device reads it.
        """
        if installed is None or processes_of(model) or len(installed.layers) < len(installed.kinds):
            return None
        begun = any(row.step for cache in caches for one in cache.own_layers for row in one.rows)
        if not (installed.records or begun) or installed.sizes or len(set(installed.devices.values())) > 1:
            return None
        if record is None and next(iter(installed.devices.values())).type != "cuda":
            return None
        for layer in installed.layers.values():
            method = layer.method
            if not isinstance(method, SelectingMethod) or not method.captures or layer.plan.late_refresh or layer.listener:
                return None
            exact_tok = method.exact_tok(True)
            if exact_tok < EVERYTHING and any(cache.get_seq_length() < exact_tok for cache in caches):
                return None
        if any(row.padding or not isinstance(row.store, ResidentStore) for cache in caches for one in cache.own_layers for row in one.rows):
            return None
        return cls(model, installed, caches, record or record_cuda)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Feed the next token of every sequence; return the logits ``[B, V]``, good until the next call."""
        self._tell(tokens)
        pattern = self._pattern
        if pattern in self._known and self._known[pattern] is None and self._patience <= 0 and self._installed.records:
            self._known[pattern] = self._recorded()
        graph = self._known.setdefault(pattern, None)
        self._patience -= 1
        if graph is None:
            before = self._lists()
            found = self._run()
            if any(now[stage] is not starts for old, now in zip(before, self._lists(), strict=True) for stage, starts in old.items()):
                self._known.clear()  # a list is elsewhere now, as its length has changed: graphs would read the old one
        else:
            graph.replay()
            found = graph.logits
            for part, pruned in zip(self._parts, graph.pruned, strict=True):
                self._count(part, 1, pruned)
        for part in self._parts:
            part.store.length = self._positions[part.sequence] + 1
        self._prepare(len(tokens))  # the device is busy with this step
        return found

    def _prepare(self, n_sequences: int) -> None:
        """What the next step will be but for its tokens; the landmarks of pieces that are whole by now."""
        self._positions = [part.store.length for part in self._parts[:n_sequences]]  # of the first layer
        numbers = [*self._positions]
        for part in self._parts:
            position = self._positions[part.sequence]
            numbers += map(int, part.layer.numbers_at(position))
            if isinstance(part.state.state, KeySummaries):
                part.state.state.catch_up(part.store.room[0], position)
        self._pattern, self._told = tuple(part.due() for part in self._parts), torch.tensor(numbers)

    def _tell(self, tokens: Sequence[int]) -> None:
        """Write what the device reads. The step before has ended: where its tokens are known, what it was told has been read."""
        for position, part in zip(self._positions, self._parts, strict=False):
            if position >= (room := part.store.room[0].shape[1]):
                raise ValueError(f"a token at position {position} is past the room of {room} tokens that was reserved for this sequence")
        B = len(tokens)
        self._host[:B], self._host[B:] = torch.tensor(tokens), self._told
        self._numbers.copy_(self._host, non_blocking=True)

    def _run(self) -> Tensor:
        ids, positions = self._numbers[: len(self._numbers) - NUMBERS * len(self._parts)].view(2, -1, 1)
        told = dict(input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return self._model(**told).logits[:, -1]

    def _recorded(self) -> _Graph | None:
        """The next step as a graph, which was not run; None if that is not possible. The sequences are as they were before."""
        before = [(part.state.memory.step, dict(part.state.memory.lists), part.state.pruned_blocks) for part in self._parts]
        made = None
        try:
            made = self._record(self._run)
        except RuntimeError as failure:
            self._installed.records = False
            LOG.warning("decode steps run without CUDA graphs: %s", str(failure).splitlines()[0])
        pruned = [part.state.pruned_blocks - old for part, (_, _, old) in zip(self._parts, before, strict=True)]
        for part, (step, lists, _), n in zip(self._parts, before, pruned, strict=True):
            moved = any(starts is not lists[stage][0] for stage, (starts, _) in part.state.memory.lists.items())
            part.state.memory.lists = lists
            self._count(part, step - part.state.memory.step, -n)
            made = None if moved else made  # it would write where nobody reads; run as it is, and that becomes the place
        return _Graph(*made, pruned) if made else None

    def _lists(self) -> list[dict[int, Tensor]]:
        """The lists that the stages of every part left, by stage."""
        return [{stage: starts for stage, (starts, _) in part.state.memory.lists.items()} for part in self._parts]

    def _count(self, part: _Part, steps: int, pruned: int) -> None:
        part.state.memory.step += steps
        part.state.pruned_blocks += pruned
        part.layer.pruned_blocks += pruned


def record_cuda(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """``run`` as a CUDA graph. Raises RuntimeError for what waits for the device or allocates outside of torch."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = run()
    except RuntimeError:
        torch.cuda.synchronize()
        raise
    return out, graph.replay
