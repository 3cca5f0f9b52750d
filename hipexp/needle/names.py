"""Training prompts with values that have names, several of them at once: what RULER (arXiv 2404.06654) asks for, in other words.

None of RULER's sentences is here: statements, questions and prose are put together from lists at random, so its prompts are new to the
model. An answer says a name again and what stands behind it in the statement, then the value: so it is looked up by the very tokens that
stand in front of it, as the value of a pair is.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hipexp.needle.segments import NUMBER_AFTER_TOK, PAIR_AFTER_TOK, Segment
from hipexp.needle.words import prose_sentence, some_words, syllable, varied_noise_lines, word
from hipexp.suites.infbench import random_uuid

QUALITIES = "secret hidden lucky strange golden private rare final odd".split()
KINDS = "number code token figure value password label mark id serial".split()
# {k}: a name, {v}: a value, {a}: what values are, {s}: several of them, {f}: a filler, {w}: some words, {be}: is or are.
STATEMENTS = (
    "One {a} of {k} is {v}.",
    "The {a} for {k} is: {v}.",
    "Among the {s} for {k} is: {v}.",
    "In this list the {a} for {k}: {v}.",
    "The text gives {k} as {a}: {v}.",
    "So {k} has the {a} {v}.",
    "A {a} that goes with {k}: {v}.",
    "Another of the {s} for {k} is: {v}.",
    "One {a} of those for {k} is: {v}.",
    "Of all {s} this one is for {k}: {v}.",
    "Known {s} of {k}: {v}.",
    "Note the {a} for {k}: {v}.",
)
PLAIN = ("{k}: {v}.", "{k} = {v}.", "{k} is {v}.", "For {k}: {v}.", "The {a} of {k} is {v}.", "{a} {k}, {v}.", "{k} has {v}.")
CARDS = ("{k}: {v}", "{k} = {v}", "{k} is {v}", "{k}, {v}", "{k} is: {v}", "for {k}: {v}")
ASKED_CARDS = ("for {k} is: {v}", "- {k}: {v}", "of {k} is {v}", "* {k} = {v}", "for {k}: {v}", "to {k} goes {v}")  # a space before {k}
CARD_ENDS = (".\n", ". ", "; ", "\n")
ASKINGS = (
    "Which {a} does the text name for {k}?",
    "Of {k}, what {a} did you find{f}?",
    "Tell me the {a} for {k}{f}.",
    "Give the {a} of {k}{f}.",
    "Look up {k}{f} and give the {a}.",
    "{w} the {a} for {k}{f}?",
    "{w} {a} of {k}{f}.",
)
BEGUN = (
    "The {a} for {k}{f} {be}",
    "The {a} of {k}{f} {be}",
    "In this text the {a} of {k}{f} {be}",
    "Answer: going by the text, the {a} for {k}{f} {be}",
    "Asked for {k}{f}:",
    "{w} {a} for {k}{f} {be}",
    "{w} {a} of {k}{f} {be}",
)
BEGUN_WITHOUT = ("Answer:", "It says there:", "I found this:", "The {a} {be}")  # behind a question that has the name
FILLERS = (
    " named in the text",
    " that the long text tells",
    " as given above",
    " from the story above",
    " you have read about",
    " which is to be found in the lines above",
    " hidden somewhere between the other sentences",
    " that one of the sentences told you",
)
INTROS = (
    "Below, {s} are hidden in a text. Remember them.",
    "Read this and keep every {a} in mind. Questions follow at the end.",
    "Somewhere below stands a {a}. I am going to ask for it.",
    "The {s} in the text are what matters.",
    "",
)
DRILL_TOK = 256  # shorter prompts are cards: the plainest form, and many questions
STOP_WEIGHT = 0.3  # of the end of an answer that says several things: better one too many than one too few


class Several(NamedTuple):
    """The chance that a question is about several names, and that it is about several values if it is about one name.

    ``drilled``: more of the prompt is questions, and fewer of the values are UUIDs.
    """

    names: float
    values: float
    drilled: bool


NAMED, VALUES, QUERIES = Several(0.25, 0.25, drilled=False), Several(0.1, 0.85, drilled=True), Several(0.75, 0.3, drilled=True)


class Names:
    """Draws what values are named by: mostly two words joined by a hyphen.

    In some prompts most names share words with others, or all words begin alike, so that only all of a name tells it apart.
    """

    def __init__(self, rng: random.Random, new_word: Callable[[random.Random], str] = word):
        self.rng, self.new_word, self.known = rng, new_word, list[str]()
        self.shared = rng.choice((0.0, 0.25, 0.6))
        self.initials = rng.choice((string.ascii_lowercase,) * 3 + ("".join(rng.choices("abcdefghijklmnopqrstuvwyz", k=2)),))

    def word(self) -> str:
        """A new word, or one of an earlier name."""
        if self.known and self.rng.random() < self.shared:
            return self.rng.choice(self.known)
        for _ in range(20):  # some initials are rare: then any word will do
            new = self.new_word(self.rng)
            if new[0] in self.initials:
                break
        self.known.append(new)
        return new

    def draw(self) -> str:
        """A name."""
        return "-".join(self.word() for _ in range(3 if self.rng.random() < 0.1 else 2))


def listed(parts: list[str]) -> str:
    """An enumeration."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f", and {parts[-1]}"


def filler(rng: random.Random) -> str:
    """Words between a name and what is asked of it."""
    return rng.choice(FILLERS) if rng.random() < 0.5 else f" {some_words(rng)}"


def joint(statement: str) -> str:
    """What stands between name and value."""
    return statement[statement.index("{k}") + 3 : statement.index("{v}")]


@dataclass
class Group:
    """Names and values asked for together, and the numbers of their needles. The values of one name may come in any order.

    ``joint``: what stands between a name and its value. ``said``: the question ends with that, so that the first value follows at once.
    """

    question: str
    values: list[tuple[str, str]]
    needles: list[int]
    joint: str
    said: bool

    def shuffle(self, rng: random.Random) -> None:
        """Another order of the answer."""
        order = list(range(len(self.values)))
        rng.shuffle(order)
        self.values, self.needles = [self.values[i] for i in order], [self.needles[i] for i in order]

    def answered(self, after_tok: int) -> Iterator[Segment]:
        """The question and its answer; ``after_tok``: tokens behind a needle that should still point to it."""
        yield Segment(self.question)
        for at, ((name, value), i) in enumerate(zip(self.values, self.needles, strict=True)):
            same = [k for k in range(at, len(self.values)) if self.values[k][0] == name]
            left, others = tuple(self.needles[k] for k in same), tuple(self.values[k][1][:2] for k in same if value.isdigit())
            if at:
                yield Segment(",", answer=1.0, tells=True)
            if at or not self.said:
                yield Segment(f" {name}", answer=1.0, tells=True)
            begun = self.joint if at or not self.said else " "
            yield Segment(begun, answer=1.0, asks=left, after=after_tok)
            yield Segment(value[:2], answer=1.0, asks=left, after=after_tok, tells=True, others=others)  # one token of digits
            if value[2:]:
                yield Segment(value[2:], answer=1.0, asks=(i,), after=after_tok)
        yield Segment(".", answer=1.0 if len(self.values) == 1 else STOP_WEIGHT, ends=True)


@dataclass
class Style:
    """How a prompt of named values puts things: what values are (``thing``), what they are ``hidden_in`` (lines, prose or a list), how each
    is stated, asked for and answered; ``plain``: the question says all of the statement up to the value. ``digits``: of a value, 0 for a
    UUID; ``cut``: characters of a UUID."""

    hidden_in: str
    thing: str
    digits: int
    names: Names
    uuid_names: bool
    cut: int
    statement: str
    asking: str
    begun: str
    plain: bool

    @classmethod
    def draw(cls, rng: random.Random, length: int, drilled: bool) -> Style:
        """A random style for a prompt of ``length`` tokens, in which UUIDs are cut short if it is short; one name only goes with plain."""
        style = cls._draw(rng, length)
        while drilled and style.plain:
            style = cls._draw(rng, length)
        if drilled and not style.digits and rng.random() < 0.7:
            style.digits = 7
        return style

    @classmethod
    def _draw(cls, rng: random.Random, length: int) -> Style:
        hidden_in = rng.choice(("lines", "lines", "prose", "prose", "list", "list", "list"))
        qualities = [rng.choice(QUALITIES) if rng.random() < 0.4 else word(rng) for _ in range(rng.choice((0, 1, 1, 2, 2)))]
        thing = " ".join([*qualities, rng.choice(KINDS) if rng.random() < 0.6 else word(rng)])
        uuids, digits = rng.random() < 0.2, rng.choice((7, 7, 7, 7, 4, 5, 6, 8, 9))
        uuid_names = rng.random() < (0.15 if hidden_in == "list" else 0.05)
        cut = 36 if length >= 768 else rng.choice((13, 18, 23, 36))
        plain = rng.random() < 0.25
        statement, asking = rng.choice(PLAIN if plain else STATEMENTS), "" if plain or rng.random() < 0.3 else rng.choice(ASKINGS)
        begun = rng.choice(BEGUN_WITHOUT if asking and rng.random() < 0.2 else BEGUN)
        if plain:
            begun = statement[: statement.index("{v}") - 1]
        return cls(hidden_in, thing, 0 if uuids else digits, Names(rng), uuid_names, cut, statement, asking, begun, plain)

    @property
    def things(self) -> str:
        """More than one of them."""
        return self.thing + "s"

    @property
    def joint(self) -> str:
        """What stands in a statement between the name and the value."""
        return joint(self.statement).format(a=self.thing, s=self.things)

    @property
    def after_tok(self) -> int:
        """Tokens behind a needle that should still point to it."""
        return {"lines": NUMBER_AFTER_TOK, "prose": PAIR_AFTER_TOK, "list": 0}[self.hidden_in]

    def value(self, rng: random.Random) -> str:
        """A random value."""
        return str(rng.randint(10 ** (self.digits - 1), 10**self.digits - 1)) if self.digits else random_uuid(rng)[: self.cut]

    def name(self, rng: random.Random) -> str:
        """A random name."""
        return random_uuid(rng)[: self.cut] if self.uuid_names else self.names.draw()

    def state(self, name: str, value: str) -> str:
        """The sentence that gives ``name`` a value."""
        return self.statement.format(a=self.thing, s=self.things, k=name, v=value)

    def question(self, rng: random.Random, names: list[str], many: bool) -> str:
        """A question, or none, and what its answer begins with; ``many``: values."""
        be, thing = ("are", self.things) if many else ("is", self.thing)
        asked = ""
        if self.asking:
            asked = self.asking.format(a=thing, k=listed(names), f=filler(rng), w=some_words(rng)) + rng.choice((" ", "\n"))
        return asked + self.begun.format(a=thing, k=listed(names), f=filler(rng), be=be, w=some_words(rng))


@dataclass
class CardStyle:
    """How names with values and nothing else are put: ``card`` and its ``end``, ``counts`` of values that a name may have, the share of
    names ``asked`` for. ``said``: the question is the card up to its value; else it is words, and ``answer`` behind them."""

    said: bool
    card: str
    end: str
    digits: int
    counts: tuple[int, ...]
    asked: float
    answer: str
    names: Names
    drilled: bool

    @classmethod
    def draw(cls, rng: random.Random, drilled: bool) -> CardStyle:
        """A random style; ``drilled``: every name has several values and is asked for."""
        said = not drilled and rng.random() < 0.3
        card, end = rng.choice(CARDS if said else ASKED_CARDS), rng.choice(CARD_ENDS)
        digits = rng.choice((2, 2, 2, 4, 7) if drilled else (2, 4, 7, 7))
        counts = (2, 3, 4) if drilled else (1,) if said else rng.choice(((1,), (1, 2, 3, 4)))
        answer, asked = rng.choice(("", "", " Answer:")), 1.0 if drilled else rng.choice((0.4, 0.7, 1.0))
        names = Names(rng, rng.choice((word, syllable, syllable, syllable) if drilled else (word, syllable)))
        return cls(said, card, end, digits, counts, asked, answer, names, drilled)

    def name(self, rng: random.Random) -> str:
        """A random name, in drills mostly of one word."""
        name = self.names.draw()
        return name.split("-")[0] if self.drilled and rng.random() < 0.7 else name

    def begun(self, name: str) -> str:
        """The card up to its value."""
        return self.card.removesuffix(" {v}").format(k=name)

    def question(self, rng: random.Random, name: str, many: bool) -> str:
        """What stands before the answer; ``many``: values."""
        if self.said:
            return self.begun(name)
        behind = filler(rng) if rng.random() < (0.3 if self.drilled else 0.7) else "?"
        return f"{'all ' if many else ''}{some_words(rng)} {rng.choice(('for', 'of'))} {name}{behind}{self.answer}"


class NamedValues:
    """Draws prompts of named values; ``size`` counts the tokens of a text."""

    def __init__(self, rng: random.Random, size: Callable[[str], int]):
        self.rng, self.size = rng, size

    def draw(self, length: int, several: Several) -> list[Segment]:
        """Values that have names, in a noise text, in prose or in a list of nothing else; asked for by one name, or by several at once."""
        if length < DRILL_TOK:
            return self.cards(length, drilled=several is VALUES)
        rng, style = self.rng, Style.draw(self.rng, length, several.drilled)
        intro = rng.choice(INTROS).format(a=style.thing, s=style.things)
        groups, needles, room = self.groups(style, several, length - self.size(intro) - 6)
        hay = self.haystack(style, {name for group in groups for name, _ in group.values}, room)
        for needle in needles:
            hay.insert(rng.randint(0, len(hay)), needle)
        for segment in hay:
            segment.text += " " if style.hidden_in == "prose" else "\n"
        hay[-1].text = hay[-1].text[:-1] + "\n"
        return [Segment(intro + "\n"), *hay, *(segment for group in groups for segment in group.answered(style.after_tok))]

    def cards(self, length: int, drilled: bool) -> list[Segment]:
        """Names with values and nothing else, many of them asked for: the plainest form."""
        rng, size, style = self.rng, self.size, CardStyle.draw(self.rng, drilled)
        names: set[str] = set()
        needles: list[Segment] = []
        groups: list[Group] = []
        used = 1
        while True:
            name = style.name(rng)
            if name in names:
                continue
            values = rng.sample(range(10 ** (style.digits - 1), 10**style.digits), rng.choice(style.counts))
            texts = [f"{style.begun(name)} {value}{style.end}" for value in values]
            question = style.question(rng, name, many=len(values) > 1)
            asked = not names or rng.random() < style.asked
            used += sum(size(text) for text in texts) * (1 + asked) + (size(question) + 2) * asked
            if names and used > length:
                break
            names.add(name)
            if asked:
                numbers = list(range(len(needles), len(needles) + len(values)))
                groups.append(Group(question, [(name, str(value)) for value in values], numbers, joint(style.card), style.said))
                groups[-1].shuffle(rng)
            unknown = size(style.begun(name)) // 2
            needles += [Segment(text, states=i, unknown=unknown) for i, text in enumerate(texts, len(needles))]
        rng.shuffle(needles)
        rng.shuffle(groups)
        return needles + [segment for group in groups for segment in group.answered(0)]

    def groups(self, style: Style, several: Several, room: int) -> tuple[list[Group], list[Segment], int]:
        """Values that are asked for together, by several names or as all that one name has; their needles, the tokens left for noise."""
        rng, size, share = self.rng, self.size, self.asked_share(style, several)
        groups: list[Group] = []
        needles: list[Segment] = []
        taken: set[str] = set()
        used = asked = 0
        while asked <= share * room:
            several_names, several_values = (not style.plain and rng.random() < chance for chance in several[:2])
            names = [style.name(rng) for _ in range(rng.choice((2, 3, 4, 4)) if several_names else 1)]
            each = rng.choice((2, 3, 4, 4, 4, 5)) if several_values and not several_names else 1
            if len(taken | set(names)) < len(taken) + len(names):
                continue
            question = style.question(rng, names, several_names or each > 1)
            values = [(name, style.value(rng)) for name in names for _ in range(each)]
            texts = [style.state(name, value) for name, value in values]
            stating = sum(size(text) + 1 for text in texts)
            asking = size(question) + 3 + sum(size(f" {name}{style.joint}{value}, ") for name, value in values)
            if groups and (asked + asking > share * room or used + stating + asked + asking > room):
                break
            group = Group(question, values, list(range(len(needles), len(needles) + len(values))), style.joint, style.plain)
            for i, (name, _), text in zip(group.needles, values, texts, strict=True):
                needles.append(Segment(text, states=i, unknown=size(text[: text.index(name)]) + size(name) // 2))
            if not several_names:
                group.shuffle(rng)
            groups.append(group)
            taken.update(names)
            used, asked = used + stating, asked + asking
        return groups, needles, room - used - asked

    def asked_share(self, style: Style, several: Several) -> float:
        """How much of a prompt is questions and answers; of some, one question."""
        if several.drilled:
            return self.rng.uniform(0.3, 0.7)
        if self.rng.random() < 0.1:
            return 0.0
        return self.rng.uniform(0.2, 0.6) if style.hidden_in == "list" else self.rng.uniform(0.1, 0.45)

    def haystack(self, style: Style, names: set[str], room: int) -> list[Segment]:
        """What the needles are hidden in: noise lines, prose, or statements about other names than ``names``."""
        rng = self.rng
        lines = varied_noise_lines(rng) if style.hidden_in == "lines" else []
        hay: list[Segment] = []
        while True:
            if style.hidden_in == "list":
                name = style.name(rng)
                if name in names:
                    continue
                text = style.state(name, style.value(rng))
            else:
                text = prose_sentence(rng) if style.hidden_in == "prose" else lines[len(hay) % len(lines)]
            room -= self.size(text) + 1
            if room < 0:
                return hay
            hay.append(Segment(text))
