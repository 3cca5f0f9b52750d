"""What a suite hands to a run: samples, the protocol they follow, and the error for data that is not there."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

Encode = Callable[[str], list[int]]
"""Text to token ids, special tokens of a prompt included."""


class DataMissing(Exception):
    """Data that a task needs is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what a right answer to it is.

    ``tokens`` are the ids of ``prompt``, special tokens included; ``length_tok`` is the context length the sample was made for,
    so that ``len(tokens) + max_new_tok <= length_tok``. ``removed_tok`` counts tokens lost to truncation.
    ``one_line``: the answer also ends with its first line, which is not empty. ``meta`` is recorded with the result, such as the ``depth``
    (0 to 1) at which the answer stands.
    """

    subtask: str
    index: int
    prompt: str
    tokens: list[int]
    references: list[str]
    max_new_tok: int
    length_tok: int
    removed_tok: int = 0
    one_line: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """The name of a sample that has not been made yet; ``length_tok`` is what it will cost at most."""

    subtask: str
    index: int
    length_tok: int


@dataclass(frozen=True)
class ProtocolCard:
    """How the numbers of a run were made: two scores may be compared only where their cards agree.

    ``protocol`` and ``edition`` name the prompts and the scorer, ``template`` maps a subtask to the hash of its words,
    ``new_tok`` to its limit of new tokens; ``truncation`` holds the rule and the tokens it removed per subtask.
    """

    suite: str
    protocol: str
    edition: str
    template: dict[str, str]
    wording: str
    metric: dict[str, str]
    scorer: str
    length_tok: dict[str, int]
    samples: dict[str, int]
    new_tok: dict[str, int]
    data: str
    truncation: dict[str, Any] = field(default_factory=lambda: {"rule": "none: generated to fit", "removed_tok": {}})
    stops: list[str] = field(default_factory=lambda: ["end of text"])
    decoding: str = "greedy"
    chat_template: str | None = None
    note: str = ""
    model: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The card as plain data, ready for JSON."""
        return asdict(self)


class Suite(Protocol):
    """A benchmark, opened for one model and one length."""

    def items(self) -> list[Item]:
        """Every sample of the run, in the order in which it is to be done."""

    def sample(self, item: Item) -> Sample:
        """Make one sample; the same item gives the same sample, always."""

    def score(self, sample: Sample, prediction: str) -> float:
        """Judge one output: 0 to 100."""

    def card(self) -> ProtocolCard:
        """The protocol of this suite as it was opened."""


def digest(text: str) -> str:
    """A short hash of words, as cards name them."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class LineEncoder:
    """Tokenise text that repeats its lines: each distinct line once, joined where the tokenizer allows it.

    Two neighbouring lines may be joined if the tokenizer gives the same ids for both together as for each alone, which is
    checked for every pair of neighbours that occurs; otherwise the whole text is tokenised at once.
    ``tokenizer`` is called as in transformers: ``tokenizer(text, add_special_tokens=...).input_ids``.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._lines: dict[str, list[int]] = {}
        self._joinable: dict[tuple[str, str], bool] = {}
        bare, whole = self._plain("a"), list(tokenizer("a").input_ids)
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        self._head, self._tail = whole[:start], whole[start + len(bare) :]

    def __call__(self, text: str) -> list[int]:
        lines = text.splitlines(keepends=True)
        if not all(self._can_join(a, b) for a, b in set(itertools.pairwise(lines))):
            return list(self._tokenizer(text).input_ids)
        ids = list(self._head)
        for line in lines:
            ids += self._line(line)
        return ids + self._tail

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _line(self, line: str) -> list[int]:
        if line not in self._lines:
            self._lines[line] = self._plain(line)
        return self._lines[line]

    def _can_join(self, a: str, b: str) -> bool:
        if (a, b) not in self._joinable:
            self._joinable[a, b] = self._plain(a + b) == self._line(a) + self._line(b)
        return self._joinable[a, b]


def largest_fit(count: Callable[[int], int], room_tok: int, first_guess: int) -> int:
    """The largest ``n >= 0`` with ``count(n) <= room_tok``, for a ``count`` that does not fall; -1 if there is none.

    ``first_guess`` near the answer keeps the number of calls small: the search doubles away from it, then halves.
    """
    low, step = max(0, first_guess), 1
    while low >= 0 and count(low) > room_tok:
        low, step = low - step, 2 * step
    if low < 0:
        if count(0) > room_tok:
            return -1
        low = 0
    high, step = low + 1, 1
    while count(high) <= room_tok:
        low, high, step = high, high + step, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= room_tok else (low, middle)
    return low
