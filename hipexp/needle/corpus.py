"""Training prompts of ``needle``: retrieval with varied noise, wording, depth and number of needles.

Here are the kinds that the first phase learns: repeats, snippets, pairs and hidden numbers; ``names`` and ``chains`` hold the others.
Seeds are namespaced ``needle-train``. The evaluated prompts of ∞Bench's kinds draw theirs from ``hipexp-eval``, and RULER's rows come
from the plain seed 42: no evaluated prompt was ever trained on (of the 90,000 pass keys some occur in both, by chance).
"""

from __future__ import annotations

import random
from functools import lru_cache, partial

from hipexp.needle.chains import Chains
from hipexp.needle.names import NAMED, QUERIES, VALUES, NamedValues
from hipexp.needle.segments import NUMBER_AFTER_TOK, PAIR_AFTER_TOK, Prompt, Reader, Segment
from hipexp.needle.words import ADJECTIVES, EVAL_SHARE, NOUNS, VERBS, noise_lines, sentence
from hipexp.suites.infbench import KV, NUMBER_STRING, PASSKEY, Wording, five_digits, random_uuid, ten_digits

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
RUN_SHARE, SNIPPET_RUN_SHARE = 0.3, 0.5  # of the ten-digit numbers in prompts and in snippets have long runs of equal digits


def digits_in_runs(rng: random.Random) -> str:
    """Ten digits grown from two or three in place of five: to say them again one must count equal pairs."""
    return ten_digits(rng, rng.choice((2, 3)))


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

    ``mixture``: the share of each kind of prompt, by its name in ``kinds``. ``first_weight``: loss weight of tokens that tell
    needles apart (``Segment.tells``).
    """

    def __init__(self, encode, mixture: dict[str, float], seed: int = 0, first_weight: float = 1.0):
        self.mixture, self.rng = mixture, random.Random(f"needle-train/{seed}")
        self.reader, self.size = Reader(encode, first_weight), lru_cache(maxsize=4096)(lambda text: len(encode(text).ids))
        named = NamedValues(self.rng, self.size)
        self.kinds = {
            "repeats": self.repeats,
            "snippets": self.snippets,
            "pairs": self.pairs,
            "digits": self.digits,
            "named": partial(named.draw, several=NAMED),
            "values": partial(named.draw, several=VALUES),
            "queries": partial(named.draw, several=QUERIES),
            "chains": Chains(self.rng, self.size).draw,
        }

    def prompt(self, length: int) -> Prompt:
        """One training sequence of at most ``length`` tokens; short ones are cut, long ones drawn anew, where they come out longer."""
        while True:
            prompt = self.reader.read(self.draw(length))
            if len(prompt.ids) <= length or length < 192:
                return prompt.cut(length)

    def draw(self, length: int) -> list[Segment]:
        """The segments of one prompt."""
        kind = self.rng.choices(list(self.mixture), list(self.mixture.values()))[0]
        return self.kinds[kind](length)

    def repeats(self, length: int) -> list[Segment]:
        """A run of random hex pairs, said again and again."""
        rng = self.rng
        once = "".join(f"{rng.getrandbits(8):02x}" for _ in range(rng.randint(length // 6, length // 3)))
        text = " ".join(once[i : i + 8] for i in range(0, len(once), 8)) + "\n"
        return [Segment(text, states=0)] + [Segment(text, answer=1.0, asks=(0,))] * (length // self.size(text) - 1)

    def snippets(self, length: int) -> list[Segment]:
        """Random snippets that come again in random order, behind some noise: the plainest form of looking something up."""
        rng = self.rng
        separator = rng.choice((" ", ", ", "\n", ". ", ": ", '" "'))
        snippets = [self.snippet() + separator for _ in range(rng.randint(2, max(3, length // 40)))]
        out = [Segment(sentence(rng) + "\n")] if rng.random() < 0.5 else []
        used = sum(self.size(s.text) for s in out) + 1
        seen: set[int] = set()
        while True:
            i = rng.randrange(len(snippets))
            used += self.size(snippets[i])
            if used > length:
                return out
            out.append(Segment(snippets[i], answer=1.0, asks=(i,)) if i in seen else Segment(snippets[i], states=i))
            seen.add(i)

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
            out.append(Segment((question.format(key=keys[i]) + "\n" if question else "") + KV.prefix.format(key=keys[i])))
            out.append(Segment(f'{values[i]}"', answer=1.0, ends=True, asks=(i,), after=PAIR_AFTER_TOK, tells=True))
        return out

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
                Segment(f"{ask}\n{at(words.prefix, places[i])}"),
                Segment(" ", answer=1.0, asks=(i,), after=NUMBER_AFTER_TOK),
                Segment(f"{keys[i]}.", answer=1.0, ends=True, asks=(i,), after=NUMBER_AFTER_TOK, tells=True),
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
