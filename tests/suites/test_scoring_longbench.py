import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.suites.scoring import score_rows
from hipexp.suites.scoring.longbench import (
    BUCKETS,
    CATEGORIES,
    CHINESE,
    ENGLISH_CATEGORIES,
    IN_E,
    METRICS,
    averages,
    category_means,
    code_similarity,
    relative_scores,
    score_longbench,
)

needs_lm_eval = pytest.mark.usefixtures("lm_eval")
CLASSES = ["City", "Country", "Mountain", "Other location"]
WORDS = st.lists(st.sampled_from(["the", "old", "house", "3", "北京", "大学", "x.y", "Paragraph 3", "段落3"]), min_size=1, max_size=6).map(
    " ".join
)
REFERENCE = {"class": "City", "count": "3", "paragraph": "Paragraph 3", "paragraph_zh": "段落3"}
# Table 1 of InfiniteHiP (arXiv 2502.08910), Llama-3-8B-Instruct: 16 tasks, their mean, and the mean relative to the best method.
COLUMNS = (
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum"),
    *("multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "repobench-p", "lcc"),
)
TABLE_1 = {
    "FA2": ([19.9, 42.4, 41.0, 47.4, 39.2, 23.0, 29.9, 21.4, 27.5, 74.0, 90.5, 42.3, 8.5, 62.5, 49.1, 60.8], 42.47, 87.69),
    "LM-Infinite": ([19.4, 42.8, 40.4, 43.8, 37.9, 18.3, 29.3, 21.4, 27.6, 74.0, 90.1, 41.7, 4.5, 50.0, 48.6, 60.1], 40.62, 83.23),
    "StreamingLLM": ([20.1, 42.5, 39.5, 43.7, 37.9, 19.7, 29.2, 21.3, 27.6, 73.5, 90.1, 41.5, 5.0, 49.0, 49.0, 60.4], 40.61, 83.21),
    "InfLLM": ([22.6, 43.7, 49.0, 49.0, 35.6, 26.1, 30.8, 22.7, 27.6, 73.5, 90.9, 42.4, 7.2, 84.0, 46.5, 59.9], 44.47, 92.83),
    "InfiniteHiP": ([26.6, 43.2, 50.3, 51.9, 41.0, 30.9, 31.7, 23.3, 26.9, 75.5, 90.3, 43.0, 7.5, 93.5, 64.8, 63.1], 47.72, 100.0),
}


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


def row(subtask, prediction, references, **more):
    return {"subtask": subtask, "prediction": prediction, "references": references, **more}


def test_there_are_21_tasks_in_six_categories():
    tasks = [task for names in CATEGORIES.values() for task in names]
    assert sorted(tasks) == sorted(METRICS)
    assert (len(tasks), len(CATEGORIES), len(CHINESE), len(IN_E)) == (21, 6, 5, 13)
    assert sorted(COLUMNS) == sorted(task for names in ENGLISH_CATEGORIES.values() for task in names)


@needs_lm_eval
@pytest.mark.parametrize(
    ("subtask", "prediction", "references", "score"),
    [
        ("hotpotqa", "in Paris", ["Paris"], 200 / 3),
        ("hotpotqa", "The Paris!", ["Rome", "paris"], 100),
        ("narrativeqa", "Rome", ["Paris"], 0),
        ("multifieldqa_zh", "北京。", ["北京"], 100),
        ("multifieldqa_zh", "在 北京", ["北京"], 200 / 3),
        ("gov_report", "the cat sat", ["the cat ran"], 200 / 3),
        ("vcsum", "我们 喜欢 北京", ["我们 喜欢 上海"], 200 / 3),
        ("trec", "City", ["City"], 100),
        ("trec", "City and Country", ["City"], 50),
        ("trec", "Village", ["City"], 0),
        ("passage_count", "3 or 4", ["3"], 50),
        ("passage_count", "three", ["3"], 0),
        ("passage_retrieval_en", "Paragraph 3", ["Paragraph 3"], 100),
        ("passage_retrieval_en", "3, 12, 30", ["Paragraph 3"], 100 / 3),
        ("passage_retrieval_zh", "段落3", ["段落3"], 100),
        ("lcc", "abcd", ["abce"], 75),
        ("repobench-p", "abc", ["abd"], 67),
    ],
)
def test_scores_by_hand(subtask, prediction, references, score):
    assert score_longbench(subtask, prediction, references, CLASSES) == pytest.approx(score, abs=1e-5)


@needs_lm_eval
@pytest.mark.parametrize("subtask", METRICS)
def test_a_reference_scores_100_and_an_empty_output_0(subtask):
    reference = REFERENCE.get(METRICS[subtask], "return the old house")
    assert score_longbench(subtask, reference, [reference], CLASSES) == pytest.approx(100, abs=1e-4)
    for empty in ("", "\n\n"):
        assert score_longbench(subtask, empty, [reference], CLASSES) == 0


@needs_lm_eval
@pytest.mark.parametrize("subtask", METRICS)
@given(prediction=st.one_of(st.text(max_size=40), WORDS), others=st.lists(WORDS, max_size=3))
@settings(max_examples=30, deadline=None)
def test_scores_stay_in_bounds_and_the_best_reference_counts(subtask, prediction, others):
    suffix = REFERENCE.get(METRICS[subtask], "end")
    references = [suffix, *(f"{other} {suffix}" for other in others)]
    score = score_longbench(subtask, prediction, references, CLASSES)
    assert 0 <= score <= 100 + 1e-9
    assert score == score_longbench(subtask, prediction, references[::-1], CLASSES)
    assert score == max(score_longbench(subtask, prediction, [one], CLASSES) for one in references)


@needs_lm_eval
@pytest.mark.parametrize("subtask", METRICS)
def test_long_outputs_do_no_harm(subtask):
    reference = REFERENCE.get(METRICS[subtask], "the old house")
    for noise in ("the house. " * 3000, "3" * 20_000, "北京。" * 3000, "x = 1\n" * 3000):
        assert 0 <= score_longbench(subtask, noise, [reference], CLASSES) <= 100 + 1e-9


@needs_lm_eval
def test_trap_classes_inside_the_answer_can_survive():
    # The list is walked over while items are removed from it: "b" after "a" is passed over.
    assert score_longbench("trec", "abc", ["abc"], ["a", "b", "abc"]) == 50
    assert score_longbench("trec", "abc", ["abc"], ["a", "abc"]) == 100


@needs_lm_eval
@pytest.mark.parametrize("subtask", ["gov_report", "dureader"])
def test_trap_rouge_of_punctuation_is_0(subtask):
    for prediction in ("", "...", ". . .", "。"):
        assert score_longbench(subtask, prediction, ["a b c"]) == 0


@needs_lm_eval
def test_trap_rouge_of_a_very_long_sentence_is_0():
    # The library looks for common words by recursion, once per word; the official scorer counts its failure as 0.
    sentence = " ".join(map(str, range(1100)))
    assert score_longbench("gov_report", sentence, [sentence]) == 0
    assert score_longbench("gov_report", sentence.replace(" 500 ", ". 500 "), [sentence.replace(" 500 ", ". 500 ")]) > 99
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)  # as libraries do
    try:
        assert score_longbench("gov_report", sentence, [sentence]) == 0 and sys.getrecursionlimit() == 50_000
    finally:
        sys.setrecursionlimit(limit)


@needs_lm_eval
@pytest.mark.parametrize(
    ("subtask", "cut"),
    [(task, task in ("trec", "triviaqa", "samsum", "lsht")) for task in METRICS if METRICS[task] in ("f1", "rouge_l", "class")],
)
def test_four_tasks_look_at_the_first_line_only(subtask, cut):
    score = score_longbench(subtask, "\n\nCity\nCountry", ["City"], CLASSES)
    assert (score > 99) == cut
    assert (score_longbench(subtask, " \nCity", ["City"], CLASSES) == 0) == cut  # only newlines are taken off


def test_trap_an_empty_line_of_code_counts():
    assert code_similarity("\n\nreturn x", "return x") == 100  # newlines in front are taken off
    assert code_similarity(" \nreturn x", "return x") == round(100 * 2 / 9)
    assert code_similarity("# hm\n\nreturn x", "return x") == 0
    assert code_similarity("```python\n# hm\n// hm\nreturn x\n", "return x") == 100
    assert code_similarity("# hm", "return x") == 0


def test_trap_code_similarity_is_that_of_difflib():
    assert code_similarity("1a2b3c4XY", "XY1234") == 27  # with python-Levenshtein it would be 53
    assert code_similarity("ab" * 150, "ab" * 150) == 100
    assert code_similarity("x" + "ab" * 150, "ab" * 150) == 0  # it leaves out what a long reference has often
    assert code_similarity("x", "") == 0


@given(code=st.text(st.characters(exclude_characters="`#/\n"), min_size=1))
def test_a_line_of_code_is_like_itself(code):
    assert code_similarity(code, code) == 100
    assert code_similarity(f"\n{code}\nmore", code) == 100


def test_trap_buckets_of_longbench_e_and_no_number_for_an_empty_one():
    rows = [row("lcc_e", "x", ["x" if length < 4000 else "y"], length=length) for length in (0, 3999, 4000, 7999)]
    scored = score_rows("longbench", [*rows, row("lcc", "x", ["x"])])
    found = {name: (entry["score"], entry["n"]) for name, entry in scored["scores"].items()}
    assert found == {"lcc_e@0-4k": (100.0, 2), "lcc_e@4-8k": (0.0, 2), "lcc": (100.0, 1)}
    assert score_rows("longbench", [row("lcc_e", "x", ["x"], length=8000)])["scores"]["lcc_e@8k+"]["n"] == 1
    assert scored["scores"]["lcc_e@0-4k"]["metric"] == "edit_similarity"


def test_averages_need_all_their_tasks():
    scores = {task: float(number) for number, task in enumerate(METRICS)}
    found = averages(scores)
    assert found["code"] == found["english_code"] == (scores["lcc"] + scores["repobench-p"]) / 2
    assert found["summary"] == sum(scores[task] for task in CATEGORIES["summary"]) / 4
    assert found["6_categories"] == pytest.approx(sum(found[name] for name in CATEGORIES) / 6)
    assert found["english_6_categories"] == pytest.approx(sum(found[f"english_{name}"] for name in CATEGORIES) / 6)
    assert found["english_16_tasks"] == pytest.approx(sum(scores[task] for task in COLUMNS) / 16)
    without = averages({task: score for task, score in scores.items() if task != "vcsum"})
    assert set(found) - set(without) == {"summary", "6_categories"}
    without = averages({task: score for task, score in scores.items() if task != "qmsum"})
    assert set(found) - set(without) == {"summary", "6_categories", "english_summary", "english_6_categories", "english_16_tasks"}
    assert averages({}) == {}


def test_means_of_longbench_e_are_there_for_complete_buckets():
    scores = {f"{task}_e@{bucket}": 10.0 * i for i, bucket in enumerate(BUCKETS) for task in IN_E}
    del scores["trec_e@8k+"]
    assert averages(scores) == {"e_13_tasks@0-4k": 0.0, "e_13_tasks@4-8k": 10.0}


def test_means_and_relative_scores_are_those_of_the_paper():
    methods = {}
    for name, (values, mean, _) in TABLE_1.items():
        scores = dict(zip(COLUMNS, values, strict=True))
        assert averages(scores)["english_16_tasks"] == pytest.approx(mean, abs=0.02)
        methods[name] = category_means(scores, ENGLISH_CATEGORIES)
    for name, relative in relative_scores(methods).items():
        assert relative == pytest.approx(TABLE_1[name][2], abs=0.07)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": {"code": 1.0}, "b": {"code": 1.0, "summary": 2.0}}, "a lacks summary"),
        ({"a": {}}, "a lacks all"),
        ({"a": {"code": 0.0}, "b": {"code": 0.0}}, "in code it is 0"),
        ({"a": {"code": math.nan}}, "in code it is nan"),
    ],
)
def test_relative_scores_of_unlike_things_are_refused(methods, message):
    with pytest.raises(ConfigError, match=message):
        relative_scores(methods)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("quality", "x", ["x"]), "no task of LongBench; use one of narrativeqa"),
        (row("narrativeqa_e", "x", ["x"]), "no task of LongBench"),
        (row("qasper", "x", [3]), "must be a text"),
        (row("trec", "x", ["x"]), "all_classes=None"),
        (row("lsht", "x", ["x"], all_classes=[]), r"all_classes=\[\]"),
        (row("trec_e", "x", ["x"], all_classes=["a", 1], length=3), "all_classes"),
        (row("passage_retrieval_en", "3", ["3"]), "number of a paragraph"),
        (row("passage_retrieval_zh", "3", ["Paragraph 3"]), "number of a paragraph"),
        (row("qasper_e", "x", ["x"]), "length=None"),
        (row("qasper_e", "x", ["x"], length="4000"), "length='4000'"),
        (row("qasper_e", "x", ["x"], length=math.nan), "length=nan"),
        (row("qasper_e", "x", ["x"], length=-1), "length=-1"),
    ],
)
def test_bad_rows_get_no_score(bad, message):
    with pytest.raises(ConfigError, match=message):
        score_rows("longbench", [bad])
