"""Training prompts with chains of assignments, in which a name gets its value from another name (RULER's variable tracking asks for that).

The answer goes from the last name back to the first: what a name gets stands behind it and a sign of equality, so that each step looks up
one line.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from hipexp.needle.segments import Segment
from hipexp.needle.words import varied_noise_lines
from hipexp.suites.infbench import five_digits

KEYWORDS = ("VAR", "VAR", "LET", "SET", "REG", "DEF", "")
INTROS = (
    "Follow the names below: each one gets its value from a number or from another name.",
    "Names and values are hidden between these lines. Keep track of who gets what.",
    "Read the assignments.",
    "",
)
QUESTIONS = (
    "Which names have the value {v}?",
    "Task: list every variable that gets {v} in the end.",
    "Who holds {v} in the lines above?",
    "Find the chain of {v}.",
)
BEGUN = (
    "{n} variables have the value {v}, namely: ",
    "Answer: in these lines the value {v} goes to {n} variables: ",
    "The names with {v} are: ",
    "Going by the lines above, {v} is held by ",
)
DRILL_TOK = 256  # shorter prompts hold nothing but assignments, and many questions
AFTER_TOK = 24  # tokens behind an assignment that should still point to it


@dataclass
class ChainWords:
    """The words of chains of assignments: what stands before a name (``keyword``), and those around the text."""

    keyword: str
    intro: str
    asking: str
    begun: str

    def assignments(self, names: list[str], value: str, end: str) -> list[str]:
        """The lines of a chain: ``value`` to the first name, each name to the next."""
        lead = f"{self.keyword} " if self.keyword else ""
        return [f"{lead}{names[0]} = {value}\n", *(f"{lead}{name} = {lead}{source}{end}" for source, name in pairwise(names))]

    def question(self, rng: random.Random, names: list[str], value: str) -> str:
        """A question, or none, and what its answer begins with."""
        asked = self.asking.format(v=value) + rng.choice((" ", "\n")) if self.asking and rng.random() < 0.6 else ""
        return asked + self.begun.format(v=value, n=len(names))


def new_names(rng: random.Random, letters: int, count: int) -> list[str]:
    """Different names of capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def followed(names: list[str], last: int, first: int) -> list[Segment]:
    """The names from number ``last`` back to the first; the needle that gives the first name its value has number ``first``."""
    out: list[Segment] = []
    for i in reversed(range(last + 1)):
        asks = (first + i + 1,) if i < len(names) - 1 else ()  # the line that the name before stands in front of
        if asks:
            out.append(Segment("=", answer=1.0, asks=asks, after=AFTER_TOK))
        out.append(Segment(names[i], answer=1.0, asks=asks, after=AFTER_TOK, tells=True, ends=i == 0))
    return out


def spread(hay: list[Segment], needles: list[Segment], depths: list[float]) -> list[Segment]:
    """The needles at their depths (0 to 1) in the hay."""
    out: list[Segment] = []
    at = 0
    for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0]):
        spot = int(depth * (len(hay) + 1))
        out += [*hay[at:spot], needle]
        at = spot
    return out + hay[at:]


class Chains:
    """Draws prompts of chains; ``size`` counts the tokens of a text."""

    def __init__(self, rng: random.Random, size: Callable[[str], int]):
        self.rng, self.size = rng, size

    def draw(self, length: int) -> list[Segment]:
        """Chains of assignments in noise or nothing else: one, asked for by its value, in some prompts with a shorter one in front, solved;
        or several, asked for by their last names."""
        rng = self.rng
        keyword = rng.choice(KEYWORDS)
        if length < DRILL_TOK:
            bare = ChainWords(keyword if rng.random() < 0.5 else "", "", "", "{v}: ")
            letters = rng.choice((2, 3, 4, 5))
            return self.bare_chains(length, letters, bare) if rng.random() < 0.4 else self.tangle(length, letters, bare, [])
        words = ChainWords(keyword, rng.choice(INTROS), rng.choice(QUESTIONS), rng.choice(BEGUN))
        lines = varied_noise_lines(rng) if rng.random() < 0.8 else []
        kind = rng.random()
        if kind < 0.3:
            return self.tangle(length, rng.choice((5, 5, 5, 4, 6)), words, lines)
        if kind < 0.55:
            return self.chain(length - 1, rng.choice((5, 5, 5, 4, 6)), words, lines, 0)
        solved = self.chain(int(length * rng.uniform(0.1, 0.4)) - 1, rng.choice((3, 3, 4)), words, lines, 0, shown=rng.random() < 0.6)
        left = length - sum(self.size(segment.text) for segment in solved) - 2
        return solved + self.chain(left, rng.choice((5, 5, 5, 4, 6)), words, lines, len(solved))

    def tangle(self, length: int, letters: int, words: ChainWords, lines: list[str]) -> list[Segment]:
        """Several chains in one text, with noise or without; each question gives the last name of one."""
        rng, size = self.rng, self.size
        share = rng.uniform(0.2, 0.8) if lines else 1.0
        used = size(words.intro) + 3
        needles: list[Segment] = []
        depths: list[float] = []
        asked: list[list[Segment]] = []
        taken: set[str] = set()
        while True:
            hops = rng.randint(1, 4 if length < DRILL_TOK else 6)
            names, value = new_names(rng, letters, hops + 1), five_digits(rng)
            if not taken.isdisjoint(names):
                continue
            texts = words.assignments(names, value, rng.choice((" ", "")) + "\n")
            question = words.question(rng, names, value) + names[-1]
            more = sum(map(size, texts)) + size(question) + size("=".join(names)) + 1
            if asked and used + more > share * length:
                break
            used += more
            asked.append([Segment(question), *followed(names, hops - 1, len(needles))])
            needles += self.needles(texts, len(needles))
            depths += sorted(rng.random() for _ in texts)
            taken.update(names)
        rng.shuffle(asked)
        hay = self.lines_of(lines, length - used)
        return [Segment(words.intro + "\n"), *spread(hay, needles, depths), *(segment for each in asked for segment in each)]

    def bare_chains(self, length: int, letters: int, words: ChainWords) -> list[Segment]:
        """Texts that hold nothing but a chain, as many as fit: the plainest form."""
        out: list[Segment] = []
        used = 0
        while True:
            more = self.chain(0, letters, words, [], len(out))
            used += sum(self.size(segment.text) for segment in more) + 1
            if out and used > length:
                return out
            out += more

    def chain(self, length: int, letters: int, words: ChainWords, lines: list[str], first: int, shown: bool = False) -> list[Segment]:
        """A text of about ``length`` tokens with one chain, and the question for it; needles are numbered from ``first``.

        ``shown``: its answer is part of the text, not to be learned, and goes from the first name to the last.
        """
        rng, size = self.rng, self.size
        hops = 4 if lines and rng.random() < 0.6 else rng.randint(1, 6)
        names, value = new_names(rng, letters, hops + 1), five_digits(rng)
        texts = words.assignments(names, value, rng.choice((" ", "")) + "\n")
        question = words.question(rng, names, value)
        used = size(words.intro) + 2 + sum(map(size, texts)) + size(question) + size("=".join(names)) + 3
        hay = self.lines_of(lines, length - used)
        text = spread(hay, self.needles(texts, first), sorted(rng.random() for _ in texts))
        answer = [Segment(f"{question}{' '.join(names)}\n")] if shown else [Segment(question), *followed(names, hops, first)]
        return [Segment(words.intro + "\n"), *text, *answer]

    def needles(self, texts: list[str], first: int) -> list[Segment]:
        """The lines of a chain, numbered from ``first``."""
        return [Segment(text, states=i, unknown=self.size(text.split("=")[0]) // 2) for i, text in enumerate(texts, first)]

    def lines_of(self, lines: list[str], room: int) -> list[Segment]:
        """As many of the noise lines, again and again, as fit; none if there are none."""
        hay: list[Segment] = []
        while lines:
            line = lines[len(hay) % len(lines)] + "\n"
            room -= self.size(line)
            if room < 0:
                break
            hay.append(Segment(line))
        return hay
