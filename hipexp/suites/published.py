"""Rows that somebody published, under the prompts of a protocol: what ∞Bench, LongBench and LongBench v2 have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from hipexp.suites.framing import CUTS, frame, has_template
from hipexp.suites.sample import Item, ProtocolCard, Sample

Row = Mapping[str, Any]
TOK_PER_WORD = 1.4  # of English text; for progress only


@dataclass(frozen=True)
class Prompt:
    """The text of a prompt. ``chat``: it is a user turn, after ``system``; ``one_line``: see ``Sample``."""

    text: str
    chat: bool
    system: str | None = None
    one_line: bool = False


class Rules(Protocol):
    """One suite under one protocol.

    ``cut``: how long prompts are cut (``hipexp.suites.framing.CUTS``); ``scorer``, ``edition``, ``note``: see ``ProtocolCard``.
    """

    suite: str
    protocol: str
    edition: str
    scorer: str
    cut: str
    note: str

    def rows(self, subtask: str) -> Sequence[Row]:
        """The rows of a subtask, in their published order. Raises ``DataMissing``, and ``ConfigError`` for rows that are damaged."""

    def origin(self, subtask: str) -> str:
        """What the rows are: repository, revision, digest."""

    def prompt(self, subtask: str, row: Row) -> Prompt:
        """The prompt of a row."""

    def template(self, subtask: str) -> str:
        """What prompts are made of, for its digest."""

    def new_tok(self, subtask: str) -> int:
        """The limit of new tokens."""

    def references(self, subtask: str, row: Row) -> list[Any]:
        """What is right."""

    def meta(self, subtask: str, row: Row) -> dict[str, Any]:
        """What the scorer needs of a row besides."""

    def words(self, row: Row) -> int:
        """About how many words a prompt has."""

    def metric(self, subtask: str) -> str:
        """The name of the metric."""

    def score(self, subtask: str, prediction: str, references: list[Any], meta: dict[str, Any]) -> float:
        """The score of one output, 0 to 100."""


class Published:
    """The first ``samples`` rows (all, if there are no more) of each subtask; see ``hipexp.suites.sample.Suite``.

    ``limit_tok``: longest prompt before the chat template, the middle of a longer one is cut out; None cuts nothing.
    """

    def __init__(self, rules: Rules, subtasks: tuple[str, ...], samples: int, tokenizer: Any, limit_tok: int | None):
        self.rules, self.subtasks, self.samples, self.tokenizer, self.limit_tok = rules, subtasks, samples, tokenizer, limit_tok

    @cached_property
    def _rows(self) -> dict[str, Sequence[Row]]:
        return {name: self.rules.rows(name)[: self.samples] for name in self.subtasks}

    def items(self) -> list[Item]:
        return [Item(name, i, self._cost(name, row)) for name, rows in self._rows.items() for i, row in enumerate(rows)]

    def _cost(self, subtask: str, row: Row) -> int:
        told = int(TOK_PER_WORD * self.rules.words(row))
        return (told if self.limit_tok is None else min(told, self.limit_tok)) + self.rules.new_tok(subtask)

    def sample(self, item: Item) -> Sample:
        rules, row = self.rules, self._rows[item.subtask][item.index]
        made = rules.prompt(item.subtask, row)
        framed = frame(
            made.text, self.tokenizer, limit_tok=self.limit_tok, rule=rules.cut, chat=made.chat, system=made.system
        )  # fmt: skip
        new_tok = rules.new_tok(item.subtask)
        return Sample(
            item.subtask, item.index, framed.prompt, framed.tokens, rules.references(item.subtask, row), new_tok,
            len(framed.tokens) + new_tok, framed.removed_tok, made.one_line, rules.meta(item.subtask, row),
        )  # fmt: skip

    def score(self, sample: Sample, prediction: str) -> float:
        return self.rules.score(sample.subtask, prediction, sample.references, sample.meta)

    def card(self) -> ProtocolCard:
        rules, each = self.rules, self.subtasks
        longest = {name: max(item.length_tok for item in self.items() if item.subtask == name) for name in each}
        rule = CUTS["none"] if self.limit_tok is None else f"{CUTS[rules.cut]}, {self.limit_tok} tokens, before the chat template"
        return ProtocolCard(
            suite=rules.suite,
            protocol=rules.protocol,
            edition=rules.edition,
            template={name: digest(rules.template(name)) for name in each},
            wording="official",
            metric={name: rules.metric(name) for name in each},
            scorer=rules.scorer,
            length_tok=longest,
            samples={name: len(self._rows[name]) for name in each},
            new_tok={name: rules.new_tok(name) for name in each},
            data="; ".join(dict.fromkeys(rules.origin(name) for name in each)),
            truncation={"rule": rule, "removed_tok": {}},
            chat_template=digest(str(self.tokenizer.chat_template)) if has_template(self.tokenizer) else None,
            note=rules.note,
        )


def digest(text: str) -> str:
    """A short hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
