"""Scores of LongBench's 21 tasks and of LongBench-E by the official rules (arXiv 2308.14508), with the metric functions of lm_eval."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import SequenceMatcher
from functools import cache
from types import ModuleType
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.lm_eval import VERSION, suite_module

EDITIONS = ("2025-01",)
SCORER = f"hipexp-1: rules of THUDM/LongBench 2e00731, functions of lm_eval {VERSION}, code similarity by difflib"
DECIMALS = 2
CATEGORIES = {
    "single_document_qa": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi_document_qa": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summary": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few_shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
ENGLISH_CATEGORIES = {name: tuple(task for task in tasks if task not in CHINESE) for name, tasks in CATEGORIES.items()}
METRICS = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), "f1"),
    "multifieldqa_zh": "f1_zh",
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge_l"),
    **dict.fromkeys(("dureader", "vcsum"), "rouge_l_zh"),
    **dict.fromkeys(("trec", "lsht"), "class"),
    "passage_count": "count",
    "passage_retrieval_en": "paragraph",
    "passage_retrieval_zh": "paragraph_zh",
    **dict.fromkeys(("lcc", "repobench-p"), "edit_similarity"),
}
RECURSION = 1000  # calls within each other, as Python has it
FUNCTIONS = {  # in lm_eval.tasks.longbench.metrics; its code_sim_score skips empty lines, which the official one does not
    "f1": "qa_f1_score",
    "f1_zh": "qa_f1_zh_score",
    "rouge_l": "rouge_score",
    "rouge_l_zh": "rouge_zh_score",
    "class": "classification_score",
    "count": "count_score",
    "paragraph": "retrieval_score",
    "paragraph_zh": "retrieval_zh_score",
}
PARAGRAPHS = {"paragraph": r"Paragraph \d+", "paragraph_zh": r"段落\d+"}  # what a reference must hold, or its function fails
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
IN_E = tuple(task for tasks in ENGLISH_CATEGORIES.values() for task in tasks if task not in ("narrativeqa", "musique", "qmsum"))
BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": math.inf}  # of LongBench-E: words below which a row belongs to it


@cache
def lm_metrics() -> ModuleType:
    """The metric functions of lm_eval. Raises ``ConfigError`` where it is not installed."""
    module = suite_module("longbench.metrics")
    logging.getLogger("jieba").setLevel(logging.WARNING)  # it tells how it loads its dictionary
    return module


def task_of(subtask: str) -> str:
    """The task behind a name: ``qasper_e`` is ``qasper`` in LongBench-E."""
    task = subtask.removesuffix("_e")
    return task if task in IN_E else subtask


def score_longbench(subtask: str, prediction: str, references: Sequence[str], all_classes: Sequence[str] | None = None) -> float:
    """0 to 100: the best over ``references``. ``all_classes`` are the names of all classes, needed by ``trec`` and ``lsht``."""
    task = task_of(subtask)
    metric = METRICS[task]
    if metric == "edit_similarity":
        return max(code_similarity(prediction, reference) for reference in references)
    if task in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    measure = getattr(lm_metrics(), FUNCTIONS[metric])

    def best() -> float:
        return max(measure(prediction, reference, all_classes=all_classes) for reference in references)

    return 100.0 * (on_an_empty_stack(best) if metric.startswith("rouge") else best())


def on_an_empty_stack(call: Callable[[], float]) -> float:
    """What ``call`` returns in a thread of its own: ``rouge`` recurses word by word, and gives up at a depth counted from the thread.

    That is Python's own limit, under which the official scorer ran; libraries raise it (``torch`` does, once something is compiled).
    """

    def limited() -> float:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(RECURSION)
        try:
            return call()
        finally:
            sys.setrecursionlimit(limit)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(limited).result()


def code_similarity(prediction: str, reference: str) -> float:
    """Edit similarity in whole percent between ``reference`` and the first line of the output that is neither comment nor markup.

    The ratio is that of ``difflib``, which the official scorer comes to without python-Levenshtein. An empty line counts as code.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return float(round(100 * SequenceMatcher(None, code, reference).ratio()))


def check_row(row: dict[str, Any]) -> None:
    """Raise ``ConfigError`` for a row that cannot be scored."""
    task = task_of(row["subtask"])
    if task not in METRICS:
        names = ", ".join(METRICS)
        raise ConfigError(f"subtask={row['subtask']!r} is no task of LongBench; use one of {names}, or <task>_e of {', '.join(IN_E)}")
    for reference in row["references"]:
        if not isinstance(reference, str):
            raise ConfigError(f"references holds {reference!r}, but each must be a text")
        pattern = PARAGRAPHS.get(METRICS[task], "")
        if not re.search(pattern, reference):
            raise ConfigError(f"references holds {reference!r}, but {task} needs the number of a paragraph, as in {pattern}")
    if METRICS[task] == "class":
        check_classes(row.get("all_classes"))
    if row["subtask"] != task:
        check_length(row.get("length"))


def check_classes(names: Any) -> None:
    """Raise ``ConfigError`` unless these are names of classes."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"all_classes={names!r} must be the list of all class names")


def check_length(length: Any) -> None:
    """Raise ``ConfigError`` unless this is a number of words."""
    if isinstance(length, bool) or not isinstance(length, int | float) or not 0 <= length < math.inf:
        raise ConfigError(f"length={length!r} must be the number of words in the context, by which LongBench-E sorts its rows")


def score_row(row: dict[str, Any], edition: str) -> float:
    """The score of a row, 0 to 100."""
    return score_longbench(row["subtask"], row["prediction"], row["references"], row.get("all_classes"))


def grouped(row: dict[str, Any], score: float) -> dict[str, float]:
    """A row's score, under the name of its task; in LongBench-E under the task and the bucket of its ``length``."""
    if row["subtask"] == task_of(row["subtask"]):
        return {row["subtask"]: score}
    return {f"{row['subtask']}@{next(name for name, below in BUCKETS.items() if row['length'] < below)}": score}


def metric_of(name: str) -> str:
    """The metric behind a score."""
    return METRICS[task_of(name.partition("@")[0])]


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Means over categories, over the six categories, over the 16 English tasks, and over the 13 of LongBench-E per bucket.

    Each is there only if all its tasks are. The English ones leave the Chinese tasks of a category out.
    """
    found: dict[str, float] = {}
    for prefix, categories in (("", CATEGORIES), ("english_", ENGLISH_CATEGORIES)):
        means = category_means(scores, categories)
        found |= {prefix + name: mean for name, mean in means.items()}
        found |= complete_mean(f"{prefix}6_categories", means, tuple(categories))
    found |= complete_mean("english_16_tasks", scores, tuple(task for tasks in ENGLISH_CATEGORIES.values() for task in tasks))
    for bucket in BUCKETS:
        found |= complete_mean(f"e_13_tasks@{bucket}", scores, tuple(f"{task}_e@{bucket}" for task in IN_E))
    return found


def category_means(scores: Mapping[str, float], categories: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """The mean over the tasks of each category of which all tasks are there."""
    found: dict[str, float] = {}
    for name, tasks in categories.items():
        found |= complete_mean(name, scores, tasks)
    return found


def complete_mean(name: str, scores: Mapping[str, float], parts: tuple[str, ...]) -> dict[str, float]:
    """The mean over ``parts`` by its name, or nothing if one of them is missing."""
    return {name: sum(scores[part] for part in parts) / len(parts)} if all(part in scores for part in parts) else {}


def relative_scores(methods: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How near each method comes to the best, in percent: its category means by the best of each category, averaged.

    ``methods`` are the category means of several methods on one model, the same categories for all (:func:`category_means` with
    ``ENGLISH_CATEGORIES`` in the paper). Table 1 of InfiniteHiP (arXiv 2502.08910) prints this as "relative".
    Raises ``ConfigError`` for categories that differ, and where the best of one is 0.
    """
    categories = set().union(*methods.values())
    for method, means in methods.items():
        if not categories or set(means) != categories:
            missing = ", ".join(sorted(categories - set(means))) or "all"
            raise ConfigError(f"relative scores need the same categories for all methods; {method} lacks {missing}")
    best = {name: max(means[name] for means in methods.values()) for name in sorted(categories)}
    for name, score in best.items():
        if not score > 0:
            raise ConfigError(f"relative scores need a best score above 0, but in {name} it is {score}")
    return {method: 100.0 * sum(means[name] / best[name] for name in best) / len(best) for method, means in methods.items()}
