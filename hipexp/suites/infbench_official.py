"""∞Bench (arXiv 2402.13718) with published rows, or generated ones in their form, under the prompts of a protocol of others.

``completion`` and ``chat`` are the two of the official repository (for base models, and for GPT-4), ``infllm`` is that of InfLLM,
``minference`` that of MInference as its scripts stand since 2025. They differ in prompts, chat template, cut and limits of new tokens, and
their scores must not be mixed.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites import lm_eval
from hipexp.suites.data import ListOf, read_literals, read_mapping
from hipexp.suites.data.resolve import find
from hipexp.suites.data.rows import Schema
from hipexp.suites.framing import Cut
from hipexp.suites.longbench import filled, of_task
from hipexp.suites.published import Prompt, Row, Rules
from hipexp.suites.scoring import infbench as scoring

ANSWER = ListOf((str, int, float), 1)
SCHEMA: Schema = {"context": str, "input": str, "answer": (ANSWER, str, int, float), "options": ListOf((str,))}
TEMPLATES = {  # in the official prompt file, of which MInference has a copy
    "completion": "yarn_mistral_templates",
    "chat": "gpt4_templates",
    "minference": "yarn_mistral_templates",
}
PROTOCOLS = (*TEMPLATES, "infllm")
NEW_TOK = {  # official, of ``completion``; ``chat`` had no limit
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "longbook_sum_eng": 1200,
    "longbook_qa_eng": 40,
    "longbook_choice_eng": 40,
    "longdialogue_qa_eng": 40,
    "longbook_qa_chn": 40,
    "code_debug": 5,
    "code_run": 5,
    "math_calc": 30000,
    "math_find": 3,
}
MINFERENCE_NEW_TOK = NEW_TOK | {"passkey": 15, "number_string": 20, "kv_retrieval": 80}
CHAT_NEW_TOK, SYSTEM = 2048, "You are a helpful assistant"  # official, without a full stop
NOTES = {
    "completion": "",
    "chat": f"at most {CHAT_NEW_TOK} new tokens, where the official script sets no limit",
    "minference": "",
    "infllm": "scored by the official rules, not by InfLLM's own, and cut in the middle, where InfLLM keeps 128 tokens and the end",
}
USE_LM_EVAL = ("longbook_sum_eng", "longbook_qa_eng", "longbook_qa_chn")
SUBTASKS = tuple(NEW_TOK)


class InfBenchOfficial(Rules):
    """See ``hipexp.suites.published.Rules``."""

    suite, schema = "infbench", SCHEMA
    scorer = scoring.SCORER

    def __init__(self, protocol: str, edition: str | None = None, folder: Path | None = None):
        super().__init__(folder)
        self.protocol, self.edition = protocol, edition or edition_of(protocol)
        self.note, self.role = NOTES[protocol], "system" if protocol == "minference" else "user"
        self.system = SYSTEM if protocol == "chat" else None

    @cached_property
    def prompts(self) -> dict[str, str]:
        """The prompt of each task."""
        if self.protocol == "infllm":
            return read_mapping(find(self.suite, "infllm/dataset2prompt.json", self.folder).path, str)
        name = TEMPLATES[self.protocol]
        path = find(self.suite, "prompt.py", self.folder).path
        prompts = read_literals(path, name)[name]
        if not isinstance(prompts, dict):
            raise ConfigError(f"{path}: {name} must be prompts by task; fetch it again")
        return prompts

    @cached_property
    def limits(self) -> dict[str, int]:
        """The limit of new tokens of each task."""
        if self.protocol == "infllm":
            return read_mapping(find(self.suite, "infllm/dataset2maxlen.json", self.folder).path, int)
        return {"completion": NEW_TOK, "minference": MINFERENCE_NEW_TOK, "chat": dict.fromkeys(NEW_TOK, CHAT_NEW_TOK)}[self.protocol]

    def prompt(self, subtask: str, row: Row) -> Prompt:
        return Prompt(filled(self.template(subtask), fields_of(subtask, row), subtask))

    def cut(self) -> Cut:
        return Cut(odd_to_end=self.protocol in ("chat", "infllm"), framed=self.protocol == "minference")

    def chat(self, subtask: str) -> bool:
        return self.protocol != "completion"

    def check(self, subtask: str, row: Row) -> None:
        references = self.references(subtask, row)
        if all(isinstance(reference, str) and not reference.strip() for reference in references):
            raise ConfigError("all its answers are empty")
        scoring.check_row({"subtask": subtask, "references": references, **self.meta(subtask, row)})
        fields_of(subtask, row)

    def packages(self, subtask: str) -> tuple[str, ...]:
        return lm_eval.PACKAGES if subtask in USE_LM_EVAL else ()

    def template(self, subtask: str) -> str:
        return str(of_task(self.prompts, subtask, "prompt"))

    def new_tok(self, subtask: str) -> int:
        return int(of_task(self.limits, subtask, "limit of new tokens"))

    def references(self, subtask: str, row: Row) -> list[Any]:
        return row["answer"] if isinstance(row["answer"], list) else [row["answer"]]

    def meta(self, subtask: str, row: Row) -> dict[str, Any]:
        return {"options": row["options"]} if subtask in scoring.LETTERS else {}

    def words(self, row: Row) -> int:
        return len(row["context"]) // 4

    def metric(self, subtask: str) -> str:
        return scoring.METRICS[subtask]

    def score(self, subtask: str, prediction: str, references: list[Any], meta: dict[str, Any]) -> float:
        return scoring.score_infbench(subtask, prediction, references, self.edition, meta.get("options"))


def fields_of(subtask: str, row: Row) -> dict[str, Any]:
    """What prompts may ask for, made of a row as the official script does. Raises ``ConfigError`` for a row that lacks it."""
    fields = {"context": row["context"], "input": row["input"], "question": row["input"]}
    fields |= {f"OPTION_{letter}": option for letter, option in zip("ABCD", row["options"], strict=False)}
    if subtask == "code_run":
        call = found(r"func_[0-9]+\(-?[0-9]+\)", row, subtask, "a call")
        fields |= {"func": call.partition("(")[0], "func_call": call}
    if subtask == "kv_retrieval":
        fields["key"] = found(r'"[^"]+"', row, subtask, "a key in quotes")
    if subtask == "math_find":
        what = found(r"The .+ of", row, subtask, "what to find").lower().removesuffix(" of")
        fields["prefix"] = f"What is {what} in the following list?"
    return fields


def found(pattern: str, row: Row, subtask: str, what: str) -> str:
    """The part of a row's ``input`` that a prompt is made of."""
    match = re.search(pattern, row["input"])
    if match is None:
        raise ConfigError(f"a row of {subtask} has no {what} in its input {row['input'][:80]!r}; fetch the rows again")
    return match[0]


def edition_of(protocol: str) -> str:
    """The edition of the scorer that goes with a protocol."""
    return scoring.MINFERENCE if protocol == "minference" else scoring.OLD


def subtasks_of(protocol: str) -> tuple[str, ...]:
    """The tasks that a protocol has prompts for; the ten that MInference runs."""
    if protocol == "minference":
        return scoring.LISTS["minference_10"]
    return tuple(name for name in SUBTASKS if name != "math_calc" or protocol != "chat")


def check_subtask(name: str, protocol: str) -> None:
    """Raise ``ConfigError`` for a task that is not one of the twelve, or that a protocol has no prompt for."""
    if name not in SUBTASKS:
        raise ConfigError(f"task.subtasks: {name!r} is no task of ∞Bench; use {', '.join(SUBTASKS)}")
    if name == "math_calc" and protocol == "chat":
        raise ConfigError("task.subtasks: math_calc has no prompt under protocol chat (officially a dialogue of its own); use completion")
