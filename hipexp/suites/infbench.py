"""Generated ∞Bench-style retrieval: ``passkey``, ``number_string`` and ``kv_retrieval`` at any length.

The distribution follows the published recipe of ∞Bench (arXiv 2402.13718): one noise line repeated, one line that states
a key twice; numbers whose digits are doubled in place; one JSON object of UUID pairs.
The prompts are our own words (protocol ``hipexp``), so a score made from them is never an official ∞Bench score.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

from hipexp.config.schema import ConfigError
from hipexp.suites.sample import Encode, Item, ProtocolCard, Sample, digest, largest_fit
from hipexp.suites.scoring.infbench import NEW, first_number, has_value

SUBTASKS = ("passkey", "number_string", "kv_retrieval")
OFFICIAL_ONLY = (
    "longbook_sum_eng",
    "longbook_qa_eng",
    "longbook_choice_eng",
    "longdialogue_qa_eng",
    "longbook_qa_chn",
    "code_debug",
    "code_run",
    "math_calc",
    "math_find",
)
WORDINGS = ("default", "heldout")
SEED_NAMESPACE = "hipexp-eval"
DEPTHS = 59  # needle positions of the published 128K set: 0, s, 2s, ... N with N = 58 s
SCORER = "hipexp-1 (rules of the official scorer, same in both editions)"
NOTE = "prompts in hipexp's own words, generated samples: not an official ∞Bench score"


@dataclass(frozen=True)
class Wording:
    """The words around a needle. ``needle`` takes ``{key}``; ``prefix`` is what the model has to continue."""

    intro: str
    noise: str
    needle: str
    question: str
    prefix: str


PASSKEY = Wording(
    intro="Somewhere in the following text a pass key is hidden. Find it and keep it in mind.",
    noise="Rain falls on the hills. The river takes it down to the sea. Clouds bring it back. The wheel keeps turning.",
    needle="The pass key is {key}. Keep it in mind. {key} is the pass key.",
    question="What is the pass key?",
    prefix="The pass key is",
)
NUMBER_STRING = Wording(
    intro="Somewhere in the following text a long number is hidden. Find it and keep it in mind.",
    noise=PASSKEY.noise,
    needle="The long number is {key}. Keep it in mind. {key} is the long number.",
    question="What is the long number?",
    prefix="The long number is",
)
KV = Wording(
    intro="The following JSON object holds pairs of a key and a value.",
    noise="",
    needle='"{key}": "{value}"',
    question='What is the value of the key "{key}"?',
    prefix='"{key}": "',
)

# Never used in training: neither the noise nor any of these sentences.
PASSKEY_HELDOUT = Wording(
    intro="One locker code is written between the lines that follow. You will need it at the end.",
    noise="Lamps light the street at night. A cat sleeps on the stairs. Someone plays the piano. The shop opens tomorrow.",
    needle="Write this down: the locker code is {key}. Yes, {key} is the locker code.",
    question="Can you repeat the locker code?",
    prefix="Sure, the locker code is",
)
NUMBER_STRING_HELDOUT = Wording(
    intro="One serial number is written between the lines that follow. You will need it at the end.",
    noise=PASSKEY_HELDOUT.noise,
    needle="Write this down: the serial number is {key}. Yes, {key} is the serial number.",
    question="Can you repeat the serial number?",
    prefix="Sure, the serial number is",
)
KV_HELDOUT = Wording(
    intro="Each entry of this dictionary maps one identifier to another one.",
    noise="",
    needle='"{key}": "{value}"',
    question='Which identifier is stored under "{key}"?',
    prefix='"{key}": "',
)


def five_digits(rng: random.Random) -> str:
    """A pass key: five digits, the first of them not zero."""
    return str(rng.randint(10000, 99999))


def ten_digits(rng: random.Random, seeds: int = 5) -> str:
    """Ten digits by the published recipe: five random ones (``seeds``), then five times a random digit is doubled in place."""
    digits = [str(rng.randint(0, 9)) for _ in range(seeds)]
    while len(digits) < 10:
        spot = rng.randrange(len(digits))
        digits.insert(spot, digits[spot])
    return "".join(digits)


def random_uuid(rng: random.Random) -> str:
    """A version-4 UUID drawn from ``rng``."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@dataclass(frozen=True)
class Subtask:
    """One kind of sample. ``answer`` is the text a perfect model writes after the prefix, with ``{}`` for the key or value."""

    wording: dict[str, Wording]
    draw: Callable[[random.Random], str]
    answer: str
    metric: str


KINDS = {
    "passkey": Subtask({"default": PASSKEY, "heldout": PASSKEY_HELDOUT}, five_digits, " {}.", "first_number"),
    "number_string": Subtask({"default": NUMBER_STRING, "heldout": NUMBER_STRING_HELDOUT}, ten_digits, " {}.", "first_number"),
    "kv_retrieval": Subtask({"default": KV, "heldout": KV_HELDOUT}, random_uuid, '{}"', "value_among_words"),
}


def check_subtasks(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The subtasks asked for (all that can be generated if none is named), or ``ConfigError`` for the rest."""
    for name in names:
        if name in OFFICIAL_ONLY:
            raise ConfigError(
                f"task.subtasks: {name!r} needs official data and prompts: `python -m hipexp data pull infbench subtask={name}`, then "
                f"task.protocol=completion, chat, infllm or minference. In our own words there are {', '.join(SUBTASKS)}"
            )
        if name not in SUBTASKS:
            official = ", ".join(OFFICIAL_ONLY)
            raise ConfigError(f"task.subtasks: unknown subtask {name!r}; known: {', '.join(SUBTASKS)}; with official data: {official}")
    return tuple(dict.fromkeys(names)) or SUBTASKS


def check_wording(name: str) -> str:
    """``name`` itself, or ``ConfigError``."""
    if name not in WORDINGS:
        raise ConfigError(f"task.wording={name} is unknown; use one of {', '.join(WORDINGS)}")
    return name


def seeded(*parts: object) -> random.Random:
    """The random stream of one sample. Training draws from other names, so it never saw these prompts."""
    return random.Random("/".join((SEED_NAMESPACE, *map(str, parts))))


@lru_cache(maxsize=64)
def new_token_limit(subtask: str, encode: Encode, wording: str = "default", draws: int = 256) -> int:
    """Tokens of the longest answer among ``draws`` random ones, and one for the stop; remembered per tokenizer.

    Counted as what the answer adds to its prefix, so a tokenizer that treats the start of a text in its own way does no harm.
    """
    kind, rng = KINDS[subtask], seeded("new-token-limit", subtask)
    prefix = kind.wording[wording].prefix
    longest = 0
    for _ in range(draws):
        before = prefix.format(key=kind.draw(rng))
        longest = max(longest, len(encode(before + kind.answer.format(kind.draw(rng)))) - len(encode(before)))
    return longest + 1


def place_of(index: int, count: int, places: int) -> int:
    """Which of ``places`` positions, in order, sample ``index`` of ``count`` uses.

    As many samples as places or more: each place equally often, as in the published recipe. Fewer: the middles of ``count`` equal parts,
    because needles at the ends lie in the sinks or in the window and tell nothing about pruning.
    """
    if count >= places:
        return index * places // count
    return (2 * index + 1) * places // (2 * count)


def digits_prompt(words: Wording, key: str, lines: int, position: int) -> str:
    """A noise text of ``lines`` lines with the needle before line ``position`` (after all if equal to ``lines``)."""
    noise, needle = words.noise + "\n", words.needle.format(key=key) + "\n"
    return f"{words.intro}\n{noise * position}{needle}{noise * (lines - position)}{words.question}\n{words.prefix}"


def pairs_prompt(words: Wording, pairs: list[tuple[str, str]], asked: str) -> str:
    """One JSON object of ``pairs`` and the question for the value of ``asked``."""
    body = ", ".join(words.needle.format(key=key, value=value) for key, value in pairs)
    return f"{words.intro}\n{{{body}}}\n{words.question.format(key=asked)}\n{words.prefix.format(key=asked)}"


def too_short(subtask: str, length_tok: int, frame_tok: int, new_tok: int, key: str = "task.length_tok") -> ConfigError:
    """The refusal of a length that does not hold a sample's frame and what is generated after it."""
    return ConfigError(
        f"{key}={length_tok} is too short for {subtask}: its frame takes {frame_tok} tokens and what is generated up to {new_tok}; "
        f"use at least {frame_tok + new_tok}"
    )


def digits_sample(
    subtask: str, index: int, depth: float, length_tok: int, encode: Encode, rng: random.Random, wording: str = "default"
) -> Sample:
    """A ``passkey`` or ``number_string`` sample with its needle at ``depth`` (0 before all noise, 1 after it).

    As many noise lines as fit into ``length_tok`` less the new tokens; nothing is ever cut.
    Raises ``ConfigError`` if not even the frame fits.
    """
    kind = KINDS[subtask]
    words, key = kind.wording[wording], kind.draw(rng)
    max_new_tok = new_token_limit(subtask, encode, wording)
    room = length_tok - max_new_tok

    def count(lines: int) -> int:
        return len(encode(digits_prompt(words, key, lines, round(depth * lines))))

    frame = count(0)
    if frame > room:
        raise too_short(subtask, length_tok, frame, max_new_tok)
    per_line = max(1.0, (count(8) - frame) / 8)
    lines = largest_fit(count, room, int((room - frame) / per_line))
    prompt = digits_prompt(words, key, lines, round(depth * lines))
    meta = {"depth": round(depth, 4), "noise_lines": lines}
    return Sample(subtask, index, prompt, encode(prompt), [key], max_new_tok, length_tok, meta=meta)


def pairs_sample(index: int, count: int, length_tok: int, encode: Encode, rng: random.Random, wording: str = "default") -> Sample:
    """A ``kv_retrieval`` sample: as many pairs as fit; sample ``index`` of ``count`` asks for the pair that ``place_of`` gives.

    Raises ``ConfigError`` if not a single pair fits.
    """
    words = KV_HELDOUT if wording == "heldout" else KV
    max_new_tok = new_token_limit("kv_retrieval", encode, wording)
    room = length_tok - max_new_tok
    pairs: list[tuple[str, str]] = []

    def prompt(n: int) -> str:
        while len(pairs) < n:
            pairs.append((random_uuid(rng), random_uuid(rng)))
        return pairs_prompt(words, pairs[:n], pairs[place_of(index, count, n)][0])

    one = len(encode(prompt(1)))
    if one > room:
        raise too_short("kv_retrieval", length_tok, one, max_new_tok)
    per_pair = (len(encode(prompt(9))) - one) / 8
    n = 1 + largest_fit(lambda more: len(encode(prompt(1 + more))), room, int((room - one) / per_pair))
    asked = place_of(index, count, n)
    text = prompt(n)
    meta = {"depth": round(asked / n, 4), "pairs": n, "asked": asked}
    return Sample("kv_retrieval", index, text, encode(text), [pairs[asked][1]], max_new_tok, length_tok, meta=meta)


def check_length(
    subtask: str, length_tok: int, encode: Encode, wording: str = "default", key: str = "task.length_tok", more_tok: int = 0
) -> None:
    """Raise ``ConfigError``, naming ``key``, if ``length_tok`` has no room for a frame, one pair or key, an answer and ``more_tok``."""
    frame_tok, new_tok = frame_size(subtask, encode, wording)
    if frame_tok + new_tok + more_tok > length_tok:
        raise too_short(subtask, length_tok, frame_tok, new_tok + more_tok, key)


def frame_size(subtask: str, encode: Encode, wording: str = "default") -> tuple[int, int]:
    """Tokens of the smallest prompt, with one pair or key and no noise, and of the longest answer."""
    kind, rng = KINDS[subtask], seeded("frame", subtask)
    words, needle = kind.wording[wording], kind.draw(rng)
    frame = pairs_prompt(words, [(needle, kind.draw(rng))], needle) if subtask == "kv_retrieval" else digits_prompt(words, needle, 0, 0)
    return len(encode(frame)), new_token_limit(subtask, encode, wording)


def make_sample(subtask: str, index: int, count: int, length_tok: int, encode: Encode, seed: int = 0, wording: str = "default") -> Sample:
    """Sample ``index`` of ``count`` of a subtask, at most ``length_tok`` tokens long with its answer.

    Drawn from ``(seed, subtask, index, length_tok)``; its place among ``count`` decides the depth of what is asked, and the tokenizer
    how much text goes around it. Raises ``ConfigError`` if ``length_tok`` is too short.
    """
    rng = seeded(subtask, seed, index, length_tok)
    if subtask == "kv_retrieval":
        return pairs_sample(index, count, length_tok, encode, rng, wording)
    return digits_sample(subtask, index, place_of(index, count, DEPTHS) / (DEPTHS - 1), length_tok, encode, rng, wording)


def score(subtask: str, prediction: str, references: list[str]) -> float:
    """The official rule: 100 if the output is right, else 0.

    ``passkey`` and ``number_string``: its first number equals the key. ``kv_retrieval``: the value is one of its words, after
    newlines and ``: " ' . , ? ! { }`` became spaces.
    """
    if KINDS[subtask].metric == "first_number":
        return 100.0 * (first_number(prediction) == references[0])
    return 100.0 * has_value(prediction, references[0], NEW)


def template_id(subtask: str, wording: str) -> str:
    """A short hash of the words of a prompt."""
    words = json.dumps(asdict(KINDS[subtask].wording[wording]), sort_keys=True)
    return digest(words)


class InfBench:
    """The generated subtasks of ∞Bench at one length; see ``hipexp.suites.sample.Suite``."""

    def __init__(self, subtasks: tuple[str, ...], samples: int, length_tok: int, encode: Encode, seed: int, wording: str):
        self.subtasks, self.samples, self.length_tok = check_subtasks(subtasks), samples, length_tok
        self.encode, self.seed, self.wording = encode, seed, check_wording(wording)
        largest = max(self.subtasks, key=lambda name: sum(frame_size(name, encode, wording)))
        check_length(largest, length_tok, encode, wording)

    def items(self) -> list[Item]:
        return [Item(name, index, self.length_tok) for name in self.subtasks for index in range(self.samples)]

    def sample(self, item: Item) -> Sample:
        return make_sample(item.subtask, item.index, self.samples, self.length_tok, self.encode, self.seed, self.wording)

    def score(self, sample: Sample, prediction: str) -> float:
        return score(sample.subtask, prediction, sample.references)

    def card(self) -> ProtocolCard:
        each = self.subtasks
        return ProtocolCard(
            suite="infbench",
            protocol="hipexp",
            edition="generated by the published recipe, 2024",
            template={name: template_id(name, self.wording) for name in each},
            wording=self.wording,
            metric={name: KINDS[name].metric for name in each},
            scorer=SCORER,
            length_tok=dict.fromkeys(each, self.length_tok),
            samples=dict.fromkeys(each, self.samples),
            new_tok={name: new_token_limit(name, self.encode, self.wording) for name in each},
            data=f"generated, seeds {SEED_NAMESPACE}/<subtask>/{self.seed}/<sample>/{self.length_tok}, depth by <sample> of {self.samples}",
            note=NOTE,
        )
