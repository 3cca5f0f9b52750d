"""Scores of ∞Bench's twelve tasks by the official rules (arXiv 2402.13718), in both editions of the official scorer, and by MInference's.

The published numbers were made with the edition of June 2024; that of August 2024 changed En.MC, En.Dia and Code.Debug. MInference scores
by its own copy of the first, with other rules for Retrieve.KV and Math.Find (edition ``minference``).
``passkey``, ``number_string``, ``kv_retrieval``, the option tasks and the mathematics need nothing but Python.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.lm_eval import VERSION, check_installed
from hipexp.suites.scoring.longbench import lm_metrics

OLD, NEW, MINFERENCE = EDITIONS = ("2024-06", "2024-08", "minference")
SCORER = (
    "hipexp-2: rules of OpenBMB/InfiniteBench 88b3daa (2024-06) and 51d9b37 (2024-08) and of microsoft/MInference 3581688 (minference), "
    f"functions of lm_eval {VERSION}"
)
DECIMALS = 2
METRICS = {
    "passkey": "first_number",
    "number_string": "first_number",
    "kv_retrieval": "value_among_words",
    "longbook_sum_eng": "rouge_lsum",
    "longbook_qa_eng": "f1",
    "longbook_choice_eng": "option",
    "longdialogue_qa_eng": "name",
    "longbook_qa_chn": "f1_characters",
    "code_debug": "option",
    "code_run": "last_word",
    "math_calc": "leading_values",
    "math_find": "first_number",
}
LISTS = {  # whose mean each paper prints
    "paper_12": tuple(METRICS),
    "minference_10": tuple(task for task in METRICS if task not in ("code_run", "math_calc")),
    "infllm_hip_7": (*tuple(METRICS)[:6], "math_find"),
}
LETTERS = {"longbook_choice_eng": "ABCD", "code_debug": "ABCDEFGHIJ"}
CHOICE_PHRASES = ("answer is:", "answer:", "answer is", "option is")
DEBUG_PHRASES = ("answer is:", "is:", "answer:", "correct option is:")
NUMBER = r"\d+\.\d+|\d+"


def score_infbench(
    subtask: str,
    prediction: str,
    references: Sequence[Any],
    edition: str = OLD,
    options: Sequence[str] | None = None,
    drop_first_number: bool = False,
) -> float:
    """0 to 100 for one output. ``references`` are the row's ``answer``; see :func:`labels_of` for their form and for ``options``.

    ``drop_first_number`` is what the official scorer does to Math.Calc for GPT-4, whose dialogue makes it repeat the first term.
    Raises ``ConfigError`` for an unknown task or edition, for references that do not fit, and where lm_eval is needed and missing.
    """
    if edition not in EDITIONS:
        raise ConfigError(f"edition={edition!r} is no edition of the scorer of infbench; use {' or '.join(EDITIONS)}")
    labels = labels_of(subtask, references, options)
    match subtask:
        case "passkey" | "number_string":
            score: float = first_number(prediction) == labels[0]
        case "kv_retrieval":
            score = has_value(prediction, labels[0], edition)
        case "longbook_sum_eng":
            score = max(rouge_scorer().score(label, prediction)["rougeLsum"].fmeasure for label in labels)
        case "longbook_qa_eng":
            score = max(lm_metrics().qa_f1_score(prediction, label) for label in labels)
        case "longbook_qa_chn":
            score = max(character_f1(prediction, label) for label in labels)
        case "longbook_choice_eng":
            score = is_choice(prediction, labels, edition)
        case "longdialogue_qa_eng":
            score = is_name(prediction, labels, edition)
        case "code_debug":
            score = is_faulty_function(prediction, labels, edition)
        case "code_run":
            score = ends_with(prediction, labels[0])
        case "math_calc":
            score = leading_share(prediction, labels, drop_first_number)
        case "math_find":
            score = is_number(prediction, labels[0], edition)
    return 100.0 * score


def first_number(text: str) -> str:
    """The first run of ASCII digits in ``text``, or the empty string."""
    found = re.search("[0-9]+", text)
    return found[0] if found else ""


def spaced(text: str, characters: str = "\n:\"'.,?!{}") -> str:
    """``text`` with a space in place of each of ``characters``."""
    return text.translate(dict.fromkeys(map(ord, characters), " "))


def has_value(prediction: str, label: Any, edition: str) -> bool:
    """Whether ``label`` is one of the words of the output. A label that is itself a list is a word in the new edition only."""
    if edition == MINFERENCE:
        prediction = re.sub("</s>|The|To", " ", spaced(prediction))
    if isinstance(label, list):
        return edition == NEW and label[0] in spaced(prediction).split()
    return label in spaced(prediction).split()


def character_f1(prediction: str, label: str) -> float:
    """F1 over the characters of two texts, without punctuation and white space."""
    metrics = lm_metrics()
    return float(metrics.f1_score(list(metrics.normalize_zh_answer(prediction)), list(metrics.normalize_zh_answer(label))))


@cache
def rouge_scorer() -> Any:
    """Rouge-Lsum, words as they are: lm_eval's own takes their stems, which the official scorer does not."""
    check_installed()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=False)


def last_letter(text: str, letters: str) -> str:
    """The last of ``letters`` that stands alone on the first line that has one, or the empty string."""
    for line in text.split("\n"):
        if found := re.findall(rf"\b[{letters}]\b", line):
            return found[-1]
    return ""


def follows_phrase(text: str, phrases: Sequence[str], label: Sequence[str]) -> bool | None:
    """Whether text or letter of ``label`` stands one character after the first of ``phrases`` that occurs; None if none does."""
    for phrase in phrases:
        at = text.find(phrase)
        if at >= 0:
            return text.startswith(tuple(label), at + len(phrase) + 1)
    return None


def is_choice(prediction: str, label: Sequence[str], edition: str) -> bool:
    """En.MC: whether the output chooses the option whose text and letter are ``label``."""
    text = prediction.strip()
    if edition == NEW and last_letter(text, "ABCD") in label:
        return True
    if not text:
        return False
    if text[0] in "ABCD":
        return text[0] in label
    if text in label:
        return True
    text = re.sub(" +", " ", spaced(text, "\n\"'.,?!{}"))
    found = follows_phrase(text, CHOICE_PHRASES, label)
    if found is not None:
        return found
    return next((word for word in text.split() if word in "ABCD"), "") in label  # "BC" is in it too, and wrong


def is_faulty_function(prediction: str, label: Sequence[str], edition: str) -> bool:
    """Code.Debug: whether the output chooses the function whose name and letter are ``label``."""
    text, letter = prediction.strip(), label[1]
    if edition != NEW and text[:2] in (f"{letter}.", f"{letter}:"):
        return True
    if edition == NEW and last_letter(text, LETTERS["code_debug"]) == letter:
        return True
    text = re.sub(" +", " ", re.sub("[\n`'\"*-]|Option|option", " ", text))
    if edition == NEW and text.startswith(tuple(label)):
        return True
    return bool(follows_phrase(text, DEBUG_PHRASES, label))


def is_name(prediction: str, labels: Sequence[str], edition: str) -> bool:
    """En.Dia: whether the output names the character, who may have several names."""
    if edition == NEW:
        return any(label.upper() in prediction.strip().upper() for label in labels)
    return labels[0] in spaced(prediction).upper().split()


def leading_share(prediction: str, labels: Sequence[int], drop_first_number: bool) -> float:
    """Math.Calc: how many of the values are right before the first wrong one, as a share of all. Signs are ignored."""
    found = re.findall("[0-9]+", prediction)[int(drop_first_number) :]
    right = ((digits.lstrip("0") or "0") == str(label) for digits, label in zip(found, labels, strict=False))
    return sum(itertools.takewhile(bool, right)) / len(labels)


def ends_with(prediction: str, label: int) -> bool:
    """Code.Run: whether the last word is ``label``. lm_eval takes control characters off before, which the official scorer does not."""
    words = spaced(prediction, "\n.`'\":").split()
    try:
        return bool(words) and int(words[-1]) == label
    except ValueError:
        return False


def is_number(prediction: str, label: int | float, edition: str) -> bool:
    """Math.Find: whether the first number is ``label``. Where the official scorer fails, on a fraction for a whole one, it is not.

    MInference's rounds the fraction down.
    """
    found = re.search(NUMBER, prediction)
    try:
        if found is not None and edition == MINFERENCE:
            return type(label)(float(found[0])) == label
        return found is not None and type(label)(found[0]) == label
    except (ValueError, OverflowError):
        return False


def labels_of(subtask: str, references: Sequence[Any], options: Sequence[str] | None = None) -> list[Any]:
    """``references`` in the form that the official scorer compares with. Raises ``ConfigError`` if they do not fit the task.

    An option task has the text and the letter of the right option, or its text alone and the row's ``options``. Numbers may be
    written as text, which they become where a table has columns of one type.
    """
    if subtask not in METRICS:
        raise ConfigError(f"subtask={subtask!r} is no task of ∞Bench; use one of {', '.join(METRICS)}")
    if subtask in LETTERS:
        return option_label(references, options, LETTERS[subtask])
    if subtask == "math_calc":
        values = references[0] if isinstance(references[0], list) and references[0] else references
        return [whole_number(value) for value in values]
    if subtask == "code_run":
        return [whole_number(references[0])]
    if subtask == "math_find":
        return [number_of(references[0])]
    for reference in references:
        text = reference[0] if subtask == "kv_retrieval" and isinstance(reference, list) and reference else reference
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"references holds {reference!r}, but {subtask} needs texts that are not empty")
    return list(references)


def option_label(references: Sequence[Any], options: Any, letters: str) -> list[str]:
    """Text and letter of the right option; of options with the same text the first. Raises ``ConfigError``."""
    if not all(isinstance(one, str) and one for one in references):
        raise ConfigError(f"references={references!r} must hold texts that are not empty")
    if len(references) == 2 and len(references[1]) == 1 and references[1] in letters:
        return list(references)
    if len(references) != 1:
        raise ConfigError(f"references={references!r} must be the text and the letter (one of {letters}) of the right option, or its text")
    if not isinstance(options, list) or references[0] not in options[: len(letters)]:
        raise ConfigError(f"options={options!r} must be the texts of all options, with {references[0]!r} from references among them")
    return [references[0], letters[options.index(references[0])]]


def number_of(value: Any) -> int | float:
    """A number, or what a text spells as one. Raises ``ConfigError`` for anything else."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,4000}", value):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+\.[0-9]+", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"references holds {value!r}, but it must be a number")
    return value


def whole_number(value: Any) -> int:
    """A whole number, or what a text spells as one. Raises ``ConfigError`` for anything else."""
    number = number_of(value)
    if not isinstance(number, int):
        raise ConfigError(f"references holds {value!r}, but it must be a whole number")
    return number


def check_row(row: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for a row that cannot be scored."""
    labels_of(row["subtask"], row["references"], row.get("options"))


def score_row(row: dict[str, Any], edition: str, drop_first_number: bool = False) -> float:
    """The score of a row, 0 to 100."""
    return score_infbench(row["subtask"], row["prediction"], row["references"], edition, row.get("options"), drop_first_number)


def grouped(row: dict[str, Any], score: float) -> dict[str, float]:
    """A row's score, under the name of its task."""
    return {row["subtask"]: score}


def metric_of(name: str) -> str:
    """The metric behind a score."""
    return METRICS[name]


def averages(scores: dict[str, float]) -> dict[str, float]:
    """Plain means over the tasks of each list that is complete."""
    return {
        name: sum(scores[task] for task in tasks) / len(tasks) for name, tasks in LISTS.items() if all(task in scores for task in tasks)
    }
