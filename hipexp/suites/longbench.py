"""LongBench and LongBench-E (arXiv 2308.14508): published rows, official prompts, official scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites import lm_eval
from hipexp.suites.data import ListOf, read_mapping
from hipexp.suites.data.registry import LONGBENCH, SUBTASKS
from hipexp.suites.data.resolve import find
from hipexp.suites.data.rows import Schema
from hipexp.suites.framing import Cut
from hipexp.suites.published import ONE_LINE, Prompt, Row, Rules
from hipexp.suites.scoring import longbench as scoring

SCHEMA: Schema = {
    "input": str,
    "context": str,
    "answers": ListOf((str,), 1),
    "length": int,
    "all_classes": (ListOf((str,)), type(None)),
}
PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # which chat models get without their template, as official


class LongBench(Rules):
    """See ``hipexp.suites.published.Rules``."""

    suite, protocol, note, schema = "longbench", "official", "", SCHEMA
    edition, scorer = scoring.EDITIONS[0], scoring.SCORER

    @cached_property
    def prompts(self) -> dict[str, str]:
        """The official prompt of each task."""
        return read_mapping(find(self.suite, "dataset2prompt.json", self.folder).path, str)

    @cached_property
    def limits(self) -> dict[str, int]:
        """The official limit of new tokens of each task."""
        return read_mapping(find(self.suite, "dataset2maxlen.json", self.folder).path, int)

    def cut(self) -> Cut:
        return Cut(odd_to_end=False, together=False)

    def chat(self, subtask: str) -> bool:
        return scoring.task_of(subtask) not in PLAIN

    def check(self, subtask: str, row: Row) -> None:
        if not any(answer.strip() for answer in row["answers"]):
            raise ConfigError("all its answers are empty")
        scoring.check_row({"subtask": subtask, "references": row["answers"], **self.meta(subtask, row)})

    def packages(self, subtask: str) -> tuple[str, ...]:
        return lm_eval.PACKAGES

    def prompt(self, subtask: str, row: Row) -> Prompt:
        task = scoring.task_of(subtask)
        return Prompt(filled(self.template(subtask), row, task), one_line=task == ONE_LINE)

    def template(self, subtask: str) -> str:
        return of_task(self.prompts, scoring.task_of(subtask), "prompt")

    def new_tok(self, subtask: str) -> int:
        return of_task(self.limits, scoring.task_of(subtask), "limit of new tokens")

    def references(self, subtask: str, row: Row) -> list[Any]:
        return list(row["answers"])

    def meta(self, subtask: str, row: Row) -> dict[str, Any]:
        return {"all_classes": row["all_classes"], "length": row["length"]}

    def words(self, row: Row) -> int:
        return int(row["length"])

    def metric(self, subtask: str) -> str:
        return scoring.metric_of(subtask)

    def score(self, subtask: str, prediction: str, references: list[Any], meta: dict[str, Any]) -> float:
        return scoring.score_longbench(subtask, prediction, references, meta["all_classes"])


def of_task(table: dict[str, Any], task: str, what: str) -> Any:
    """What an official file says for a task; raises ``ConfigError`` if it says nothing."""
    if task not in table:
        raise ConfigError(f"the official files hold no {what} of {task}; they hold {', '.join(table)}")
    return table[task]


def filled(template: str, row: Row, task: str) -> str:
    """A prompt with the fields of a row. Raises ``ConfigError`` for a field that the row has not."""
    try:
        return template.format(**row)
    except (KeyError, IndexError) as error:
        raise ConfigError(f"the prompt of {task} asks for {error}, which its rows do not have; fetch prompts and rows again") from error
    except ValueError as error:
        raise ConfigError(f"the prompt of {task} is no template ({error}); fetch the prompts again") from error


def check_subtasks(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks asked for (the 21 if none is named; those of LongBench-E are ``<task>_e``), or ``ConfigError`` for an unknown one."""
    for name in names:
        if name not in SUBTASKS["longbench"]:
            raise ConfigError(f"task.subtasks: {name!r} is no task of LongBench; use {', '.join(SUBTASKS['longbench'])}")
    return tuple(names) or LONGBENCH
