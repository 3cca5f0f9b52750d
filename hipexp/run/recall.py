"""``task=recall``: which part of the attention the selection holds after each stage, against dense attention and against an oracle.

On activations of a model that reads retrieval prompts of its trained length, where dense attention at true positions is right, with the
budgets of all stages divided; or, with a geometry, on structured random keys of any length, at the distance of the scoring, or at true
positions where a method scores so. Selections are those of prefill, for sampled query blocks, or with ``task.phases=[decode]`` those of the
decode steps of their queries, in which every stage runs; each block is judged by some of its queries. Of an offload, the format counts:
stages see keys as it keeps them, and are judged by the true ones.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from hipexp.config.check import CONTEXT_TOK, OFFLOADING, TEXTS, check_experiment
from hipexp.config.schema import ConfigError, Experiment, Task
from hipexp.report.tables import text_table
from hipexp.run import attention_point
from hipexp.run.budgets import divided, selecting_method
from hipexp.run.job import Job
from hipexp.run.judged import DIVISORS, ROWS, VALUES, Stages, check_blocks, decodes, text_of
from hipexp.run.latency import quantile
from hipexp.run.ledger import Ledger
from hipexp.run.strategy import describe
from hipexp.suites import infbench
from hipexp.suites.sample import Encode, ProtocolCard
from hipexp.track import Trackers

if TYPE_CHECKING:
    from hipexp.hf import Loaded

SCORER = "hipexp-1"  # raise it when the same selection can get another value


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
        selecting_method(experiment.pipeline.plan_alone(None))
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
        full = card_of(experiment, card, loaded) | {"strategy": describe(pipeline, loaded.n_layers, None, loaded.own_layers, loaded.notes)}
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
