"""What selections hold of a text's attention: of its sampled query blocks, by layer, stage and head.

A text is what a model read, its raw queries and keys heard in every layer, or generated queries and keys of one layer. Selections are those
of prefill, or of decode steps; each block is judged by some of its queries, against dense attention.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hipexp.config.offload import page_tok_of
from hipexp.config.schema import ConfigError, Experiment, LayerPlan, Offload, Pipeline, PruneRope, Task, read_geometry
from hipexp.run.budgets import divided, selecting_method
from hipexp.suites import infbench
from hipexp.suites.sample import LineEncoder

if TYPE_CHECKING:
    from torch import Tensor

    from hipexp.attention import LayerAttention
    from hipexp.hf import Loaded

DIVISORS = (1, 4, 8)
ROWS = 4  # queries of a block by which it is judged
VALUES = ("mass", "oracle_ratio", "top")
# Of each stage the values of every head: mass, oracle_ratio, top, fixed, missing (mass outside sinks and window that is not selected).
Stages = list[dict[str, list[float]]]
# Divisor (or name of a pipeline) and number of the block -> layer -> stages.
Text = Callable[[Any, int], dict[int, Stages]]


def text_of(experiment: Experiment, loaded: Loaded | None, source: str, context_tok: int) -> Text:
    """A text, ready to be asked for the blocks that are sampled from it."""
    assert experiment.pipeline is not None
    pipelines = {divisor: divided(experiment.pipeline, divisor) for divisor in experiment.task.divisors or []}
    if loaded is None:
        return generated_text(experiment, pipelines, source, context_tok)
    from hipexp import hf

    encode = LineEncoder(loaded.tokenizer)
    sample = infbench.make_sample(source, 0, 1, context_tok, encode, experiment.seed, experiment.task.wording)
    return heard_text(experiment, hf.activations(loaded, sample.tokens), loaded.n_layers, attentions(loaded, pipelines, context_tok))


def attentions(loaded: Loaded, pipelines: Mapping[Any, Pipeline], n_tok: int) -> dict[Any, dict[int, LayerAttention]]:
    """The attention of every attached layer of a model under each of the ``pipelines``, for prompts of ``n_tok`` tokens."""
    from hipexp import hf

    layers: dict[Any, dict[int, LayerAttention]] = {}
    for name, pipeline in pipelines.items():
        with hf.install(loaded.model, pipeline, loaded.trained_tok) as installed:
            installed.fix_rope(n_tok)
            layers[name] = dict(installed.layers)
    return layers


def heard_text(
    experiment: Experiment,
    heard: dict[int, tuple[Tensor, Tensor]],
    n_layers: int,
    layers: Mapping[Any, dict[int, LayerAttention]],
    last: bool = False,
) -> Text:
    """A text of which attached layers' raw queries and keys were heard, in a model of ``n_layers``.

    ``layers``: their attention under pipelines by name.

    Which blocks are sampled is up to the experiment, whatever the pipelines. ``last``: only the last stage is judged.
    """
    from hipexp.attention.recall import logits_in_place

    assert experiment.pipeline is not None
    plans, n_tok = experiment.pipeline.plan(n_layers), next(iter(heard.values()))[0].shape[1]
    plans = [plans[i] for i in heard]
    check_blocks(experiment.task, [n_tok], plans)
    size = _range_of(plans, n_tok, experiment.task.divisors or list(DIVISORS))[2]
    one = next(iter(layers.values()))

    @lru_cache(ROWS * len(heard))  # pipelines are asked for the same block, one after the other
    def dense(layer: int, seen: int) -> Tensor:
        (q, k), tables = heard[layer], one[layer].tables
        return logits_in_place(q[:, seen - 1], k[:, :seen], one[layer].scale, tables.upto(seen) if tables else None, one[layer].softcap)

    def text(name: Any, block: int) -> dict[int, Stages]:
        out: dict[int, Stages] = {}
        shared: dict[Any, Any] = {}
        begin = block_of(plans, n_tok, block, experiment.task)
        for i, (q, k) in heard.items():

            def logits(query: Tensor, keys: Tensor, layer: int = i) -> Tensor:
                return dense(layer, keys.shape[1])

            out[i] = stages_of(layers[name][i], q, 0, k, begin, size, logits, experiment.offload, shared, last, decodes(experiment.task))
        return out

    return text


def generated_text(experiment: Experiment, pipelines: dict[int, Pipeline], source: str, context_tok: int) -> Text:
    """The same of generated queries and keys, for one layer."""
    import torch

    from hipexp.attention.inputs import GENERATORS, Geometry
    from hipexp.attention.recall import logits_at_one_distance, logits_in_place
    from hipexp.run.attention_latency import layer_attention

    task = experiment.task
    assert task.geometry is not None
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    geometry = Geometry(*read_geometry(task.geometry), getattr(torch, task.dtype))
    made = GENERATORS[source](geometry, context_tok, seed=experiment.seed, device=device)
    layers = {divisor: layer_attention(pipeline, geometry, device, task.layer) for divisor, pipeline in pipelines.items()}
    assert experiment.pipeline is not None
    plans = [experiment.pipeline.plan_alone(task.layer)]
    check_blocks(task, [context_tok], plans)
    size = _range_of(plans, context_tok, task.divisors or list(DIVISORS))[2]
    remembers = any(attention.method.remembers for attention in layers.values())  # what the queries of the whole prompt did
    queries = made.prefill_queries(context_tok if remembers else context_tok // 2 // size * size)

    def text(divisor: int, block: int) -> dict[int, Stages]:
        attention, plan = layers[divisor], layers[divisor].plan
        first_tok = plan.stages[0].chunk_tok if plan.stages else 0
        distance, begin = max(0, plan.window_tok - first_tok), block_of(plans, context_tok, block, task)

        def logits(query: Tensor, keys: Tensor) -> Tensor:
            assert attention.tables is not None
            if plan.method != "hip" and plan.prune is PruneRope.native:
                return logits_in_place(query, keys, attention.scale, attention.tables.upto(keys.shape[1]))
            return logits_at_one_distance(query, keys, attention.scale, attention.tables.upto(distance + 1), distance)

        q_begin = context_tok - queries.shape[1]
        return {0: stages_of(attention, queries, q_begin, made.keys, begin, size, logits, experiment.offload, {}, decoding=decodes(task))}

    return text


def _range_of(plans: list[LayerPlan], n_tok: int, divisors: list[int]) -> tuple[int, int, int]:
    """First and last block that may be sampled, and their size: the least that all layers have in common."""
    sizes, exacts = zip(*(_sizes(plan, min(divisors)) for plan in plans), strict=True)
    size, exact = math.lcm(*sizes), max(exacts)
    half = n_tok - n_tok // 2 // size * size
    return -(-max(exact, half) // size), n_tok // size - 1, size


def _sizes(plan: LayerPlan, divisor: int) -> tuple[int, int]:
    """Queries of a block, and how many keys a budget divided by ``divisor`` holds. Imports torch for methods of other files."""
    if plan.method == "hip":
        return plan.stages[0].query_block_tok, plan.sink_tok + plan.window_tok + plan.stages[-1].keep_tok // divisor
    from hipexp.attention.method import EVERYTHING

    method = selecting_method(plan)
    less = dataclasses.replace(method, **{name: getattr(method, name) // divisor for name in method.budgets})
    return method.query_block_tok, min((tok for tok in (less.exact_tok(False), less.exact_tok(True)) if tok < EVERYTHING), default=0)


def block_of(plans: list[LayerPlan], n_tok: int, number: int, task: Task) -> int:
    """Where the sampled query block ``number`` begins: they are spread over what every layer prunes, at most the second half.

    ``plans``: of the undivided pipeline. The last block is the last one of the text.
    """
    first, last, size = _range_of(plans, n_tok, task.divisors or list(DIVISORS))
    return (first + (last - first) * (number + 1) // task.samples) * size


def stages_of(
    attention: LayerAttention, q: Tensor, q_begin: int, k: Tensor, begin: int, size: int, logits: Callable[[Tensor, Tensor], Tensor],
    offload: Offload, shared: dict[Any, Any], last: bool = False, decoding: bool = False,
) -> Stages:  # fmt: skip
    """What each stage holds for the block of ``size`` queries at ``begin``, over raw keys ``[K, T, D]``; one stage for methods without.

    ``q`` ``[H, n, D]``: queries from ``q_begin`` on. ``logits(query, keys)`` are those that count, of a query over the keys it sees. Stages
    see keys as ``offload`` keeps them. ``shared``: what the layers of a text share. ``last``: of the last stage alone. ``decoding``: what a
    decode step of each query selects.
    """
    import torch

    from hipexp.attention.recall import attention_mass, chosen_tokens, fixed_tokens
    from hipexp.cache.tiers import as_kept

    plan, end = attention.plan, min(begin + size, q_begin + q.shape[1])
    kept = as_kept(k, offload.format, page_tok_of([plan]), plan.sink_tok)
    found = selecting(attention, q, q_begin, kept, begin, end, shared, decoding)
    out: Stages = []
    for row in rows_of(end - begin):
        seen = begin + row + 1
        heavy = logits(q[:, seen - 1 - q_begin], k[:, :seen])
        for i, (starts, counts, chunk_tok, alone) in enumerate(found(row)[-1:] if last else found(row)):
            part = row // (size // starts.shape[1])  # a stage may cut the block into smaller ones
            first = seen - 1 if alone else begin + part * (size // starts.shape[1])
            part = 0 if alone else part
            fixed = fixed_tokens(seen, plan.sink_tok, max(0, first - plan.window_tok + 1), k.device)
            mass = attention_mass(heavy, chosen_tokens(starts[:, part], counts[:, part], chunk_tok, seen), fixed)
            if i == len(out):
                out.append({name: [] for name in (*VALUES, "fixed", "missing")})
            values = mass.recall, mass.oracle_ratio, mass.top, mass.fixed, mass.outside - mass.selected
            for found_values, value in zip(out[i].values(), values, strict=True):
                found_values.append(value.tolist())
    return [{name: torch.tensor(values).mean(0).tolist() for name, values in stage.items()} for stage in out]


def rows_of(size: int) -> range:
    """The queries by which a block of ``size`` queries is judged, counted from its first."""
    return range(size // (2 * ROWS), size, max(1, size // ROWS))


def selecting(
    attention: LayerAttention, q: Tensor, q_begin: int, k: Tensor, begin: int, end: int, shared: dict[Any, Any], decoding: bool = False
) -> Callable[[int], list[tuple[Tensor, Tensor, int, bool]]]:
    """What is selected for a row of the block from ``begin`` to ``end``: by stage starts, counts, tokens of a chunk; whether for it alone.

    ``decoding``: the row is a decode step. So it is of a method that selects in decode only, a step behind a prompt that was read. Of one
    whose later queries decide for earlier ones, all that there are take part.
    """
    import torch

    from hipexp.attention import Memory
    from hipexp.attention.blocks import QueryBlocks, Step
    from hipexp.attention.layer import no_rope
    from hipexp.attention.method import EVERYTHING, Call, Contract, SelectingMethod
    from hipexp.attention.methods.hip import Hip

    method, tables, scale = attention.method, attention.tables or no_rope(k.device), attention.scale
    assert isinstance(method, SelectingMethod)

    def call(first: int, last: int, **more: Any) -> Call:
        blocks = QueryBlocks.cut(q[:, first - q_begin : last - q_begin], first, method.query_block_tok)
        return Call(blocks, k[:, :last], tables, scale, shared=shared, softcap=attention.softcap, **more)

    def one(row: int, memory: Memory, state: Any = None) -> Call:
        at = begin + row
        query = QueryBlocks.one(q[:, at - q_begin : at - q_begin + 1], at, Step.at(at, method.n_candidates(at), False, k.device))
        of_row = shared.setdefault(("row", row), {}) if decoding else shared  # every row is a step of its own, in all layers
        return Call(query, k[:, : at + 1], tables, scale, True, memory, state, of_row, softcap=attention.softcap)

    if isinstance(method, Hip):
        stages = method.plan.decode if decoding else method.plan.stages
        chunks = [stage.chunk_tok for stage in (*stages[1:], stages[-1])]

        def lists_of(memory: Memory) -> list[tuple[Tensor, Tensor, int, bool]]:
            return [(*memory.lists[i + 1], chunk, decoding) for i, chunk in enumerate(chunks)]

        state = method.new_state()

        def decode_step(row: int) -> list[tuple[Tensor, Tensor, int, bool]]:
            memory = Memory()
            method.select(one(row, memory, state))
            return lists_of(memory)

        if decoding:
            return decode_step
        of_block = Memory()
        method.select(call(begin, end, memory=of_block))
        return lambda row: lists_of(of_block)
    state, selects = method.new_state(), not decoding and method.exact_tok(False) < EVERYTHING
    dense = not selects and method.exact_tok(True) >= EVERYTHING
    first = begin if state is None else q_begin  # what remembers nothing has to see the block only
    if dense or selects:
        method.observe(call(first, end, state=state))
    elif first < begin:
        method.observe(call(first, begin, state=state))
    if dense:
        everything = torch.arange(end, device=k.device)[None, None], torch.full((1, 1), end, device=k.device)
        if decoding and state is None:  # later layers may take over what each step chose
            for row in rows_of(end - begin):
                method.observe(one(row, Memory()))
        return lambda row: [(*everything, 1, False)]
    if selects:
        last = q_begin + q.shape[1] if Contract.causal in method.exceptions else end
        selection, n = method.select(call(begin, last, state=state)), -(-(end - begin) // method.query_block_tok)
        return lambda row: [(selection.blocks[:, :n], selection.counts[:, :n], method.block(False), False)]

    def step(row: int) -> list[tuple[Tensor, Tensor, int, bool]]:
        own_state = copy.deepcopy(state)
        if row:
            method.observe(call(begin, begin + row, state=own_state))
        asked = one(row, Memory(), own_state)
        method.observe(asked)
        selection = method.select(asked)
        return [(selection.blocks, selection.counts, method.block(True), True)]

    return step


def decodes(task: Task) -> bool:
    """Whether selections are those of decode steps."""
    return task.phases == ["decode"]


def check_blocks(task: Task, lengths_tok: list[int], plans: list[LayerPlan]) -> None:
    """Refuse texts in which nothing is pruned, and more samples than there are query blocks. Raises ``ConfigError``."""
    for number, length_tok in enumerate(lengths_tok):
        first, last, _ = _range_of(plans, length_tok, task.divisors or list(DIVISORS))
        if last < first:
            raise ConfigError(
                f"task.contexts_tok[{number}]={length_tok} is too short: nothing is pruned in it; use longer texts, or keep less"
            )
        if task.samples > last - first + 1:
            raise ConfigError(
                f"task.samples={task.samples} must be at most {last - first + 1}, the query blocks of {length_tok} tokens that are pruned"
            )
