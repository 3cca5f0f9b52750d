"""Training prompts in pieces, and the token sequences they become."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

BOS_ID, EOS_ID = 1, 2
NUMBER_AFTER_TOK, PAIR_AFTER_TOK = 96, 48  # tokens behind a hidden number and behind a pair that should still point to it


@dataclass
class Segment:
    """A piece of training text; ``answer``: the weight with which it is learned, ``ends`` puts an end-of-text token behind it.

    ``states`` names the needle that the piece states, ``asks`` those that an answer may be about; ``unknown``: how many of the first tokens
    that state it come before what identifies it; ``after``: how many tokens behind it may tell of it. ``tells``: the first token tells
    needles apart; ``others``: what it could be as well.
    """

    text: str
    answer: float = 0.0
    ends: bool = False
    states: int | None = None
    asks: tuple[int, ...] = ()
    unknown: int = 0
    after: int = 0
    tells: bool = False
    others: tuple[str, ...] = ()


class Link(NamedTuple):
    """Where a prompt asks for a needle and where it states it, in token positions (ends exclusive).

    ``after``: how many tokens behind the needle may tell of it.
    """

    asking_from: int
    asking_to: int
    needle_from: int
    needle_to: int
    after: int


class Prompt(NamedTuple):
    """A training sequence: token ids, the loss weight of each (0 outside of answers), the links from questions to needles, and which
    tokens are as right as the one at a position."""

    ids: list[int]
    weight: list[float]
    links: list[Link]
    others: dict[int, list[int]]

    def cut(self, length: int) -> Prompt:
        """The first ``length`` tokens."""
        links = [link for link in self.links if link.asking_to < length]
        return Prompt(self.ids[:length], self.weight[:length], links, {at: also for at, also in self.others.items() if at < length})


class Reader:
    """Turns segments into token sequences. ``encode(text)`` returns ``ids`` without special tokens, and their ``offsets``.

    ``first_weight``: loss weight of tokens that tell needles apart.
    """

    def __init__(self, encode, first_weight: float):
        self.encode, self.first_weight = encode, first_weight

    def pieces(self, segments: list[Segment]) -> Iterator[tuple[Segment, list[int]]]:
        """Each segment with its token ids, read together with its neighbours up to an end of text, as an evaluated prompt is.

        A token belongs to the segment in which it ends.
        """
        last = 0
        while last < len(segments):
            first, last = last, next((i + 1 for i in range(last, len(segments)) if segments[i].ends), len(segments))
            text = self.encode("".join(segment.text for segment in segments[first:last]))
            token_ends = [end for _, end in text.offsets]
            done = end = 0
            for segment in segments[first:last]:
                end += len(segment.text)
                before, done = done, bisect_right(token_ends, end)
                yield segment, text.ids[before:done] + ([EOS_ID] if segment.ends else [])

    def read(self, segments: list[Segment]) -> Prompt:
        """The training sequence of a prompt, whatever its length."""
        prompt = Prompt([BOS_ID], [0.0], [], {})
        stated: dict[int, tuple[int, int]] = {}
        for segment, piece in self.pieces(segments):
            start = len(prompt.ids)
            prompt.ids.extend(piece)
            prompt.weight.extend([segment.answer] * len(piece))
            if piece and segment.tells:
                prompt.weight[start] = self.first_weight
                if len(others := set(segment.others)) > 1:
                    prompt.others[start] = self._first_tokens(others)
            if segment.states is not None:
                stated[segment.states] = (start + segment.unknown, len(prompt.ids))
            if segment.answer:
                prompt.links.extend(Link(start - 1, len(prompt.ids) - 1, *stated[i], segment.after) for i in segment.asks)
        return prompt

    def _first_tokens(self, texts: Iterable[str]) -> list[int]:
        return sorted({self.encode(text).ids[0] for text in texts})
