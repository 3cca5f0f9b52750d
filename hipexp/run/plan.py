"""``--dry-run``: what a point would do, without loading weights: its configuration, what attention does, its folder, what is left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hipexp.config.check import check_layers
from hipexp.config.schema import Experiment
from hipexp.output import JSON, QUIET, Flags, aside, to_json
from hipexp.run.identity import config_path, facts_of, key_of
from hipexp.run.ledger import read_json, read_rows
from hipexp.run.point import check_method, check_point, folder_of, load_tokenizer, open_suite_for, resolved, stored
from hipexp.run.room import check_room, weights_bytes
from hipexp.run.strategy import describe
from hipexp.suites.sample import Suite


def plan(experiment: Experiment) -> dict[str, Any]:
    """What a point would do, as plain data; refuses what the run would refuse before it loads weights.

    ``samples`` in all, ``finished`` and ``left`` of them (measurements, for times), ``stored``: whether the result is there;
    ``strategy`` as the run prints it. Raises ``ConfigError``, and ``DataMissing`` for data or a part of a model that is not here.
    """
    samples, strategy = points_and_strategy(experiment)
    folder, known = folder_of(experiment), stored(experiment)
    finished = len({(row["subtask"], row["sample"]) for row in read_rows(folder)} & set(samples))
    return {
        "run_key": key_of(experiment),
        "folder": str(folder),
        "stored": known,
        "samples": len(samples),
        "finished": finished,
        "left": 0 if known else len(samples) - finished,
        "strategy": read_json(folder / "card.json").get("strategy", strategy) if known else strategy,
        "config": resolved(experiment),
    }


def checked_plan(experiment: Experiment, flags: Flags) -> dict[str, Any]:
    """The plan of a point that ``check_point`` lets through. Raises as :func:`plan`."""
    check_point(experiment)
    with aside(flags):
        return plan(experiment)


def points_and_strategy(experiment: Experiment) -> tuple[list[tuple[str, int]], list[str]]:
    """The samples of a run, by subtask and number, and what attention does, in words. Raises as :func:`plan`."""
    from hipexp.run import attention_point, latency, recall

    task, model = experiment.task, experiment.model
    if task.geometry is not None:
        job = attention_point.job(experiment) if task.name == "latency" else recall.job(experiment, None)
        return list(job.points), job.card["strategy"]
    facts = facts_of(model)
    if model.base_url is not None:
        from hipexp.run.served import UserTurn

        tokenizer = load_tokenizer(model)
        suite = open_suite_for(experiment, UserTurn(tokenizer) if model.prompt == "chat" else tokenizer, facts.trained_tok)
        return names_of(suite), [f"attention: the server's ({model.path} at {model.base_url})"]
    check_layers(experiment, facts)
    check_method(experiment, facts.layers)
    suite = open_suite_for(experiment, load_tokenizer(model), facts.trained_tok)
    check_room(experiment, facts, suite, weights_bytes(model))
    own_layers, notes = layers_of(str(config_path(model).parent), model.dtype)
    offload = None if task.name == "recall" else experiment.offload
    strategy = describe(experiment.pipeline, facts.layers, offload, own_layers, notes)
    if task.name == "latency":
        return [(one.subtask, one.repeat) for one in latency.points(experiment, facts.trained_tok)], strategy
    if task.name == "recall":
        return [(one.subtask, one.block) for one in recall.points(recall.filled(task, facts.trained_tok))], strategy
    return names_of(suite), strategy


def names_of(suite: Suite | None) -> list[tuple[str, int]]:
    """The samples of a suite."""
    return [] if suite is None else [(item.subtask, item.index) for item in suite.items()]


@lru_cache(maxsize=8)
def layers_of(folder: str, dtype: str) -> tuple[list[int], list[str]]:
    """The layers of the model in ``folder`` that keep their own attention, and words on them, from its shapes alone.

    What takes weights to find out, such as layers without RoPE, the run notes besides.
    """
    from hipexp.hf.kinds import kept_layers, layer_kinds
    from hipexp.hf.skeleton import skeleton

    kinds = layer_kinds(skeleton(Path(folder), dtype))
    return [i for i, kind in enumerate(kinds) if kind.keeps], kept_layers(kinds)


def progress(told: dict[str, Any]) -> str:
    """How far a run is, in words."""
    if told["stored"]:
        return f"stored: all {told['samples']} sample(s) are done, the command shows the result"
    begun = f"{told['finished']} of {told['samples']} sample(s) finished" if told["finished"] else f"not begun: {told['samples']} sample(s)"
    return f"{begun}, {told['left']} left"


def text(told: dict[str, Any], config: str = "") -> str:
    """A plan for a terminal; ``config`` comes first, and the last line is the run folder."""
    return "\n".join([*([config.rstrip() + "\n"] if config else []), *told["strategy"], progress(told), told["folder"]])


def sweep_text(points: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The plans of the points of a sweep, each under its overrides, and how many samples are left in all."""
    parts = [f"[{number}/{len(points)}] {words}\n{text(told)}" for number, (words, told) in enumerate(points, 1)]
    left = {told["folder"]: told["left"] for _, told in points}
    return "\n\n".join([*parts, f"{len(left)} run(s), {sum(left.values())} sample(s) left"])


def show(points: Sequence[tuple[str, dict[str, Any]]], flags: Flags, config: str = "") -> None:
    """Print the plans of points, each with its overrides (empty: the only one, shown with its ``config``)."""
    if JSON in flags:
        for words, told in points:
            print(to_json(told | ({"overrides": words} if words else {})))
    elif QUIET in flags:
        print("\n".join(told["folder"] for _, told in points))
    else:
        print(text(points[0][1], config) if config else sweep_text(points))
