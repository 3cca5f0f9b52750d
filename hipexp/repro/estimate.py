"""What the full size of a table takes on one large GPU: an ESTIMATE, from speeds that were measured there and sizes of the published data.

A prompt of ``T`` tokens: ``2 · parameters · T`` operations at ``RATE`` for weights, and for every layer and part of ``PART_TOK`` queries
the measured time of attention at that context; then ``NEW_TOK`` decode steps. Nothing of it was measured as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hipexp.config.check import OFFLOADING
from hipexp.config.schema import Experiment
from hipexp.run.several import Named

RATE = 4e14  # assumed: half of the bf16 operations per second that an H200 does in large products
PART_TOK, NEW_TOK, STEP_S = 32_768, 32, 0.0070
# docs/results.md, one NVIDIA H200: ms of a layer for the last 32,768 queries at a context. Methods without stages are counted as dense.
ATTENTION_MS = {
    "dense": ((0, 0.0), (131_072, 97.7), (524_288, 475.0), (1_048_576, 961.0)),
    "stages": ((0, 0.0), (131_072, 28.2), (524_288, 48.8), (1_048_576, 69.2)),
}
ALONE_HOURS = 0.02  # of attention alone at one context: `make gpu` takes under 5 minutes for three
# Rows and mean tokens of the published data: ∞Bench, arXiv 2402.13718, table 2; LongBench has 200 rows of most tasks, RULER is generated.
ROWS = {
    "passkey": (590, 122_400),
    "number_string": (590, 122_400),
    "kv_retrieval": (500, 89_900),
    "math_find": (350, 87_900),
    "longbook_choice_eng": (229, 184_400),
    "longbook_qa_eng": (351, 192_600),
    "longbook_sum_eng": (103, 171_500),
    "multifieldqa_en": (150, 10_000),
    "lcc": (500, 10_000),
    "repobench-p": (500, 10_000),
}
LONGBENCH, RULER_TASKS = (200, 10_000), 13


@dataclass(frozen=True)
class Shape:
    """Parameters, layers, and bytes of keys and values of a token (bf16)."""

    parameters: float
    layers: int
    kv_bytes: int


SHAPES = {"r1_qwen_14b": Shape(14.8e9, 48, 196_608), "gemma2_9b": Shape(9.2e9, 42, 344_064)}
USUAL = Shape(8e9, 32, 131_072)  # Llama 3 and 3.1 8B, Mistral 7B, EXAONE 7.8B


@dataclass(frozen=True)
class Estimate:
    """Hours of one GPU in all, and the most memory of a run, in GB."""

    gpu_hours: float
    memory_gb: float


def estimate(points: Iterable[Named]) -> Estimate:
    """The estimate for runs, each of which is counted whole."""
    experiments = [point.experiment for point in points]
    return Estimate(sum(map(hours, experiments)), max(map(memory_gb, experiments)))


def hours(experiment: Experiment) -> float:
    """GPU hours of a run."""
    task = experiment.task
    if task.geometry is not None:
        return ALONE_HOURS * len(task.contexts_tok or [0]) * len(task.phases or ["decode", "prefill"])
    shape = SHAPES.get(experiment.model.name, USUAL)
    kind = "stages" if experiment.pipeline is not None and experiment.pipeline.method in OFFLOADING else "dense"
    if task.name == "latency":
        limit = task.dense_max_tok or float("inf")
        each = [(length, impl) for length in task.lengths_tok or [] for impl in {kind, "dense"} if impl != "dense" or length <= limit]
        return sum(task.repeats * (prompt_s(length, impl, shape) + task.decode_steps * STEP_S) for length, impl in each) / 3600
    return sum(count * (prompt_s(tokens, kind, shape) + NEW_TOK * STEP_S) for count, tokens in prompts(experiment)) / 3600


def prompts(experiment: Experiment) -> Iterator[tuple[int, int]]:
    """How many prompts of how many tokens a run reads."""
    task, most = experiment.task, experiment.task.truncate_tok or float("inf")
    if task.name == "ruler":
        yield task.samples * len(task.subtasks or range(RULER_TASKS)), task.length_tok or 0
    elif task.name == "passkey":
        for length in task.lengths_tok or []:
            yield task.samples * len(task.depths or []), length
    elif task.name == "recall":
        yield 3, experiment.model.trained_tok or 0
    else:
        for name in task.subtasks or []:
            rows, tokens = ROWS.get(name, LONGBENCH)
            yield min(rows, task.samples), int(min(tokens, most))


def prompt_s(tokens: int, kind: str, shape: Shape) -> float:
    """Seconds to read a prompt."""
    ends = [*range(PART_TOK, tokens, PART_TOK), tokens]
    parts = zip([0, *ends], ends, strict=False)
    attention = sum(attention_ms(end, kind) * (end - begin) / PART_TOK for begin, end in parts)
    return 2 * shape.parameters * tokens / RATE + shape.layers * attention / 1000


def attention_ms(context: int, kind: str) -> float:
    """Milliseconds of a layer for ``PART_TOK`` queries, between measured contexts and beyond them by straight lines."""
    for (low, below), (high, above) in itertools.pairwise(ATTENTION_MS[kind]):
        if context <= high or high == ATTENTION_MS[kind][-1][0]:
            return below + (above - below) * (context - low) / (high - low)
    raise AssertionError("the last line has no end")


def memory_gb(experiment: Experiment) -> float:
    """GB of weights, and of keys and values of the longest prompt where they stay on the device.

    Of data that is cut a prompt as long as the cut; of other data one of mean length, which the longest ones exceed.
    """
    task, shape = experiment.task, SHAPES.get(experiment.model.name, USUAL)
    if task.geometry is not None:
        return 8 * 4096 * max(task.contexts_tok or [0]) / 1e9  # keys and values of eight layers are timed
    read = [task.truncate_tok or tokens for _, tokens in prompts(experiment)]
    lengths = list(task.lengths_tok or []) if task.name == "latency" else read
    if not experiment.offload.on:
        return (2 * shape.parameters + shape.kv_bytes * max(lengths)) / 1e9
    limit = float("inf") if task.dense_max_tok is None else task.dense_max_tok
    dense = [length for length in lengths if task.name == "latency" and length <= limit]  # is timed too, with its own on the device
    kept = max([*dense, min(max(lengths), experiment.offload.device_tok or 0)])
    return (2 * shape.parameters + shape.kv_bytes * kept) / 1e9
