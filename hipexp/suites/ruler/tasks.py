"""The 13 tasks of RULER (arXiv 2404.06654) as data: settings, limits of new tokens and what each has to read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hipexp.config.schema import ConfigError

EDITION = "2025"  # of the generator: binary size search; that of 2024 made the published Llama-3.1 scores
SEED = 42  # of the official rows
SHORT_TOK = 4096  # below it the official generator takes smaller steps and smaller examples


@dataclass(frozen=True)
class RulerTask:
    """One task.

    ``family`` is what builds its samples, ``new_tok`` its limit of new tokens; ``needs`` names resources, see
    ``hipexp.suites.ruler.resources.SOURCES``.
    ``step`` is how many units (words, lines, needles, documents) a sample that does not fit loses at a time, ``short_step`` the same for
    targets below 4096 tokens. The rest is for needles: what they are hidden in, what kind of keys and values, how many of each, and
    how many keys are asked for.
    """

    family: str
    new_tok: int
    step: int
    short_step: int
    needs: tuple[str, ...] = ()
    haystack: str = ""
    keys: str = ""
    values: str = ""
    n_keys: int = 1
    n_values: int = 1
    n_asked: int = 1

    def step_at(self, length_tok: int) -> int:
        """Units to give up at a time for a target of ``length_tok``."""
        return self.short_step if length_tok < SHORT_TOK else self.step


def needle(haystack: str, values: str = "numbers", keys: str = "words", n_keys: int = 1, n_values: int = 1, n_asked: int = 1) -> RulerTask:
    """A needle task: ``haystack`` is ``repeat`` (one noise sentence), ``needle`` (nothing but needles) or ``essay``."""
    step, short_step, needs = (500, 500, ("essays",)) if haystack == "essay" else (25, 5, ())
    return RulerTask("niah", 128, step, short_step, needs, haystack, keys, values, n_keys, n_values, n_asked)


TASKS = {
    "niah_single_1": needle("repeat"),
    "niah_single_2": needle("essay"),
    "niah_single_3": needle("essay", "uuids"),
    "niah_multikey_1": needle("essay", n_keys=4),
    "niah_multikey_2": needle("needle"),
    "niah_multikey_3": needle("needle", "uuids", keys="uuids"),
    "niah_multivalue": needle("essay", n_values=4),
    "niah_multiquery": needle("essay", n_keys=4, n_asked=4),
    "vt": RulerTask("vt", 30, 10, 5),
    "cwe": RulerTask("cwe", 120, 10, 10),
    "fwe": RulerTask("fwe", 50, 1, 1),  # has a search of its own
    "qa_1": RulerTask("qa", 32, 10, 10, needs=("squad",)),
    "qa_2": RulerTask("qa", 32, 10, 10, needs=("hotpotqa",)),
}
SUBTASKS = tuple(TASKS)


def check_subtasks(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The tasks asked for, each once (all 13 if none is named), or ``ConfigError`` for a name that RULER does not have."""
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"task.subtasks: {name!r} is not a task of RULER; use some of {', '.join(SUBTASKS)}")
    return tuple(dict.fromkeys(names)) or SUBTASKS


def resources_of(subtasks: Iterable[str]) -> list[str]:
    """The resources that tasks read, sorted; last the second word list, which ``cwe`` reads if it is there and samples are long."""
    names = list(subtasks)
    return sorted({need for name in names for need in TASKS[name].needs}) + (["more_words"] if "cwe" in names else [])
