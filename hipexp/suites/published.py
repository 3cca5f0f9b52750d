"""Rows that somebody published, under the prompts of a protocol: what ∞Bench, LongBench and LongBench v2 have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.data import read_rows
from hipexp.suites.data.resolve import find_rows
from hipexp.suites.data.rows import Schema
from hipexp.suites.framing import Cut, frame, has_template, in_template
from hipexp.suites.sample import Item, ProtocolCard, Sample, digest

Row = Mapping[str, Any]
TOK_PER_WORD = 1.4  # of English text; for progress only
SHOWN = 5  # bad rows that a message lists
ONE_LINE = "samsum"  # of LongBench: its answer ends with its first line, which may not be empty, by the official script


@dataclass(frozen=True)
class Prompt:
    """The text of a prompt; ``one_line``: see ``Sample``."""

    text: str
    one_line: bool = False


class Rules(ABC):
    """One suite under one protocol. ``folder``: data of the user's own. ``schema``: what a row must hold.

    ``scorer``, ``edition``, ``note``: see ``ProtocolCard``. ``role``: whose turn a prompt is in a chat template; ``system``: the
    message before it.
    """

    suite: str
    protocol: str
    edition: str
    scorer: str
    note: str
    schema: Schema
    role: str = "user"
    system: str | None = None

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    @abstractmethod
    def cut(self) -> Cut:
        """How long prompts are cut."""

    @abstractmethod
    def check(self, subtask: str, row: Row) -> None:
        """Raise ``ConfigError`` for a row that cannot be scored."""

    @abstractmethod
    def packages(self, subtask: str) -> tuple[str, ...]:
        """What has to be installed to score a subtask, by its name on the package index."""

    @abstractmethod
    def chat(self, subtask: str) -> bool:
        """Whether prompts are turns of a chat template."""

    def rows(self, subtask: str) -> Sequence[Row]:
        """The rows of a subtask, in their published order. Raises ``DataMissing``, and ``ConfigError`` for rows that are damaged."""
        found = find_rows(self.suite, subtask, self.folder)
        return read_rows(found.path, self.schema, found.member)

    def origin(self, subtask: str) -> str:
        """What the rows are: repository, revision, digest."""
        return find_rows(self.suite, subtask, self.folder).origin

    @abstractmethod
    def prompt(self, subtask: str, row: Row) -> Prompt:
        """The prompt of a row."""

    @abstractmethod
    def template(self, subtask: str) -> str:
        """What prompts are made of, for its digest."""

    @abstractmethod
    def new_tok(self, subtask: str) -> int:
        """The limit of new tokens."""

    @abstractmethod
    def references(self, subtask: str, row: Row) -> list[Any]:
        """What is right."""

    @abstractmethod
    def meta(self, subtask: str, row: Row) -> dict[str, Any]:
        """What the scorer needs of a row besides."""

    @abstractmethod
    def words(self, row: Row) -> int:
        """About how many words a prompt has."""

    @abstractmethod
    def metric(self, subtask: str) -> str:
        """The name of the metric."""

    @abstractmethod
    def score(self, subtask: str, prediction: str, references: list[Any], meta: dict[str, Any]) -> float:
        """The score of one output, 0 to 100."""


class Published:
    """The first ``samples`` rows (all, if there are no more) of each subtask; see ``hipexp.suites.sample.Suite``.

    ``limit_tok``: longest prompt before the chat template, the middle of a longer one is cut out; None cuts nothing. Where the cut is of
    the whole (``Cut.framed``) it holds the template and the new tokens.
    Raises ``ConfigError`` for a limit that leaves no prompt, and for a chat template that takes no such turns.
    """

    def __init__(self, rules: Rules, subtasks: tuple[str, ...], samples: int, tokenizer: Any, limit_tok: int | None):
        self.rules, self.subtasks, self.samples, self.tokenizer, self.limit_tok = rules, subtasks, samples, tokenizer, limit_tok
        for name in subtasks:
            if rules.chat(name) and has_template(tokenizer):
                in_template("", tokenizer, rules.role, rules.system)
            if (left_tok := self._prompt_tok(name)) is not None and left_tok < 2:
                new_tok = rules.new_tok(name)
                raise ConfigError(
                    f"task.truncate_tok={limit_tok} leaves no prompt of {name} beside its {new_tok} new tokens; use {new_tok + 2} or more"
                )

    def _prompt_tok(self, subtask: str) -> int | None:
        """The longest prompt."""
        return None if self.limit_tok is None else self.limit_tok - (self.rules.new_tok(subtask) if self.rules.cut().framed else 0)

    @cached_property
    def _rows(self) -> dict[str, Sequence[Row]]:
        return {name: self._checked(name, self.rules.rows(name)[: self.samples]) for name in self.subtasks}

    def _checked(self, subtask: str, rows: Sequence[Row]) -> Sequence[Row]:
        problems = []
        for number, row in enumerate(rows, start=1):
            try:
                self.rules.check(subtask, row)
            except ConfigError as error:
                problems.append(f"row {number}: {error}")
        if problems:
            shown = "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
            where = f"{self.rules.origin(subtask)}, {subtask}"
            raise ConfigError(f"{where} has rows that cannot be scored ({len(problems)}): {shown}; fetch it again")
        return rows

    def items(self) -> list[Item]:
        return [Item(name, i, self._cost(name, row)) for name, rows in self._rows.items() for i, row in enumerate(rows)]

    def _cost(self, subtask: str, row: Row) -> int:
        told, most = int(TOK_PER_WORD * self.rules.words(row)), self._prompt_tok(subtask)
        return (told if most is None else min(told, most)) + self.rules.new_tok(subtask)

    def sample(self, item: Item) -> Sample:
        rules, row = self.rules, self._rows[item.subtask][item.index]
        made = rules.prompt(item.subtask, row)
        framed = frame(
            made.text, self.tokenizer, limit_tok=self._prompt_tok(item.subtask), cut=rules.cut(), chat=rules.chat(item.subtask),
            system=rules.system, role=rules.role,
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
        chatting = [name for name in each if rules.chat(name)]
        template = digest(str(self.tokenizer.chat_template)) if has_template(self.tokenizer) and chatting else None
        where = "with the chat template" if rules.cut().framed else "before the chat template"
        rule = f"{rules.cut()}, {self.limit_tok} tokens, {where}" if self.limit_tok else "none: whole prompts"
        notes = [rules.note] if rules.note else []
        if chatting and template is None:
            notes.append("this tokenizer has no chat template: prompts are plain text")
        if self.limit_tok is None:
            notes.append("prompts are whole, where the official scripts cut them to a model's limit (task.truncate_tok)")
        return ProtocolCard(
            suite=rules.suite,
            protocol=rules.protocol,
            edition=rules.edition,
            template={name: digest(rules.template(name)) for name in each},
            wording="official",
            metric={name: rules.metric(name) for name in each},
            scorer=rules.scorer,
            length_tok={name: most + rules.new_tok(name) for name in each if (most := self._prompt_tok(name)) is not None},
            samples={name: len(self._rows[name]) for name in each},
            new_tok={name: rules.new_tok(name) for name in each},
            data="; ".join(dict.fromkeys(rules.origin(name) for name in each)),
            truncation={"rule": rule, "removed_tok": {}},
            chat_template=template and f"{template} ({', '.join(chatting)})",
            stops=["end of text", *(f"end of the first line ({name})" for name in each if name.removesuffix("_e") == ONE_LINE)],
            note="; ".join(notes),
        )
