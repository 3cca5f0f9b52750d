"""Rows of ∞Bench's six synthetic tasks, at any length, in the official schema (``id, context, input, answer, options``).

The recipe and its distributions are the published ones (arXiv 2402.13718, section 3, and the official scripts); the words around numbers,
keys and code are our own, and the official generator is not seeded: these rows are of the same kind as the published ones, never the same.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.infbench import DEPTHS, NUMBER_STRING, PASSKEY, five_digits, place_of, random_uuid, ten_digits
from hipexp.suites.sample import largest_fit

Row = dict[str, Any]
CountTok = Callable[[str], int]

NOISE_TOK, PAIR_TOK, FUNCTION_TOK = 25, 80, 25  # first guesses of the size search: tokens of a noise line, a pair of UUIDs, a function
KINDS = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest", "median")
LARGEST_TOP, SMALLEST_BOTTOM, NUMBERS = (79, 99), (0, 19), (0, 99)  # bounds of the numbers of Math.Find
LAYERS, STEP, ARGUMENT = (2, 4, 6, 8, 10), (-12, 17), (-10, 10)  # of Code.Run: functions in a chain, what each adds, what is asked
VALUES = (0, 99)  # between which the running value of Math.Calc stays
NAMES = 8800  # largest number in the name of a published function


def make_rows(subtask: str, length_tok: int, samples: int, seed: int, count_tok: CountTok) -> Iterator[Row]:
    """Rows of a synthetic task whose ``context`` and ``input`` together take at most ``length_tok`` tokens by ``count_tok``.

    Row ``i`` depends on the arguments and ``i`` alone. Raises ``ConfigError`` for a task that is not generated, and for a length
    that does not hold the smallest row.
    """
    if subtask not in MAKERS:
        raise ConfigError(f"infbench: {subtask!r} is not generated; generated are {', '.join(MAKERS)}, the others are published rows")
    for index in range(samples):
        rng = random.Random(f"hipexp-infbench/{subtask}/{seed}/{length_tok}/{samples}/{index}")
        yield {"id": index, **MAKERS[subtask](index, samples, length_tok, rng, count_tok)}


def fitted(make: Callable[[int], Row], length_tok: int, count_tok: CountTok, guess: int, least: int, what: str) -> Row:
    """The row of as many units as fit; ``make(n)`` is called with the same random numbers each time, so that only its size changes."""

    def size(more: int) -> int:
        row = make(least + more)
        return count_tok(f"{row['context']}\n{row['input']}")

    found = largest_fit(size, length_tok, max(0, guess - least))
    if found < 0:
        least = size(0)
        raise ConfigError(
            f"length_tok={length_tok} is too short for a row of {what}: the smallest takes {least} tokens; use {least} or more"
        )
    return make(least + found)


def digits(subtask: str, index: int, count: int, length_tok: int, rng: random.Random, count_tok: CountTok) -> Row:
    """``passkey`` and ``number_string``: noise lines, and one line that states a number twice, at one of 59 depths."""
    words, draw = (PASSKEY, five_digits) if subtask == "passkey" else (NUMBER_STRING, ten_digits)
    key, depth = draw(rng), place_of(index, count, DEPTHS) / (DEPTHS - 1)

    def make(lines: int) -> Row:
        at = round(depth * lines)
        text = [*[words.noise] * at, words.needle.format(key=key), *[words.noise] * (lines - at)]
        return {"context": "\n".join(text), "input": words.question, "answer": [key], "options": []}

    return fitted(make, length_tok, count_tok, length_tok // NOISE_TOK, 1, subtask)


def pairs(index: int, count: int, length_tok: int, rng: random.Random, count_tok: CountTok) -> Row:
    """``kv_retrieval``: one JSON object of UUID pairs; row ``i`` of ``n`` asks for pair ``floor(i * pairs / n)``."""
    drawn: list[tuple[str, str]] = []

    def make(n: int) -> Row:
        while len(drawn) < n:
            drawn.append((random_uuid(rng), random_uuid(rng)))
        key, value = drawn[place_of(index, count, n)]
        return {"context": json.dumps(dict(drawn[:n])), "input": f'Key: "{key}"', "answer": [value], "options": []}

    return fitted(make, length_tok, count_tok, length_tok // PAIR_TOK, 1, "kv_retrieval")


def math_find(index: int, count: int, length_tok: int, rng: random.Random, count_tok: CountTok) -> Row:
    """A list of whole numbers; asked for the (second, third) largest or smallest distinct one, or the median (which may be ``x.5``)."""
    kind = KINDS[place_of(index, count, len(KINDS))]
    side = kind.split()[-1] if kind != "median" else rng.choice(("largest", "smallest"))
    low, high = (NUMBERS[0], rng.randint(*LARGEST_TOP)) if side == "largest" else (rng.randint(*SMALLEST_BOTTOM), NUMBERS[1])
    drawn: list[int] = []

    def make(n: int) -> Row:
        while len(drawn) < n:
            drawn.append(rng.randint(low, high))
        numbers = drawn[:n]
        return {
            "context": str(numbers),
            "input": f"The {kind} number of the list above is:",
            "answer": [found_number(kind, numbers)],
            "options": [],
        }

    return fitted(make, length_tok, count_tok, length_tok // 3, 8, "math_find")


def found_number(kind: str, numbers: list[int]) -> int | float:
    """What a question of Math.Find asks for; "second" is the second distinct value. Few numbers: the last one there is."""
    if kind == "median":
        ordered, middle = sorted(numbers), len(numbers) // 2
        if len(numbers) % 2:
            return ordered[middle]
        total = ordered[middle - 1] + ordered[middle]
        return total // 2 if total % 2 == 0 else total / 2
    distinct = sorted(set(numbers), reverse=kind.endswith("largest"))
    return distinct[min({"second": 1, "third": 2}.get(kind.split()[0], 0), len(distinct) - 1)]


def math_calc(index: int, count: int, length_tok: int, rng: random.Random, count_tok: CountTok) -> Row:
    """One long sum of numbers; the answer is the running value after every term but the first."""
    terms, values = [rng.randint(*VALUES)], list[int]()

    def make(n: int) -> Row:
        while len(terms) < n:
            value = values[-1] if values else terms[0]
            add = rng.random() < 0.5
            if value == VALUES[0] or value == VALUES[1]:
                add = value == VALUES[0]
            size = rng.randint(1, VALUES[1] - value if add else value - VALUES[0])
            terms.append(size if add else -size)
            values.append(value + terms[-1])
        text = f"{terms[0]}" + "".join(f" {'+' if term > 0 else '-'} {abs(term)}" for term in terms[1:n])
        return {"context": text, "input": "", "answer": values[: n - 1], "options": []}

    return fitted(make, length_tok, count_tok, length_tok // 4, 2, "math_calc")


def code_run(index: int, count: int, length_tok: int, rng: random.Random, count_tok: CountTok) -> Row:
    """Functions in layers, each calling one of the next layer and adding a constant, the last adding to ``x``; asked for one of the first.

    Layers (2, 4, 6, 8 or 10) are of equal size; the functions stand in any order.
    """
    depth = LAYERS[place_of(index, count, len(LAYERS))]
    argument, order = rng.randint(*ARGUMENT), rng.random()
    drawn: dict[int, tuple[int, float]] = {}  # by the number in a function's name: what it adds, which one it calls (0 to 1)

    def make(n: int) -> Row:
        while len(drawn) < n * depth:
            name = rng.randrange(max(NAMES, 2 * len(drawn)))
            if name not in drawn:
                drawn[name] = rng.randint(*STEP), rng.random()
        names = list(drawn)[: n * depth]
        layers = [names[layer * n : (layer + 1) * n] for layer in range(depth)]
        calls = {name: below[int(drawn[name][1] * n)] for layer, below in itertools.pairwise(layers) for name in layer}
        asked, value = names[0], argument
        chain: int | None = asked
        while chain is not None:
            value, chain = value + drawn[chain][0], calls.get(chain)
        text = [function_text(name, calls.get(name), drawn[name][0]) for name in names]
        random.Random(order).shuffle(text)
        question = f"The return value of func_{asked}({argument}) is:"
        return {"context": "\n\n".join(text), "input": question, "answer": [value], "options": []}

    return fitted(make, length_tok, count_tok, length_tok // (FUNCTION_TOK * depth), 1, "code_run")


def function_text(name: int, calls: int | None, step: int) -> str:
    """One function of Code.Run."""
    inner = "x" if calls is None else f"func_{calls}(x)"
    return f"def func_{name}(x):\n    return {inner} {'+' if step >= 0 else '-'} {abs(step)}"


MAKERS: dict[str, Callable[[int, int, int, random.Random, CountTok], Row]] = {
    "passkey": partial(digits, "passkey"),
    "number_string": partial(digits, "number_string"),
    "kv_retrieval": pairs,
    "math_find": math_find,
    "math_calc": math_calc,
    "code_run": code_run,
}
