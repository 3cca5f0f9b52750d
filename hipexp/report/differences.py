"""What two runs differ in: their protocol cards, their machines, their configurations."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

from hipexp.report.runs import Run

# Of a card, what two runs may differ in and still be compared: what attention did is what is compared; how many samples there are, and
# what was cut off them, is told sample by sample; a note repeats what data and protocol say.
FREE = ("strategy", "samples", "note")
BY_SUBTASK = ("template", "metric", "length_tok", "new_tok")
FREE_OF_MODEL = ("dtype", "n_layers", "tp_processes", "transformers", "trained_tok")
WHY = {
    "suite": "other tasks",
    "protocol": "prompts and scores follow other rules",
    "edition": "another edition of the scorer or of what is measured",
    "template": "the prompts have other words",
    "wording": "the prompts have other words",
    "metric": "scores mean something else",
    "scorer": "the same answer may get another score",
    "length_tok": "the contexts have other lengths",
    "new_tok": "answers may have other lengths",
    "data": "the samples are others",
    "truncation": "prompts are cut otherwise",
    "stops": "answers end otherwise",
    "decoding": "tokens are chosen otherwise",
    "chat_template": "the prompts are wrapped otherwise",
    "model": "another model or tokenizer reads the prompts",
    "machine": "times of different machines say nothing about what was run on them",
}


class Difference(NamedTuple):
    """A dotted ``key`` with its value in both runs; None where a run has none. ``why`` it matters."""

    key: str
    a: Any
    b: Any
    why: str = ""


def card_differences(a: Run, b: Run) -> list[Difference]:
    """What forbids to compare two runs: where their protocol cards disagree, about subtasks that both have."""
    shared = a.card.get("samples", {}).keys() & b.card.get("samples", {}).keys()
    mine, theirs = (binding(run.card, shared or run.card.get("samples", {}).keys()) for run in (a, b))
    return [one._replace(why=WHY.get(one.key.split(".")[0], "the protocol is another")) for one in differing(mine, theirs)]


def binding(card: dict[str, Any], subtasks: Collection[str]) -> dict[str, Any]:
    """The part of a card that must be the same for samples to be compared; of what is said by subtask, that of ``subtasks``."""
    kept = {name: value for name, value in card.items() if name not in FREE}
    for name in BY_SUBTASK:
        if isinstance(kept.get(name), dict):
            kept[name] = {subtask: value for subtask, value in kept[name].items() if subtask in subtasks}
    for name, free in (("truncation", ("removed_tok",)), ("model", FREE_OF_MODEL)):
        if isinstance(kept.get(name), dict):
            kept[name] = {key: value for key, value in kept[name].items() if key not in free}
    return kept


def machine_differences(a: Run, b: Run) -> list[Difference]:
    """What forbids to compare times: another device, another number of threads."""
    mine, theirs = ({name: run.environment.get(name) for name in ("device", "threads")} for run in (a, b))
    return [one._replace(key=f"machine.{one.key}", why=WHY["machine"]) for one in differing(mine, theirs)]


def environment_differences(a: Run, b: Run) -> list[Difference]:
    """Other differences of the surroundings: versions of packages, the source revision."""
    mine, theirs = ({name: value for name, value in run.environment.items() if name not in ("device", "threads")} for run in (a, b))
    return list(differing(mine, theirs))


def config_differences(a: Run, b: Run) -> list[Difference]:
    """The keys of the configuration whose values differ; tracking aside, which decides nothing."""
    mine, theirs = ({name: value for name, value in run.config.items() if name != "track"} for run in (a, b))
    return list(differing(mine, theirs))


def differing(a: Any, b: Any, key: str = "") -> Iterator[Difference]:
    """The smallest parts of nested data that differ, in the order of ``a``."""
    if a == b:
        return
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            yield from differing(a.get(name), b.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(a, list) and isinstance(b, list) and any(isinstance(one, dict) for one in (*a, *b)):
        for number, pair in enumerate(zip_longest(a, b)):
            yield from differing(*pair, f"{key}.{number}")
    else:
        yield Difference(key, a, b)


def brief(value: Any) -> str:
    """A value of a configuration in a line: of a pipeline or stage that the other run lacks, its name or its fields that say something."""
    if value is None:
        return "–"
    text = str(value)
    if isinstance(value, dict):
        fields = ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
        text = str(value.get("name") or value.get("method") or fields)
    return text if len(text) <= 60 else text[:59] + "…"
