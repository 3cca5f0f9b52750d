"""LongBench v2 (arXiv 2412.15204): 503 published questions with four choices, the official prompt without reasoning, official scores."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from hipexp.suites.data import read_text
from hipexp.suites.data.resolve import find
from hipexp.suites.data.rows import Schema
from hipexp.suites.framing import Cut
from hipexp.suites.published import Prompt, Row, Rules
from hipexp.suites.scoring import longbench2 as scoring

PLACES = {"$DOC$": "context", "$Q$": "question", **{f"$C_{letter}$": f"choice_{letter}" for letter in "ABCD"}}  # of the prompt, in order
SCHEMA: Schema = dict.fromkeys((*PLACES.values(), "answer", "difficulty", "length"), str)
NEW_TOK = 128


class LongBench2(Rules):
    """See ``hipexp.suites.published.Rules``."""

    suite, protocol, schema = "longbench2", "official", SCHEMA
    edition, scorer = scoring.EDITIONS[0], scoring.SCORER
    note = "greedy, where the official script samples at temperature 0.1"

    @cached_property
    def text(self) -> str:
        """The official prompt."""
        return read_text(find(self.suite, "0shot.txt", self.folder).path)

    def cut(self) -> Cut:
        return Cut(odd_to_end=True, together=True)

    def chat(self, subtask: str) -> bool:
        return True

    def check(self, subtask: str, row: Row) -> None:
        scoring.check_row({"subtask": subtask, "references": [row["answer"]], **self.meta(subtask, row)})

    def packages(self, subtask: str) -> tuple[str, ...]:
        return ()

    def prompt(self, subtask: str, row: Row) -> Prompt:
        text = self.text
        for place, field in PLACES.items():
            text = text.replace(place, row[field].strip())
        return Prompt(text)

    def template(self, subtask: str) -> str:
        return self.text

    def new_tok(self, subtask: str) -> int:
        return NEW_TOK

    def references(self, subtask: str, row: Row) -> list[Any]:
        return [row["answer"]]

    def meta(self, subtask: str, row: Row) -> dict[str, Any]:
        return {"difficulty": row["difficulty"], "length": row["length"]}

    def words(self, row: Row) -> int:
        return len(row["context"]) // 5

    def metric(self, subtask: str) -> str:
        return scoring.metric_of("overall")

    def score(self, subtask: str, prediction: str, references: list[Any], meta: dict[str, Any]) -> float:
        return scoring.score_longbench2(prediction, references)
