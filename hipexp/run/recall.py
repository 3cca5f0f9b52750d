"""``task=recall``: which part of the attention the selection holds after each stage, against dense attention and against an oracle.

On activations of a model that reads retrieval prompts of its trained length, where dense attention at true positions is right, with the
budgets of all stages divided; or, with a geometry, on structured random keys of any length, at the distance of the scoring, or at true
positions where a method scores so. Selections are those of prefill, for sampled query blocks, or with ``task.phases=[decode]`` those of the
decode steps of their queries, in which every stage runs; each block is judged by some of its queries. Of an offload, the format counts:
stages see keys as it keeps them, and are judged by the true ones.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from hipexp.config.check import CONTEXT_TOK, OFFLOADING, TEXTS, check_experiment
from hipexp.config.offload import page_tok_of
from hipexp.config.schema import ALONE, ConfigError, Experiment, LayerPlan, Offload, Pipeline, PruneRope, Task, read_geometry
from hipexp.report.tables import text_table
from hipexp.run import attention_point
from hipexp.run.job import Job
from hipexp.run.latency import quantile
from hipexp.run.ledger import Ledger
from hipexp.run.strategy import describe
from hipexp.suites import infbench
from hipexp.suites.sample import Encode, LineEncoder, ProtocolCard
from hipexp.track import Trackers

if TYPE_CHECKING:
    from torch import Tensor

    from hipexp.attention import LayerAttention
    from hipexp.attention.method import SelectingMethod
    from hipexp.hf import Loaded

DIVISORS = (1, 4, 8)
SCORER = "hipexp-1"  # raise it when the same selection can get another value
ROWS = 4  # queries of a block by which it is judged
VALUES = ("mass", "oracle_ratio", "top")


@dataclasses.dataclass(frozen=True)
class Point:
    """One line of ``samples.jsonl``: a query block of a text (``source``: a subtask or a generator) under divided budgets."""

    source: str
    context_tok: int
    divisor: int
    block: int

    @property
    def subtask(self) -> str:
        return f"{self.source}@{self.context_tok}/{self.divisor}"


def filled(task: Task, trained_tok: int | None) -> Task:
    """The task with everything that it leaves open said. ``trained_tok`` None: without a model, with a geometry; imports torch then."""
    task = dataclasses.replace(task, divisors=sorted(task.divisors or DIVISORS), phases=["decode"] if decodes(task) else None)
    if task.geometry is None:
        sources = list(infbench.check_subtasks(task.subtasks or []))
        return dataclasses.replace(task, subtasks=sources, contexts_tok=sorted(task.contexts_tok or [trained_tok or 0]))
    sources = task.subtasks or list(TEXTS)
    return dataclasses.replace(
        attention_point.filled(task), phases=task.phases, subtasks=sources, contexts_tok=sorted(task.contexts_tok or [CONTEXT_TOK])
    )


def decodes(task: Task) -> bool:
    """Whether selections are those of decode steps."""
    return task.phases == ["decode"]


def points(task: Task) -> list[Point]:
    """Every line of the run."""
    assert task.contexts_tok is not None and task.subtasks is not None
    return [
        Point(source, context, divisor, block)
        for source in task.subtasks
        for context in sorted(task.contexts_tok)
        for block in range(task.samples)
        for divisor in task.divisors or []
    ]


def divided(pipeline: Pipeline, divisor: int) -> Pipeline:
    """The pipeline with ``1/divisor`` of what it keeps, also in layer groups; sinks and window stay. Raises ConfigError."""
    if pipeline.method != "hip":
        return _divided_params(pipeline, divisor) if divisor > 1 else pipeline

    def less(keep_tok: int, chunk_tok: int, key: str) -> int:
        if keep_tok % (divisor * chunk_tok):
            raise ConfigError(
                f"task.divisors: {divisor} does not divide {key}.keep_tok={keep_tok} into chunks of {chunk_tok}; leave it out, or keep more"
            )
        return keep_tok // divisor

    def group(name: str) -> Any:
        made = pipeline.layers[name]
        stages = {
            number: stage
            if stage.keep_tok is None
            else dataclasses.replace(
                stage,
                keep_tok=less(
                    stage.keep_tok, stage.chunk_tok or pipeline.stages[int(number)].chunk_tok, f"pipeline.layers.{name}.stages.{number}"
                ),
            )
            for number, stage in made.stages.items()
        }
        return dataclasses.replace(made, stages=stages)

    stages = [
        dataclasses.replace(stage, keep_tok=less(stage.keep_tok, stage.chunk_tok, f"pipeline.stages[{i}]"))
        for i, stage in enumerate(pipeline.stages)
    ]
    return dataclasses.replace(pipeline, stages=stages, layers={name: group(name) for name in pipeline.layers})


def _divided_params(pipeline: Pipeline, divisor: int) -> Pipeline:
    def less(groups: list[str], key: str, own: dict[str, Any]) -> dict[str, Any]:
        method, found = _selecting_method(pipeline.plan_layer(ALONE, groups)), dict(own)
        if not method.budgets:
            name = pipeline.method
            raise ConfigError(f"task.divisors: pipeline.method={name} has no budget to divide by {divisor}; use task.divisors=[1]")
        for name in method.budgets if not groups else own.keys() & method.budgets:
            value = getattr(method, name)
            if value % divisor:
                raise ConfigError(f"task.divisors: {divisor} does not divide {key}.params.{name}={value}; leave it out, or keep more")
            found[name] = value // divisor
        return found

    layers = {
        name: dataclasses.replace(group, params=less([name], f"pipeline.layers.{name}", group.params)) if group.params else group
        for name, group in pipeline.layers.items()
    }
    return dataclasses.replace(pipeline, params=less([], "pipeline", pipeline.params), layers=layers)


def check_lengths(experiment: Experiment, encode: Encode, trained_tok: int) -> None:
    """Refuse lengths that hold no frame, or are beyond what dense attention can read. Raises ``ConfigError``."""
    task = filled(experiment.task, trained_tok)
    assert task.subtasks is not None and task.contexts_tok is not None
    for number, length_tok in enumerate(task.contexts_tok):
        if length_tok > trained_tok:
            raise ConfigError(
                f"task.contexts_tok[{number}]={length_tok} must be at most the trained length {trained_tok}: beyond it dense attention "
                f"is no measure; try {trained_tok}, or keys without a model: task.geometry=llama31_8b"
            )
        for subtask in task.subtasks:
            infbench.check_length(subtask, length_tok, encode, task.wording, f"task.contexts_tok[{number}]")


def check_budgets(experiment: Experiment) -> None:
    """Refuse divisors that leave a pipeline which would itself be refused. Needs no torch. Raises ``ConfigError``."""
    from hipexp.run.point import check_method

    assert experiment.pipeline is not None
    if experiment.pipeline.method not in OFFLOADING:
        _selecting_method(experiment.pipeline.plan_alone(None))
    for divisor in experiment.task.divisors or DIVISORS:
        less = dataclasses.replace(experiment, pipeline=divided(experiment.pipeline, divisor))
        try:
            check_experiment(less)
            check_method(less)
        except ConfigError as error:
            raise ConfigError(f"task.divisors: {divisor} leaves too little ({error})") from error
    if experiment.task.geometry is not None:
        check_blocks(
            experiment.task, experiment.task.contexts_tok or [CONTEXT_TOK], [experiment.pipeline.plan_alone(experiment.task.layer)]
        )


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


def job(experiment: Experiment, loaded: Loaded | None) -> Job:
    """The run of a recall experiment; ``loaded`` None: of one with a geometry."""
    from hipexp.run.point import card_of

    experiment = dataclasses.replace(experiment, task=filled(experiment.task, loaded.trained_tok if loaded else None))
    task, pipeline = experiment.task, experiment.pipeline
    assert pipeline is not None, "refused by the checks"
    where = "dense attention at true positions" if loaded else "keys at the distance of the scoring"
    asked = "decode steps" if decodes(task) else "queries"
    card = ProtocolCard(
        suite="recall",
        protocol="hipexp",
        edition=f"attention mass of {task.samples} query blocks a text, {ROWS} {asked} each, {where}; keeps divided by {task.divisors}",
        template={name: infbench.template_id(name, task.wording) for name in task.subtasks or []} if loaded else {},
        wording=task.wording if loaded else "",
        metric={one.subtask: "mass_recall" for one in points(task)},
        scorer=f"{SCORER}: share of the mass outside sinks and window that the last stage selects, mean over heads and layers",
        length_tok={one.subtask: one.context_tok for one in points(task)},
        samples={one.subtask: task.samples for one in points(task)},
        new_tok={},
        data=f"generated prompts, seed {experiment.seed}" if loaded else f"structured random keys and queries, seed {experiment.seed}",
        stops=[],
        model={"geometry": task.geometry, "dtype": task.dtype, "layer": task.layer},
    )
    todo = [(one.subtask, one.block) for one in points(task)]
    if loaded is None:
        full = card.to_dict() | {"strategy": attention_point.strategy_of(pipeline, task.layer)}
    else:
        full = card_of(experiment, card, loaded) | {"strategy": describe(pipeline, loaded.n_layers)}
    return Job(todo, full, partial(measure, experiment, loaded))


def measure(experiment: Experiment, loaded: Loaded | None, ledger: Ledger, trackers: Trackers) -> dict[str, Any]:
    """Measure every point that is not in the ledger yet; returns the result part of the summary."""
    import torch

    from hipexp.run.point import token_bar

    todo = [one for one in points(experiment.task) if not ledger.has(one.subtask, one.block)]
    held: tuple[tuple[str, int], Any] = ("", 0), None
    with torch.inference_mode(), token_bar(sum(one.context_tok for one in todo)) as bar:
        for one in todo:
            bar.set_description(f"recall {one.subtask}")
            if held[0] != (one.source, one.context_tok):
                held = ("", 0), None  # before the next text takes as much memory
                held = (one.source, one.context_tok), text_of(experiment, loaded, one.source, one.context_tok)
            row = line_of(one, held[1](one.divisor, one.block))
            ledger.append(row)
            trackers.log(row, {})
            bar.advance_to(one.context_tok)
    return result(ledger.rows)


# Of each stage the values of every head: mass, oracle_ratio, top, fixed, missing (mass outside sinks and window that is not selected).
Stages = list[dict[str, list[float]]]
# Divisor (or name of a pipeline) and number of the block -> layer -> stages.
Text = Callable[[Any, int], dict[int, Stages]]


def text_of(experiment: Experiment, loaded: Loaded | None, source: str, context_tok: int) -> Text:
    """A text, ready to be asked for the blocks that are sampled from it."""
    assert experiment.pipeline is not None
    pipelines = {divisor: divided(experiment.pipeline, divisor) for divisor in experiment.task.divisors or []}
    if loaded is None:
        return _generated(experiment, pipelines, source, context_tok)
    from hipexp import hf

    encode = LineEncoder(loaded.tokenizer)
    sample = infbench.make_sample(source, 0, 1, context_tok, encode, experiment.seed, experiment.task.wording)
    return heard_text(experiment, hf.activations(loaded, sample.tokens), attentions(loaded, pipelines))


def attentions(loaded: Loaded, pipelines: Mapping[Any, Pipeline]) -> dict[Any, dict[int, LayerAttention]]:
    """The attention of every layer of a model under each of the ``pipelines``."""
    from hipexp import hf

    layers: dict[Any, dict[int, LayerAttention]] = {}
    for name, pipeline in pipelines.items():
        with hf.install(loaded.model, pipeline, loaded.trained_tok) as installed:
            layers[name] = dict(installed.layers)
    return layers


def heard_text(
    experiment: Experiment,
    heard: dict[int, tuple[Tensor, Tensor]],
    layers: Mapping[Any, dict[int, LayerAttention]],
    last: bool = False,
) -> Text:
    """A text of which every layer's raw queries and keys were heard. ``layers``: its attention under pipelines by name.

    Which blocks are sampled is up to the experiment, whatever the pipelines. ``last``: only the last stage is judged.
    """
    from hipexp.attention.recall import logits_in_place

    assert experiment.pipeline is not None
    plans, n_tok = experiment.pipeline.plan(len(heard)), next(iter(heard.values()))[0].shape[1]
    check_blocks(experiment.task, [n_tok], plans)
    size = _range_of(plans, n_tok, experiment.task.divisors or list(DIVISORS))[2]
    one = next(iter(layers.values()))

    @lru_cache(ROWS * len(heard))  # pipelines are asked for the same block, one after the other
    def dense(layer: int, seen: int) -> Tensor:
        (q, k), tables = heard[layer], one[layer].tables
        return logits_in_place(q[:, seen - 1], k[:, :seen], one[layer].scale, tables.upto(seen) if tables else None)

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


def _generated(experiment: Experiment, pipelines: dict[int, Pipeline], source: str, context_tok: int) -> Text:
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

    method = _selecting_method(plan)
    less = dataclasses.replace(method, **{name: getattr(method, name) // divisor for name in method.budgets})
    return method.query_block_tok, min((tok for tok in (less.exact_tok(False), less.exact_tok(True)) if tok < EVERYTHING), default=0)


def _selecting_method(plan: LayerPlan) -> SelectingMethod:
    from hipexp.attention.method import SelectingMethod
    from hipexp.attention.methods import make_method

    method = make_method(plan)
    if not isinstance(method, SelectingMethod):
        raise ConfigError(f"task=recall measures what is selected, and pipeline.method={plan.method} attends to everything; choose another")
    return method


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
    found = _selecting(attention, q, q_begin, kept, begin, end, shared, decoding)
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


def _selecting(
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
        return Call(blocks, k[:, :last], tables, scale, shared=shared, **more)

    def one(row: int, memory: Memory, state: Any = None) -> Call:
        at = begin + row
        query = QueryBlocks.one(q[:, at - q_begin : at - q_begin + 1], at, Step.at(at, method.n_candidates(at), False, k.device))
        of_row = shared.setdefault(("row", row), {}) if decoding else shared  # every row is a step of its own, in all layers
        return Call(query, k[:, : at + 1], tables, scale, True, memory, state, of_row)

    if isinstance(method, Hip):
        stages = method.plan.decode if decoding else method.plan.stages
        chunks = [stage.chunk_tok for stage in (*stages[1:], stages[-1])]

        def lists_of(memory: Memory) -> list[tuple[Tensor, Tensor, int, bool]]:
            return [(*memory.lists[i + 1], chunk, decoding) for i, chunk in enumerate(chunks)]

        def decode_step(row: int) -> list[tuple[Tensor, Tensor, int, bool]]:
            memory = Memory()
            method.select(one(row, memory))
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


def line_of(one: Point, layers: dict[int, Stages]) -> dict[str, Any]:
    """The line of ``samples.jsonl`` of a block; ``layers`` holds every layer, stage and head (means over the block's queries)."""
    score = 100 * statistics.fmean(value for stages in layers.values() for value in stages[-1]["mass"])
    rounded = {
        str(i): [{name: [round(value, 5) for value in values] for name, values in stage.items()} for stage in stages]
        for i, stages in layers.items()
    }
    return row_of(one.subtask, one.block, one.context_tok, score) | {"recall": round(score / 100, 5), "layers": rounded}


def row_of(subtask: str, number: int, context_tok: int, score: float) -> dict[str, Any]:
    """What every line of a ledger holds, where nothing is answered."""
    return {
        "subtask": subtask, "sample": number, "prediction": "", "references": [], "score": round(score, 3), "context_tok": context_tok,
        "new_tok": 0, "removed_tok": 0, "prefill_ms": 0.0, "decode_ms": None, "status": "done", "length_tok": context_tok, "peak_bytes": 0,
        "exact": False, "traffic": {},
    }  # fmt: skip


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``recall``: by text and divisor, by stage: mean and 5th percentile over heads, layers and blocks; and of the last stage by layer."""
    scores: dict[str, dict[str, Any]] = {}
    recall: dict[str, Any] = {}
    for name in dict.fromkeys(row["subtask"] for row in rows):
        mine = [row for row in rows if row["subtask"] == name]
        score = statistics.fmean(row["score"] for row in mine)
        scores[name] = {"metric": "mass_recall", "score": round(score, 2), "n": len(mine)}
        n_stages = len(next(iter(mine[0]["layers"].values())))
        recall[name] = {
            "fixed": spread([value for stages in _layers(mine) for value in stages[-1]["fixed"]]),
            "stages": [
                {value: spread([x for stages in _layers(mine) for x in stages[i][value]]) for value in VALUES} for i in range(n_stages)
            ],
            "layers": {
                layer: {"mass": spread([x for row in mine for x in row["layers"][layer][-1]["mass"]])} for layer in mine[0]["layers"]
            },
        }
    average = round(statistics.fmean(cell["score"] for cell in scores.values()), 2)
    empty: dict[str, Any] = {"protocol": "hipexp", "note": "", "exact": False, "latency": {}, "memory": {"peak_bytes": 0}, "traffic": {}}
    return {"scores": scores, "average": average, "recall": recall} | empty


def _layers(rows: list[dict[str, Any]]) -> Iterator[Stages]:
    return (stages for row in rows for stages in row["layers"].values())


def spread(values: list[float]) -> dict[str, float]:
    """Mean and 5th percentile."""
    return {"mean": round(statistics.fmean(values), 4), "p5": round(quantile(values, 0.05), 4)}


def table(summary: dict[str, Any]) -> str:
    """What each stage holds, by text and divisor."""
    cells = []
    for name, found in summary["recall"].items():
        for i, stage in enumerate(found["stages"]):
            last = found["fixed"]["mean"] if i == 0 else None
            values = [stage[value][part] for value in VALUES for part in ("mean", "p5")]
            cells.append([name if i == 0 else "", i, summary["scores"][name]["n"] if i == 0 else None, last, *values])
    shown = [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row] for row in cells]
    header = ["text/divisor", "stage", "blocks", "sinks+window", "mass", "p5", "of oracle", "p5", "top 64", "p5"]
    words = (
        "mass: share of the attention outside sinks and window that is still selected after the stage; of oracle: in parts of what the\n"
        "heaviest tokens of each head hold, as many; top 64: share of the 64 heaviest. Means over heads, layers, blocks; 5th percentiles"
    )
    return text_table(header, shown, left=1) + "\n" + words
