"""The generation loop: chunked prefill, decode, timers per phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hipexp.config.offload import check_chunks
from hipexp.hf.cache import SequenceCache, SequenceLayer
from hipexp.hf.devices import input_device
from hipexp.hf.graphs import GraphedSteps
from hipexp.hf.install import Installed
from hipexp.hf.kinds import layer_kinds
from hipexp.hf.layer_major import run_layer_major
from hipexp.hf.load import Loaded
from hipexp.hf.memory import PeakMemory
from hipexp.hf.parallel import agreed, processes_of
from hipexp.hf.sampling import GREEDY, Chooser, Sampling

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Ended = Callable[[list[int]], bool]


def never(tokens: list[int]) -> bool:
    """No answer ends by what it says."""
    return False


@dataclass
class Generation:
    """What a prompt produced: new tokens (without the stop token) and what they cost.

    ``prefill_ms`` of this prompt; ``decode_ms`` of every decode step (shared by the batch); ``peak_bytes`` above the loaded model;
    ``cache_bytes`` and ``traffic`` of the cache (see ``SequenceCache``); ``exact``: every query block of this sequence saw all its keys.
    """

    tokens: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    cache_bytes: int = 0
    traffic: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    stopped: bool = False


@torch.inference_mode()
def generate(
    loaded: Loaded,
    prompts: list[list[int]],
    *,
    max_new_tok: int,
    prefill_chunk_tok: int,
    stop_ids: Collection[int] = (),
    not_first: Collection[int] = (),
    progress: Callable[[int], None] | None = None,
    installed: Installed | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    ended: Ended = never,
    graphs: bool = True,
) -> list[Generation]:
    """Continue each prompt by at most ``max_new_tok`` tokens, inside :func:`hipexp.hf.install`.

    Prompts are prefilled one by one, ``prefill_chunk_tok`` tokens at a time (``progress`` is told how many), and decoded together;
    so a prompt gives the same tokens alone and in a batch. ``installed``: whose offload decides where keys and values lie; None: all on the
    device. No answer begins with one of ``not_first``. ``sampling``: of all prompts, or of each. An answer ends before one of
    ``stop_ids``, and behind the token with which ``ended(tokens)`` holds for it. ``graphs``: on a GPU, decode by CUDA graphs where that is
    possible (see :mod:`hipexp.hf.graphs`). Raises ValueError for an empty
    prompt, another number of ``sampling`` than of prompts, or a ``prefill_chunk_tok`` that cuts a query block, ConfigError for one that
    cuts a page of a lossy format, and FloatingPointError if the model's logits are not finite.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    if prefill_chunk_tok < 1:
        raise ValueError(f"prefill_chunk_tok={prefill_chunk_tok} must be at least 1, and a multiple of the query block; try 8192")
    if installed and installed.sizes:
        check_chunks(installed.offload, installed.sizes.page_tok, prefill_chunk_tok)
    together = partial(
        _generate, loaded, max_new_tok=max_new_tok, prefill_chunk_tok=prefill_chunk_tok, stop_ids=set(stop_ids), not_first=not_first,
        progress=progress, installed=installed, ended=ended, graphs=graphs,
    )  # fmt: skip
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(each) != len(prompts):
        raise ValueError(f"sampling has {len(each)} entries for {len(prompts)} prompts; give one, or one for each prompt")
    if installed is None or installed.rotary.original_tok is None:
        return together(prompts, each)
    out = dict[int, Generation]()
    for long in (False, True):  # a model has one set of longrope's factors at a time
        mine = [i for i, prompt in enumerate(prompts) if installed.rotary.is_long(len(prompt)) is long]
        if mine:
            installed.fix_rope(len(prompts[mine[0]]))
            try:
                out |= zip(mine, together([prompts[i] for i in mine], [each[i] for i in mine]), strict=True)
            finally:
                installed.fix_rope(None)
    return [out[i] for i in range(len(prompts))]


def _generate(
    loaded: Loaded,
    prompts: list[list[int]],
    sampling: list[Sampling],
    *,
    max_new_tok: int,
    prefill_chunk_tok: int,
    stop_ids: set[int],
    not_first: Collection[int],
    progress: Callable[[int], None] | None,
    installed: Installed | None,
    ended: Ended,
    graphs: bool,
) -> list[Generation]:
    choosers = [Chooser(one) for one in sampling]
    memory = PeakMemory()
    memory.start()
    out, last = [Generation() for _ in prompts], []
    caches: list[SequenceCache] = []
    kinds = installed.kinds if installed else layer_kinds(loaded.model)
    without = [i for i, kind in enumerate(kinds) if not kind.attends]
    try:
        for result, prompt, chooser in zip(out, prompts, choosers, strict=True):
            new_store = installed.new_sequence() if installed else None
            caches.append(
                SequenceCache(loaded.n_layers, len(prompt) + max_new_tok, decoding=False, new_store=new_store, without_keys=without)
            )
            read = prefill_layer_major if installed and installed.reads_by_layer(len(prompt)) else prefill
            started = time.perf_counter()
            last.append(read(loaded.model, caches[-1], prompt, prefill_chunk_tok, progress, not_first, chooser))
            result.prefill_ms = (time.perf_counter() - started) * 1e3
        decode(loaded.model, caches, last, out, max_new_tok, stop_ids, choosers, ended, installed if graphs else None)
        for result, cache in zip(out, caches, strict=True):
            result.peak_bytes, result.cache_bytes, result.traffic = memory.peak(), cache.bytes, cache.traffic
            result.exact = cache.pruned_blocks == 0
    finally:
        with ExitStack() as closing:  # every one, whatever one of them raises
            for cache in caches:
                closing.callback(cache.close)
    return out


def prefill(
    model: PreTrainedModel,
    cache: SequenceCache,
    prompt: list[int],
    chunk_tok: int,
    progress: Callable[[int], None] | None = None,
    not_first: Collection[int] = (),
    chooser: Chooser | None = None,
) -> int:
    """Feed a prompt chunk by chunk; return the first new token, none of ``not_first``."""
    token = 0
    for step, n_tok in _steps(model, cache, prompt, chunk_tok, not_first, chooser):
        token = step()
        if progress:
            progress(n_tok)
    return token


def prefill_layer_major(
    model: PreTrainedModel,
    cache: SequenceCache,
    prompt: list[int],
    chunk_tok: int,
    progress: Callable[[int], None] | None = None,
    not_first: Collection[int] = (),
    chooser: Chooser | None = None,
) -> int:
    """As :func:`prefill`, to the same bits, layer after layer: keys and values of one layer are all on the device while it reads.

    ``progress`` is told tokens in proportion to the layers that they passed; they sum to the prompt's. Raises also as ``run_layer_major``.
    """
    steps = _steps(model, cache, prompt, chunk_tok, not_first, chooser)
    done = 0  # tokens, times layers

    def passed(chunk: int, layer: int) -> None:
        nonlocal done
        before, done = done, done + steps[chunk][1]
        if progress:
            progress(done // len(cache.layers) - before // len(cache.layers))

    def hold(layer: int, holding: bool) -> None:
        if isinstance(cache.layers[layer], SequenceLayer):
            cache.layers[layer].hold(holding)

    return run_layer_major(
        model, [step for step, _ in steps], before_layer=partial(hold, holding=True), after_layer=partial(hold, holding=False),
        progress=passed,
    )[-1]  # fmt: skip


def _steps(
    model: PreTrainedModel, cache: SequenceCache, prompt: list[int], chunk_tok: int, not_first: Collection[int], chooser: Chooser | None
) -> list[tuple[Callable[[], int], int]]:
    """The forward passes of a prompt, each a call that returns the next token, and how many tokens it reads; only the last one chooses."""
    ids = torch.tensor([prompt], device=input_device(model))

    def step(begin: int, end: int) -> int:
        choosers = [chooser] if chooser and end == len(prompt) else []
        logits = _logits(model, cache, ids[:, begin:end], torch.arange(begin, end, device=ids.device)[None])
        return choose(logits, [end - 1], processes_of(model), choosers, not_first)[0]

    cuts = [(begin, min(begin + chunk_tok, len(prompt))) for begin in range(0, len(prompt), chunk_tok)]
    return [(partial(step, begin, end), end - begin) for begin, end in cuts]


def decode(
    model: PreTrainedModel,
    caches: list[SequenceCache],
    last: list[int],
    out: list[Generation],
    max_new_tok: int,
    stop_ids: set[int],
    choosers: Sequence[Chooser] = (),
    ended: Ended = never,
    installed: Installed | None = None,
) -> None:
    """Extend every sequence, whose first new token is ``last[i]``, until it stops; fills ``tokens``, ``decode_ms``, ``stopped``.

    ``installed``: what the model was given, where its steps may be CUDA graphs.
    """
    live, graphed, processes = list(range(len(out))), None, processes_of(model)
    for _ in range(max_new_tok):
        for i in live:
            out[i].stopped = last[i] in stop_ids
            if not out[i].stopped:
                out[i].tokens.append(last[i])
                out[i].stopped = ended(out[i].tokens)
        before, live = live, [i for i in live if not out[i].stopped and len(out[i].tokens) < max_new_tok]
        if not live:
            return
        started = time.perf_counter()
        mine, tokens = [caches[i] for i in live], [last[i] for i in live]
        if live != before:
            graphed = None  # its memory first
        graphed = graphed or GraphedSteps.of(model, installed, mine)
        logits = graphed.logits(tokens) if graphed else _step(model, mine, tokens)
        positions = [cache.get_seq_length() - 1 for cache in mine]
        chosen = choose(logits, positions, processes, [choosers[i] for i in live if choosers])
        for i, token in zip(live, chosen, strict=True):
            last[i] = token
        elapsed = (time.perf_counter() - started) * 1e3
        for i in live:
            out[i].decode_ms.append(elapsed)


def _step(model: PreTrainedModel, caches: list[SequenceCache], tokens: list[int]) -> Tensor:
    """The logits ``[B, V]`` behind the next token of every sequence."""
    device = input_device(model)
    ids = torch.tensor(tokens, device=device)[:, None]
    positions = torch.tensor([cache.get_seq_length() for cache in caches], device=device)[:, None]
    with SequenceCache.of(caches) as cache:
        return _logits(model, cache, ids, positions)


def _logits(model: PreTrainedModel, cache: SequenceCache, ids: Tensor, positions: Tensor) -> Tensor:
    """One forward pass; the logits ``[B, V]`` behind the last token of every row."""
    return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def choose(
    logits: Tensor,
    positions: Sequence[int],
    processes: ProcessGroup | None = None,
    choosers: Sequence[Chooser] = (),
    banned: Collection[int] = (),
) -> list[int]:
    """The next token of every row, none of ``banned``; no ``choosers``: the most likely ones. ``positions``: where they stand, for errors.

    ``processes`` that share the model all take what the first of them chose.
    """
    finite = torch.isfinite(logits).all(-1)
    if banned:
        logits[:, list(banned)] = float("-inf")
    found, good = torch.stack([logits.argmax(-1), finite.long()]).tolist()  # the host waits once
    if not all(good):
        at = positions[good.index(0)]
        raise FloatingPointError(f"the model's logits are not finite at position {at}; no token can be chosen from them")
    if any(chooser.sampling.temperature > 0 for chooser in choosers):
        found = [chooser.choose(row) for chooser, row in zip(choosers, logits, strict=True)]
    return found if processes is None else agreed(torch.tensor(found, device=logits.device), processes).tolist()
