"""RULER's rows, made as the official generator of mid 2025 and later makes them, draw by draw.

The single samples come from lm_eval's builders, which are those of the official generator; this module has what goes around them: the
search for the size, the loop that shrinks a sample until it fits, the assembly of ``cwe`` and the samples of ``vt``, which lm_eval has in
the edition of 2024 only. All of them draw from the global states of ``random`` and numpy, seeded once for each task and length: probes of
the search are part of the stream, so a row depends on all rows before it, not on how many follow.
"""

from __future__ import annotations

import itertools
import random
import string
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from hipexp.config.schema import ConfigError
from hipexp.suites.lm_eval import needles, set_sentences, suite_module
from hipexp.suites.ruler import resources as files
from hipexp.suites.ruler.tasks import SHORT_TOK, TASKS, RulerTask, check_subtasks

Row = dict[str, Any]
CountTok = Callable[[str], int]

TRIES = 100  # at the smallest size; the official generator goes on for ever
PREFIX_START = 10  # characters by which the official generator finds the answer prefix again
HOPS, NAME_LETTERS, EXAMPLE_LETTERS, EXAMPLE_VALUE, EXAMPLE_TOK, EXAMPLE_STEP = 4, 5, 3, "12345", 500, 5
COMMON, PROBE_WORDS = 10, 4096
WORD_LETTERS, TOK_PER_CODED_WORD, ALPHA, ASKED, STEPS = 6, 50, 2.0, 3, 32  # of fwe: vocabulary of L / 50 words, steps of L / 32

PROSE = "The wind of the morning goes over the fields and along the road to the sea. "
ROOM = {"niah": 6_000, "vt": 6_000, "cwe": 20_000, "fwe": 6_000, "qa": 16_000}  # characters of prose longer than the smallest sample
LISTS_TOK = 48_000  # fewest tokens in which cwe can have as many words as wonderwords has (8166): each stands three times, with its number


@dataclass(frozen=True)
class Draft:
    """A task text, what the answer begins with, and what it has to say."""

    text: str
    prefix: str
    answers: list[str]


@dataclass(frozen=True)
class Frame:
    """What a sample has to fit into: ``length_tok`` tokens, with ``new_tok`` of the answer and the chat template around the task text."""

    subtask: str
    length_tok: int
    new_tok: int
    before: str
    after: str
    count_tok: CountTok

    def prompt_tok(self, draft: Draft) -> int:
        """Tokens of a prompt: template, task text and answer prefix."""
        return self.count_tok(self.before + draft.text + self.after + draft.prefix)

    def too_short(self, why: str) -> ConfigError:
        """The refusal of a length at which the official generator would never end."""
        return ConfigError(
            f"task.length_tok={self.length_tok} is too short for {self.subtask} with this tokenizer: {why}; use a longer one"
        )


Build = Callable[[int, int], Draft]
"""A new sample: of a row's index and a number of units."""
Draw = Callable[[int], Iterator[tuple[Draft, int]]]
"""So many samples, one after the other, and the length of each with its new tokens."""


def make_rows(
    subtask: str,
    length_tok: int,
    samples: int,
    seed: int,
    count_tok: CountTok,
    resources: Path,
    new_tok: int | None = None,
    template: tuple[str, str] = ("", ""),
) -> list[Row]:
    """``samples`` rows of a task in the official schema, none longer than ``length_tok``, from the files in the folder ``resources``.

    ``count_tok`` counts without special tokens. ``template`` is the chat template: the text before the task text, and between it and the
    answer prefix; it counts. ``new_tok`` replaces the task's limit of new tokens.
    Fields: ``input`` (task text), ``answer_prefix``, ``outputs`` (references), ``length`` (prompt and new tokens), ``length_w_model_temp``
    (the same: the template is counted here, where the official field has it added later), ``index`` (a counter, but in needle rows the
    character at which the first answer stands) and in those ``token_position_answer`` (tokens of ``input`` before it, no template).
    With an empty template and the official files ``input``, ``outputs``, ``answer_prefix`` and ``length`` are meant to be those of the
    official scripts, draw by draw (compared with copies of them: docs/protocols.md).
    A chat template differs: the official scripts put it around the solved example of ``cwe`` too, and turn "are" into "is" in it.

    The states of ``random`` and numpy are as before when it returns; while it runs no other thread may draw from them.
    Raises ``ConfigError`` for a length at which the official generator would not end, and ``DataMissing``.
    """
    task = TASKS[check_subtasks([subtask])[0]]
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} must be from 0 to 4294967295 for RULER, as numpy wants it")
    counted = lru_cache(maxsize=2)(count_tok)
    frame = Frame(subtask, length_tok, task.new_tok if new_tok is None else new_tok, *template, counted)
    with undisturbed():
        draw = FAMILIES[task.family](task, frame, seed, resources)  # imports modules, which may draw numbers
        random.seed(seed)
        np.random.seed(seed)
        return [row_of(index, task, frame, *made) for index, made in enumerate(draw(samples))]


def check_length(
    subtask: str, length_tok: int, seed: int, count_tok: CountTok, resources: Path, template: tuple[str, str] = ("", "")
) -> None:
    """Refuse at once a length for which no row can be made. Raises as :func:`make_rows`.

    In doubt, for lengths shorter than some pages of prose, the first row is made; others may still be too long. Where ``cwe`` may need the
    second word list, which is not there, one sample of all words of the first is made: it needs the second if these fit.
    """
    task = TASKS[subtask]
    if length_tok < count_tok(PROSE * (ROOM[task.family] // len(PROSE) + 1)) + count_tok("".join(template)):
        make_rows(subtask, length_tok, 1, seed, count_tok, resources, template=template)
    elif task.family == "cwe" and length_tok >= LISTS_TOK and not files.has(resources, "more_words"):
        frame = Frame(subtask, length_tok, task.new_tok, *template, count_tok)
        first, build = lists(task, frame, seed, resources)
        with undisturbed():
            random.seed(seed)
            if frame.prompt_tok(build(first)) + task.new_tok <= length_tok:
                files.find(resources, "more_words")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the global states of ``random`` and numpy."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)


def row_of(index: int, task: RulerTask, frame: Frame, draft: Draft, length: int) -> Row:
    """A row of the official schema. Raises ``ConfigError`` if its text is so short that it has lost a reference.

    Those of ``qa`` need not occur in it: some questions of HotpotQA are answered by yes or no.
    """
    if task.family != "qa" and not all(answer in draft.text for answer in draft.answers):
        raise frame.too_short("not all answers occur in the text")
    row: Row = {
        "index": index,
        "input": draft.text,
        "outputs": draft.answers,
        "length": length,
        "length_w_model_temp": length,
        "answer_prefix": draft.prefix,
    }
    if task.family == "niah":
        row["index"] = draft.text.find(draft.answers[0])
        row["token_position_answer"] = frame.count_tok(draft.text[: row["index"]])
    return row


def split_prefix(filled: str, prefix: str, answers: list[str]) -> Draft:
    """A filled template cut before its answer prefix."""
    at = filled.rfind(prefix[:PREFIX_START])
    return Draft(filled[:at], filled[at:], answers)


def fitted(frame: Frame, step: int, build: Build, smallest: Callable[[int], int] = lambda _: 1) -> Draw:
    """Samples of as many units as fit; ``smallest`` is the least number of units that a row of that index can be built of."""

    def measure(size: int) -> int:
        return frame.prompt_tok(build(0, size))

    def draw(samples: int) -> Iterator[tuple[Draft, int]]:
        size = search(measure, step, most_of(measure, step, frame), frame)
        for index in range(samples):
            yield shrunk(partial(build, index), size, step, smallest(index), frame)

    return draw


def most_of(measure: Callable[[int], int], probe: int, frame: Frame) -> int:
    """Where the search ends: three times as many units as one probe lets expect to fit."""
    return int((frame.length_tok / per_unit(measure, probe, frame)) * 3)


def per_unit(measure: Callable[[int], int], probe: int, frame: Frame) -> float:
    """Tokens per unit of a sample of ``probe`` units."""
    tokens = measure(probe)
    if tokens < 1:
        raise ConfigError(f"the tokenizer of the model finds no tokens in a prompt of {frame.subtask}; use another one")
    return tokens / probe


def search(measure: Callable[[int], int], step: int, most: int, frame: Frame, more_tok: int = 0) -> int:
    """The largest size that fits with the new tokens and ``more_tok``, by bisection from ``step`` to ``most``; ``step`` if none does.

    Every call of ``measure`` draws a new sample, so that the result is as random as they are.
    """
    low, high, found = step, max(most, 2 * step), step
    while low <= high:
        middle = (low + high) // 2
        if measure(middle) + more_tok + frame.new_tok <= frame.length_tok:
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found


def shrunk(build: Callable[[int], Draft], size: int, step: int, smallest: int, frame: Frame) -> tuple[Draft, int]:
    """A sample that fits and its length: every sample that does not is followed by one ``step`` units smaller, then by others as small."""
    tries, length = 0, 0
    while size >= smallest and tries < TRIES:
        draft = build(size)
        length = frame.prompt_tok(draft) + frame.new_tok
        if length <= frame.length_tok:
            return draft, length
        if size > step:
            size -= step
        else:
            tries += 1
    raise frame.too_short(f"the smallest sample took {length} tokens with its answer" if tries else f"it takes {smallest} units or more")


def words_of(task: RulerTask) -> tuple[str, str]:
    """The official template of a task and its answer prefix, with places to fill in."""
    if task.family == "niah":
        needles()
        template = suite_module("ruler.niah_utils").TEMPLATE
        asked = template.rsplit("\n", 1)[1].split(" the ", 1)[1]  # the prefix repeats the question; lm_eval has it in its code only
        return template, f" The {asked.removesuffix('?')} are"
    config = suite_module(f"ruler.{task.family}_utils").CONFIG
    if task.family == "vt":
        config = config["variable_tracking"]
    prefix = config["answer_prefix"].replace("assgined", "assigned")  # the spelling of 2024
    return config["template"], f" {prefix.lstrip()}"


def niah(task: RulerTask, frame: Frame, seed: int, folder: Path) -> Draw:
    """Needles in one repeated sentence, in other needles or in essays. A unit is a line or a word."""
    words = files.essay_words(folder) if task.haystack == "essay" else []
    module = needles()
    template, prefix = words_of(task)
    if task.haystack == "essay":
        set_sentences(files.sentences(folder))

    def build(_: int, size: int) -> Draft:
        haystack = words * -(-size // len(words)) if words else module.get_haystack(task.haystack)
        filled, answers, _query = module.generate_input_output(
            size,
            haystack,
            type_haystack=task.haystack,
            num_needle_k=max(task.n_keys, task.n_asked),
            type_needle_k=task.keys,
            num_needle_v=task.n_values,
            type_needle_v=task.values,
            template=template + prefix,
            num_needle_q=task.n_asked,
            random_seed=seed,
        )
        return split_prefix(filled, prefix, answers)

    return fitted(frame, task.step_at(frame.length_tok), build)


def qa(task: RulerTask, frame: Frame, seed: int, folder: Path) -> Draw:
    """A question and documents, the one with the answer among them. A unit is a document."""
    module = suite_module("ruler.qa_utils")
    asked, documents = files.questions(folder, task.needs[0])
    _, prefix = words_of(task)

    def build(index: int, size: int) -> Draft:
        taken = documents
        if size >= len(documents):  # repeated, as a new list: the builder shuffles all documents in place
            taken = (documents * -(-size // len(documents)))[:size]
        with files.replaced(module, SEED=seed):
            text, answers = module.generate_input_output(index, size, asked, taken)
        return Draft(text, prefix, answers)

    def smallest(index: int) -> int:
        return min(len(documents), len(asked[index]["context"]))

    draw = fitted(frame, task.step, build, smallest)

    def checked(samples: int) -> Iterator[tuple[Draft, int]]:
        files.check(folder, task.needs[0], samples)
        return draw(samples)

    return checked


def lists(task: RulerTask, frame: Frame, seed: int, folder: Path) -> tuple[int, Callable[[int], Draft]]:
    """How many words the first list of ``cwe`` has, and what builds a sample of so many words: of the second list, if these are more."""
    module = suite_module("ruler.cwe_utils")
    words = sorted(module.WORDS)
    random.Random(seed).shuffle(words)
    order = SimpleNamespace(shuffle=lambda items: random.Random(seed).shuffle(items))
    template, prefix = words_of(task)
    example, repeats = ((20, 3, 1), (6, 1)) if frame.length_tok < SHORT_TOK else ((40, 10, 3), (30, 3))

    def listed(size: int, *repeats: int) -> tuple[str, list[str]]:
        source = words if size <= len(words) else files.more_words(folder)
        if size > len(source):
            raise ConfigError(
                f"task.length_tok={frame.length_tok} makes cwe try {size} words, but {files.find(folder, 'more_words')} has {len(source)}; "
                "use a shorter length or a longer list"
            )
        with files.replaced(module, RNG=order, WORDS=source):
            shown, common = module.get_example(size, *repeats, COMMON)
        return template.format(context=shown), common

    def build(size: int) -> Draft:
        solved, common = listed(*example)
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(common, 1))
        text, answers = listed(size, *repeats)
        return Draft(f"{solved}{prefix} {answer}\n{text}", prefix, answers)

    return len(words), build


def cwe(task: RulerTask, frame: Frame, seed: int, folder: Path) -> Draw:
    """A numbered list in which ten words are more common than the others, and a solved smaller one in front. A unit is a word.

    Lists of less than ten words are refused; the official generator asks for ten words of them, and knows fewer answers.
    """
    first, build = lists(task, frame, seed, folder)

    def measure(size: int) -> int:
        if size > first and not files.has(folder, "more_words"):
            return frame.length_tok + 1  # too long; the official generator would draw a sample of other words here
        return frame.prompt_tok(build(size))

    def draw(samples: int) -> Iterator[tuple[Draft, int]]:
        most = int(frame.length_tok // per_unit(measure, PROBE_WORDS, frame)) * 2
        size = search(measure, task.step, most, frame)
        if size == first:
            files.find(folder, "more_words")  # more of them may fit
        for _ in range(samples):
            yield shrunk(build, size, task.step, COMMON, frame)

    return draw


def fwe(task: RulerTask, frame: Frame, seed: int, folder: Path) -> Draw:
    """Coded words whose frequencies fall as those of a zeta distribution; asked for the three that are most frequent after the dots."""
    module = suite_module("ruler.fwe_utils")
    room, (_, prefix) = frame.length_tok - frame.new_tok, words_of(task)

    def counter(filled: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=range(frame.prompt_tok(split_prefix(filled, prefix, []))))

    def build(words: int) -> tuple[str, list[str], int]:
        with files.replaced(module, SEED=seed):
            return module.generate_input_output(
                room,
                counter,
                num_words=words,
                coded_wordlen=WORD_LETTERS,
                vocab_size=room // TOK_PER_CODED_WORD,
                incremental=room // STEPS,
                alpha=ALPHA,
            )

    def draw(samples: int) -> Iterator[tuple[Draft, int]]:
        empty = len(counter(module.TEMPLATE.format(context="", query="")).input_ids)
        if empty > room or room // TOK_PER_CODED_WORD <= ASKED:
            raise frame.too_short(
                f"its question alone takes {empty} tokens, and less than {(ASKED + 1) * TOK_PER_CODED_WORD} have too few words"
            )
        _, _, words = build(-1)
        for _ in range(samples):
            filled, answers, _ = build(words)
            draft = split_prefix(filled, prefix, answers)
            yield draft, frame.prompt_tok(draft) + frame.new_tok

    return draw


def vt(task: RulerTask, frame: Frame, seed: int, folder: Path) -> Draw:
    """A chain of variables hidden in noise, and a solved shorter one in front with names and value of its own. A unit is a line."""
    words, noise, step = words_of(task), noise_line(), task.step_at(frame.length_tok)

    def measure(lines: int) -> int:
        return frame.prompt_tok(chain(words, noise, lines))

    def draw(samples: int) -> Iterator[tuple[Draft, int]]:
        example = solved_chain(words, noise, frame)
        size = search(measure, step, most_of(measure, step, frame), frame, frame.count_tok(example))

        def build(lines: int) -> Draft:
            draft = chain(words, noise, lines)
            return Draft(f"{renamed(example)}\n{draft.text}", draft.prefix, draft.answers)

        for _ in range(samples):
            yield shrunk(build, size, step, HOPS + 1, frame)

    return draw


def solved_chain(words: tuple[str, str], noise: str, frame: Frame) -> str:
    """The example of ``vt``: a chain of short names in as much noise as 500 tokens hold, its answer and the end of a line."""
    small = Frame(frame.subtask, EXAMPLE_TOK, 0, "", "", frame.count_tok)

    def build(lines: int) -> Draft:
        return chain(words, noise, lines, EXAMPLE_LETTERS, EXAMPLE_VALUE)

    def measure(lines: int) -> int:
        return small.prompt_tok(build(lines))

    size = search(measure, EXAMPLE_STEP, most_of(measure, EXAMPLE_STEP, small), small)
    try:
        draft, _ = shrunk(build, size, EXAMPLE_STEP, HOPS + 1, small)
    except ConfigError as error:
        raise ConfigError(
            f"task.subtasks: {frame.subtask} needs a tokenizer for which {EXAMPLE_TOK} tokens hold the official solved example, at least "
            f"{EXAMPLE_STEP} lines of noise; this model's takes more, so leave the task out"
        ) from error
    return f"{draft.text}{draft.prefix} {' '.join(draft.answers)}\n"


def chain(words: tuple[str, str], noise: str, lines: int, letters: int = NAME_LETTERS, value: str | None = None) -> Draft:
    """``lines`` of noise and five assignments in order between them, the first of ``value`` or of a random number of five digits.

    If a name comes twice (two samples in a million) the official generator draws again, or stops: this one draws one name more.
    """
    names = [capitals(letters) for _ in range(HOPS + 1)]
    while len(set(names)) <= HOPS:
        names.append(capitals(letters))
    names = list(dict.fromkeys(names))
    value = value or str(np.random.randint(10000, 99999))
    assignments = [f"VAR {names[0]} = {value}", *(f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names))]
    text = [noise] * lines
    for number, at in enumerate(sorted(random.sample(range(lines), len(assignments)))):
        text.insert(at + number, assignments[number])
    task_text, prefix = (part.format(context="\n".join(text), query=value, num_v=len(names)) for part in words)
    return Draft(task_text, prefix, names)


def capitals(letters: int) -> str:
    """A random name."""
    return "".join(random.choices(string.ascii_uppercase, k=letters))


def renamed(example: str) -> str:
    """The example with other names, wherever they occur, and another value."""
    for name in example.split()[-HOPS - 1 :]:
        example = example.replace(name, capitals(len(name)))
    return example.replace(EXAMPLE_VALUE, str(np.random.randint(10000, 99999)))


@cache
def noise_line() -> str:
    """The noise of ``vt``, which lm_eval has in the code of its builder only: the line that is most frequent in a sample."""
    with undisturbed():
        text, _ = suite_module("ruler.vt_utils").generate_input_output(num_noises=9, num_chains=1, num_hops=0)
    return Counter(line.strip() for line in text.splitlines()).most_common(1)[0][0]


FAMILIES: dict[str, Callable[[RulerTask, Frame, int, Path], Draw]] = {"niah": niah, "qa": qa, "cwe": cwe, "fwe": fwe, "vt": vt}
