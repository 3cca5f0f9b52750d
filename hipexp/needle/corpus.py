"""Training text of ``needle``: retrieval prompts with varied noise, wording, depth and number of pairs.

Everything is drawn from word lists in this file, so training needs no download. Seeds are namespaced ``needle-train``; the suites draw
theirs from ``hipexp-eval``, so no evaluated prompt was ever trained on (of the 90,000 pass keys some occur in both, by chance).
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from hipexp.suites.infbench import KV, NUMBER_STRING, PASSKEY, Wording, five_digits, random_uuid, ten_digits

ADJECTIVES = (
    "quiet old bright narrow green heavy early distant warm cold gentle broken silver wooden hollow steady busy empty "
    "northern southern simple curious patient honest rapid slow careful yellow purple plain"
).split()
NOUNS = (
    "river valley window garden bridge harbor teacher farmer sailor painter kitchen market station forest mountain "
    "letter basket lantern engine village castle ladder mirror blanket bottle hammer island tunnel orchard meadow "
    "library workshop gardener captain doctor singer tower mill road wall roof door table boat wagon train horse "
    "rabbit falcon spider salmon willow maple cedar stone copper paper cotton sugar honey butter pepper"
).split()
VERBS = (
    "crosses follows paints carries watches repairs remembers forgets visits measures hides covers reaches leaves "
    "finds builds sells keeps moves counts cleans opens closes warms brings turns passes holds needs likes"
).split()
PLACES = (
    "near the shore|behind the mill|under the bridge|after the rain|before the winter|in the morning|at the market|"
    "along the road|above the valley|between two hills|beside the lake|without a sound|in the old town|for a long time"
).split("|")
STORIES = (
    "Rain falls on the hills. The river takes it down to the sea.",
    "Birds fly over the lake. Fish swim in it. Nobody is in a hurry here.",
    "One step, then another step. The road goes on and so do we.",
    "The sun is up. The moon is down. Stars come out later. Wind moves the leaves.",
    "There is nothing to see in this line. Please go on with the next one.",
    "Bread is made of flour, water and salt. The oven does the rest.",
    "The clock says tick, the clock says tock. Time goes by.",
    "Snow on the roof, fire in the stove. Tea is ready soon.",
)
THINGS = ("pass key", "secret number", "access code", "door code", "magic number", "hidden number", "long number", "ticket number")
INTROS = (
    "There is an important {thing} inside a lot of unimportant text. Look for it.",
    "Read the text below. It contains a {thing}. You will be asked about it.",
    "Remember the {thing} that is given in this text.",
    "A {thing} is hidden below. Find it and remember it.",
    "Please find the {thing}. Ignore everything else.",
    "The text below is long. Only the {thing} in it matters.",
)
NEEDLES = (
    "The {thing} is {{key}}. Keep it in mind. {{key}} is the {thing}.",
    "The {thing} is {{key}}. Remember it. {{key}} is the {thing}.",
    "Here it is: the {thing} is {{key}}. Do not forget it. {{key}} is the {thing}.",
    "Note that the {thing} is {{key}}. Again, the {thing} is {{key}}.",
    "Important: {{key}} is the {thing}. So the {thing} is {{key}}.",
    "The {thing} is {{key}}.",
)
QUESTIONS = (
    "What is the {thing}?",
    "Now tell me the {thing}.",
    "Question: which number is the {thing}?",
    "Which {thing} did you see?",
    "Give the {thing} back.",
)
PREFIXES = ("The {thing} is", "Answer: the {thing} is", "It is written that the {thing} is", "I remember that the {thing} is")
KV_INTROS = (
    KV.intro,
    "Below is a JSON object with random keys and values.",
    "Find the value that belongs to a key in this JSON object.",
    "JSON data:",
    "Here is a table of pairs. Every key has one value.",
    "Read these pairs carefully.",
)
KV_QUESTIONS = (
    KV.question,
    'Which value belongs to the key "{key}"?',
    'Key: "{key}". What is its value?',
    'Look up "{key}" and give its value.',
    'Find "{key}" in the object above.',
    "",
)
NUMBER_AFTER_TOK, PAIR_AFTER_TOK = 96, 48  # tokens behind a hidden number and behind a pair that should still point to it
EVAL_SHARE = 0.4  # of the training prompts use the wording of the evaluation
RUN_SHARE, SNIPPET_RUN_SHARE = 0.3, 0.5  # of the ten-digit numbers in prompts and in snippets have long runs of equal digits


@dataclass
class Segment:
    """A piece of training text; ``answer`` is learned with full weight, ``ends`` puts an end-of-text token behind it.

    ``states`` and ``asks`` name the needle that the piece states or asks for; ``unknown``: how many of the first tokens that state it
    come before what identifies it; ``after``: how many tokens behind it may tell of it.
    """

    text: str
    answer: bool = False
    ends: bool = False
    states: int | None = None
    asks: int | None = None
    unknown: int = 0
    after: int = 0


class Link(NamedTuple):
    """Where a prompt asks for a needle and where it states it, in token positions (ends exclusive).

    ``after``: how many tokens behind the needle may tell of it.
    """

    asking_from: int
    asking_to: int
    needle_from: int
    needle_to: int
    after: int


def digits_in_runs(rng: random.Random) -> str:
    """Ten digits grown from two or three in place of five: to say them again one must count equal pairs."""
    return ten_digits(rng, rng.choice((2, 3)))


def sentence(rng: random.Random) -> str:
    """One random English sentence."""
    article = rng.choice(("The", "A", "Every", "This", "One"))
    other = rng.choice(("the", "a", "its", "another"))
    text = f"{article} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS)} {other} {rng.choice(NOUNS)}"
    return f"{text} {rng.choice(PLACES)}." if rng.random() < 0.5 else f"{text}."


def noise_lines(rng: random.Random) -> list[str]:
    """The lines that a noise text repeats: one as in the published recipe, or a few, or many different ones."""
    kind = rng.random()
    if kind < EVAL_SHARE:
        return [PASSKEY.noise]
    if kind < 0.55:
        return [rng.choice(STORIES)]
    if kind < 0.75:
        return [" ".join(sentence(rng) for _ in range(rng.randint(1, 4)))]
    return [" ".join(sentence(rng) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(2, 12))]


def digits_wording(rng: random.Random, ten: bool) -> tuple[str, Wording]:
    """What is hidden, and a wording for it: that of the evaluation, or a random combination."""
    if rng.random() < EVAL_SHARE:
        return ("long number", NUMBER_STRING) if ten else ("pass key", PASSKEY)
    thing = rng.choice(THINGS)
    parts = (rng.choice(INTROS), rng.choice(NEEDLES), rng.choice(QUESTIONS), rng.choice(PREFIXES))
    intro, needle, question, prefix = (part.format(thing=thing) for part in parts)
    return thing, Wording(intro=intro, noise="", needle=needle, question=question, prefix=prefix)


class PromptMaker:
    """Draws training prompts of a given length in tokens. ``encode(text)`` returns ``ids`` without special tokens, and their ``offsets``.

    ``first_weight``: loss weight of the first token of the answer to a question; for a pair it alone has to tell the needles apart.
    """

    def __init__(self, encode, seed: int = 0, first_weight: float = 1.0, eos_id: int = 2, bos_id: int = 1):
        self.rng = random.Random(f"needle-train/{seed}")
        self.encode, self.size = encode, lru_cache(maxsize=4096)(lambda text: len(encode(text).ids))
        self.first_weight, self.eos_id, self.bos_id = first_weight, eos_id, bos_id

    def digits(self, length: int) -> list[Segment]:
        """A noise text of about ``length`` tokens with one hidden number, or with several that belong to places."""
        rng = self.rng
        ten = rng.random() < 0.6
        (thing, words), lines = digits_wording(rng, ten), noise_lines(rng)
        key = (digits_in_runs if rng.random() < RUN_SHARE else ten_digits) if ten else five_digits
        count = 1 if rng.random() < 0.4 else rng.randint(2, max(2, min(12, length // 96)))
        places = rng.sample(NOUNS, count) if count > 1 else [""]
        keys = [key(rng) for _ in places]

        def at(text: str, place: str) -> str:
            return text.replace(thing, f"{thing} of the {place}") if place else text

        head = [Segment(words.intro + "\n")]
        needles = [
            Segment(at(words.needle, place).format(key=k) + "\n", states=i) for i, (place, k) in enumerate(zip(places, keys, strict=True))
        ]
        tail: list[Segment] = []
        for i in rng.sample(range(count), count):
            ask = at(words.question, places[i])
            tail += [
                Segment(f"{ask}\n{at(words.prefix, places[i])}", asks=i),
                Segment(" ", answer=True, asks=i, after=NUMBER_AFTER_TOK),
                Segment(f"{keys[i]}.", answer=True, ends=True, asks=i, after=NUMBER_AFTER_TOK),
            ]
        used = sum(self.size(s.text) for s in head + needles + tail) + 2 * count
        noise: list[Segment] = []
        while True:
            line = lines[len(noise) % len(lines)] + "\n"
            used += self.size(line)
            if used > length:
                break
            noise.append(Segment(line))
        for needle in needles:
            noise.insert(rng.randint(0, len(noise)), needle)
        return head + noise + tail

    def pairs(self, length: int) -> list[Segment]:
        """A JSON object of UUID pairs with one or several questions; in short prompts, and in some others, the UUIDs are cut short."""
        rng = self.rng
        cut = rng.choice((8,) if length < 128 else (8, 13, 18, 23, 36) if length < 256 or rng.random() < 0.2 else (36,))
        intro, question = (KV.intro, KV.question) if rng.random() < EVAL_SHARE else (rng.choice(KV_INTROS), rng.choice(KV_QUESTIONS))
        if length < 192 or rng.random() < 0.1:
            intro, question = rng.choice(("", sentence(rng))) if length >= 128 else "", ""
        budget = max(0, length - self.size(intro) - 4)
        word = self.size(random_uuid(rng)[:cut])
        pair, ask = 2 * word + 5, 2 * word + 7 + (self.size(question) + word if question else 0)
        asked = 1 if rng.random() < 0.2 else max(1, int(budget * rng.uniform(0.1, 0.5)) // ask)
        count = max(1, (budget - asked * ask) // pair)
        asked = min(asked, count)
        keys, values = ([random_uuid(rng)[:cut] for _ in range(count)] for _ in range(2))
        out = [Segment(f"{intro}\n{{")]
        for i in range(count):
            out.append(Segment(KV.needle.format(key=keys[i], value=values[i]), states=i, unknown=word // 2))
            out.append(Segment(", " if i < count - 1 else "}\n"))
        for i in rng.sample(range(count), asked):
            text = (question.format(key=keys[i]) + "\n" if question else "") + KV.prefix.format(key=keys[i])
            out += [Segment(text, asks=i), Segment(f'{values[i]}"', answer=True, ends=True, asks=i, after=PAIR_AFTER_TOK)]
        return out

    def draw(self, length: int) -> list[Segment]:
        """The segments of one prompt.

        Below 128 tokens only repeats and short pairs: looking up what followed a token before is learned there in minutes, while
        the varied prompts alone leave the model guessing for long. After that variety decides whether it generalises.
        """
        kind = self.rng.random()
        if length < 128:
            return self.repeats(length) if kind < 0.6 else self.pairs(length)
        if kind < (0.6 if length < 192 else 0.3 if length < 1024 else 0.05):
            return self.snippets(length)
        return self.pairs(length) if length < 192 or kind < 0.65 else self.digits(length)

    def repeats(self, length: int) -> list[Segment]:
        """A run of random hex pairs, said again and again."""
        rng = self.rng
        once = "".join(f"{rng.getrandbits(8):02x}" for _ in range(rng.randint(length // 6, length // 3)))
        text = " ".join(once[i : i + 8] for i in range(0, len(once), 8)) + "\n"
        return [Segment(text, states=0)] + [Segment(text, answer=True, asks=0)] * (length // self.size(text) - 1)

    def snippets(self, length: int) -> list[Segment]:
        """Random snippets that come again in random order, behind some noise: the plainest form of looking something up."""
        rng = self.rng
        separator = rng.choice((" ", ", ", "\n", ". ", ": ", '" "'))
        snippets = [self.snippet() + separator for _ in range(rng.randint(2, max(3, length // 40)))]
        out = [Segment(sentence(rng) + "\n")] if rng.random() < 0.5 else []
        used = sum(self.size(s.text) for s in out) + 1
        seen: dict[int, bool] = {}
        while True:
            i = rng.randrange(len(snippets))
            used += self.size(snippets[i])
            if used > length:
                return out
            out.append(Segment(snippets[i], answer=i in seen, states=None if i in seen else i, asks=i))
            seen[i] = True

    def snippet(self) -> str:
        """A part of a UUID, a run of hex characters, a number or some words."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.35:
            return random_uuid(rng)[: rng.choice((8, 13, 18, 23, 36))]
        if kind < 0.5:
            return f"{rng.getrandbits(64):016x}"[: rng.choice((4, 8, 12, 16))]
        if kind < 0.85:
            return digits_in_runs(rng) if rng.random() < SNIPPET_RUN_SHARE else rng.choice((five_digits, ten_digits))(rng)
        return " ".join(rng.choice(rng.choice((NOUNS, VERBS, ADJECTIVES))) for _ in range(rng.randint(2, 8)))

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
                yield segment, text.ids[before:done] + ([self.eos_id] if segment.ends else [])

    def prompt(self, length: int) -> tuple[list[int], list[float], list[Link]]:
        """One training sequence of at most ``length`` tokens.

        Returns token ids, the loss weight of each (1 for answers or ``first_weight``, 0 elsewhere) and the links from questions to needles.
        """
        while True:
            segments = self.draw(length)
            ids: list[int] = [self.bos_id]
            weight: list[float] = [0.0]
            stated: dict[int, tuple[int, int]] = {}
            links = []
            for segment, piece in self.pieces(segments):
                start = len(ids)
                ids += piece
                weight += [float(segment.answer)] * len(piece)
                if segment.ends:
                    weight[start] = self.first_weight
                if segment.states is not None:
                    stated[segment.states] = (start + segment.unknown, len(ids))
                if segment.answer:
                    links.append(Link(start - 1, len(ids) - 1, *stated[segment.asks], segment.after))
            if len(ids) <= length or length < 192:
                return ids[:length], weight[:length], [link for link in links if link.asking_to < length]
