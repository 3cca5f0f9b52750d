import importlib.util
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.suites import infbench as generated
from hipexp.suites.scoring import score_rows
from hipexp.suites.scoring.infbench import EDITIONS, LISTS, METRICS, MINFERENCE, NEW, OLD, averages, labels_of, score_infbench

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
BY_LM_EVAL = ("longbook_sum_eng", "longbook_qa_eng", "longbook_qa_chn")
CHANGED = ("longbook_choice_eng", "code_debug", "longdialogue_qa_eng")  # by the edition of August 2024
WITHOUT = [task for task in METRICS if task not in BY_LM_EVAL]
TASKS = [pytest.param(task, marks=needs_lm_eval if task in BY_LM_EVAL else ()) for task in METRICS]
# A right output and its label for each task; in both editions, as the property tests need it.
RIGHT = {
    "passkey": ("71432", ["71432"]),
    "number_string": ("0011222333", ["0011222333"]),
    "kv_retrieval": ("cb59052b-9128-4979-9c0e-e1de4adcf73b", ["cb59052b-9128-4979-9c0e-e1de4adcf73b"]),
    "longbook_sum_eng": ("A man comes home.\nNobody knows him.", ["A man comes home.\nNobody knows him."]),
    "longbook_qa_eng": ("the old lighthouse", ["the old lighthouse"]),
    "longbook_choice_eng": ("C", ["Under the bridge", "C"]),
    "longdialogue_qa_eng": ("MIRANDA", ["MIRANDA"]),
    "longbook_qa_chn": ("老灯塔", ["老灯塔"]),
    "code_debug": ("B.", ["parse_header", "B"]),
    "code_run": ("-17", [-17]),
    "math_calc": ("[3, 10, 4]", [3, 10, 4]),
    "math_find": ("42", [42]),
}


def old(*case):
    return score_infbench(*case, edition=OLD)


def new(*case):
    return score_infbench(*case, edition=NEW)


def row(subtask, prediction, references, **more):
    return {"subtask": subtask, "prediction": prediction, "references": references, **more}


@pytest.mark.parametrize("subtask", TASKS)
@pytest.mark.parametrize("edition", EDITIONS)
def test_a_right_output_scores_100_and_an_empty_one_0(subtask, edition):
    prediction, references = RIGHT[subtask]
    assert score_infbench(subtask, prediction, references, edition) == pytest.approx(100)
    for empty in ("", " \n", "\n\n\n"):
        assert score_infbench(subtask, empty, references, edition) == 0


@pytest.mark.parametrize("subtask", TASKS)
@given(prediction=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_scores_stay_in_bounds_in_both_editions(subtask, prediction):
    for edition in EDITIONS:
        assert 0 <= score_infbench(subtask, prediction, RIGHT[subtask][1], edition) <= 100


@pytest.mark.parametrize("subtask", TASKS)
def test_long_outputs_do_no_harm(subtask):
    for noise in ("A B C D " * 20_000, "9" * 50_000, "词" * 50_000, "x\n" * 2_000):
        for edition in EDITIONS:
            assert 0 <= score_infbench(subtask, noise, RIGHT[subtask][1], edition) <= 100


@pytest.mark.parametrize(
    ("subtask", "prediction", "reference"),
    [
        ("passkey", " 71432.", "71432"),
        ("passkey", "key 11111, or 71432", "71432"),
        ("passkey", " 714321", "71432"),
        ("passkey", "٧١٤٣٢", "71432"),
        ("passkey", "", "71432"),
        ("number_string", "0012345678 it is", "0012345678"),
        ("number_string", "12345678", "0012345678"),
        ("kv_retrieval", 'It is "abc-1".', "abc-1"),
        ("kv_retrieval", "abc-12", "abc-1"),
        ("kv_retrieval", "{abc-1}", "abc-1"),
        ("kv_retrieval", "(abc-1)", "abc-1"),
    ],
)
def test_retrieval_is_scored_as_for_generated_samples(subtask, prediction, reference):
    assert old(subtask, prediction, [reference]) == new(subtask, prediction, [reference])
    assert old(subtask, prediction, [reference]) == generated.score(subtask, prediction, [reference])


@pytest.mark.parametrize("subtask", generated.SUBTASKS)
@given(prediction=st.text(st.sampled_from("0123456789ab-\n:\"'.,?!{} "), max_size=20), reference=st.text("12a", min_size=1, max_size=3))
def test_retrieval_agrees_with_generated_samples_on_any_output(subtask, prediction, reference):
    assert old(subtask, prediction, [reference]) == generated.score(subtask, prediction, [reference])


def test_retrieval_needs_no_other_package():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['lm_eval', 'rouge_score', 'jieba', 'rouge', 'nltk']))"
    works = "; ".join(f"assert score_infbench({task!r}, {RIGHT[task][0]!r}, {RIGHT[task][1]!r}) == 100" for task in WITHOUT)
    script = f"{blocked}; from hipexp.suites.scoring.infbench import score_infbench; {works}"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_trap_a_list_as_label_is_no_word_in_the_old_edition():
    assert old("kv_retrieval", "abc-1", [["abc-1"]]) == 0
    assert new("kv_retrieval", "abc-1", [["abc-1"]]) == 100
    assert old("kv_retrieval", "abc-1", ["abc-1"]) == 100


@pytest.mark.parametrize(
    ("prediction", "in_old", "in_new"),
    [
        ("B", True, True),
        ("Under the tree", True, True),
        ("Because he is late", True, True),  # the first character decides, even inside a word
        ("Back under the tree", True, True),
        ("Actually B", False, True),  # A decides; the new edition looks for a letter alone first
        ("A or B", False, True),
        ("B or A", True, True),  # the last letter is wrong, so the old rule goes on
        ("The answer is: B", True, True),
        ("My answer is: Under the tree", True, True),
        ("My answer: Under the tree", True, True),
        ("My answer: B. No, an answer is A", True, True),  # the phrases have an order of their own
        ("My answer is:B", False, True),  # one character after the phrase is left out
        ("The answer is:", False, False),
        ("The answer is \nB", True, True),
        ("no answer: Under it", False, False),
        ("I think option is B", True, True),
        ("It is (B)", False, True),
        ("It is B, not C", True, True),  # first word among A to D; the last letter is wrong
        ("It is C, not B", False, True),
        ("maybe {B}", True, True),
        ("nothing", False, False),
    ],
)
def test_choices_in_both_editions(prediction, in_old, in_new):
    label = ["Under the tree", "B"]
    assert old("longbook_choice_eng", prediction, label) == 100 * in_old
    assert new("longbook_choice_eng", prediction, label) == 100 * in_new


def test_trap_a_first_character_decides_even_inside_a_word():
    assert old("longbook_choice_eng", "Because he fell", ["He fell", "B"]) == 100
    assert old("longbook_choice_eng", "Because he fell", ["Because he fell", "C"]) == 0


def test_trap_a_word_of_two_letters_is_taken_as_the_answer_and_is_wrong():
    assert old("longbook_choice_eng", "say BC or B", ["x y", "B"]) == 0
    assert old("longbook_choice_eng", "say BD or B", ["x y", "B"]) == 100  # "BD" is no part of "ABCD"


def test_trap_letters_are_sought_on_the_first_line_that_has_one():
    for task, label in (("longbook_choice_eng", ["x y", "B"]), ("code_debug", ["run", "B"])):
        assert new(task, "(hm)\n\n say B\n or A", label) == 100
        assert new(task, "say A\n or B", label) == 0
        assert new(task, "say A, no B", label) == 100
        assert new(task, "say _B_ or 1B", label) == 0  # not alone


def test_trap_i_is_a_letter_in_code_debug():
    assert new("code_debug", "B, I think", ["run", "B"]) == 100  # by the start of the output
    assert new("code_debug", "say B, I think", ["run", "B"]) == 0
    assert new("longbook_choice_eng", "say B, I think", ["x y", "B"]) == 100
    assert new("code_debug", "I think", ["run", "I"]) == 100


@pytest.mark.parametrize(
    ("prediction", "in_old", "in_new"),
    [
        ("B.", True, True),
        ("B: parse_header", True, True),
        ("B", False, True),
        ("B) parse_header", False, True),
        ("parse_header", False, True),
        ("parse_header is broken", False, True),
        ("`parse_header`", False, False),  # the space in place of the backquote stays in front
        ("The error is in B", False, True),
        ("The answer is: B", True, True),
        ("The function is: `parse_header`", True, True),
        ("The function is:parse_header", False, False),  # one character after the phrase is left out
        ("The correct option is: B", True, True),
        ("The correct option is: Option B", True, True),
        ("It is: A", False, False),
        ("A or B", False, True),
        ("C", False, False),
    ],
)
def test_faulty_functions_in_both_editions(prediction, in_old, in_new):
    label = ["parse_header", "B"]
    assert old("code_debug", prediction, label) == 100 * in_old
    assert new("code_debug", prediction, label) == 100 * in_new


@pytest.mark.parametrize(
    ("prediction", "labels", "in_old", "in_new"),
    [
        ("miranda", ["MIRANDA"], True, True),
        ("It is 'Miranda'.", ["MIRANDA"], True, True),
        ("Mirandas", ["MIRANDA"], False, True),
        ("Miranda Bell", ["MIRANDA BELL"], False, True),  # a name of two words is no word
        ("Bell", ["MIRANDA", "BELL"], False, True),  # only the first label counts
        ("Miranda", ["Miranda"], False, True),  # only the output is put in capitals
        ("the butler", ["MIRANDA"], False, False),
    ],
)
def test_names_in_both_editions(prediction, labels, in_old, in_new):
    assert old("longdialogue_qa_eng", prediction, labels) == 100 * in_old
    assert new("longdialogue_qa_eng", prediction, labels) == 100 * in_new


def test_the_edition_of_june_2024_is_the_default():
    for task, prediction, labels in (
        ("longbook_choice_eng", "It is (B)", ["x y", "B"]),
        ("code_debug", "B", ["run", "B"]),
        ("longdialogue_qa_eng", "Bell", ["MIRANDA", "BELL"]),
    ):
        assert score_infbench(task, prediction, labels) == old(task, prediction, labels) == 0
        scored = [score_rows("infbench", [row(task, prediction, labels)], edition) for edition in (None, NEW)]
        assert [one["edition"] for one in scored] == [OLD, NEW]
        assert [one["scores"][task]["score"] for one in scored] == [0.0, 100.0]


@pytest.mark.parametrize("subtask", [one for one in TASKS if one.values[0] not in CHANGED])
@given(prediction=st.text(st.sampled_from("ABCDEI 0123456789.,:\n*-"), max_size=30))
@settings(max_examples=40, deadline=None)
def test_editions_agree_on_all_other_tasks(subtask, prediction):
    references = RIGHT[subtask][1]
    assert old(subtask, prediction, references) == new(subtask, prediction, references)


def test_trap_a_fraction_for_a_whole_number_scores_0():
    assert old("math_find", "5.0", [5]) == 0
    assert old("math_find", "5", [5]) == 100
    assert old("math_find", "5", [5.0]) == 100
    assert old("math_find", "about 3.50, or 3", [3.5]) == 100
    assert old("math_find", "-5", [5]) == 100
    assert old("math_find", "none", [5]) == 0


def test_minference_differs_from_the_first_edition_in_two_tasks():
    def theirs(*case):
        return score_infbench(*case, edition=MINFERENCE)

    assert theirs("math_find", "5.7", [5]) == theirs("math_find", "5.0", [5]) == theirs("math_find", "5", [5]) == 100
    assert theirs("math_find", "5.7", [5.5]) == theirs("math_find", "none", [5]) == 0
    assert theirs("math_find", "9" * 400, [5.5]) == 0
    for said in ("Theabc-1", "abc-1</s>", "Toabc-1."):
        assert theirs("kv_retrieval", said, ["abc-1"]) == 100 and old("kv_retrieval", said, ["abc-1"]) == 0
    assert theirs("kv_retrieval", "the abc-12", ["abc-1"]) == 0
    assert theirs("code_debug", "B", ["run", "B"]) == 0 and theirs("code_debug", "B.", ["run", "B"]) == 100  # as in the first edition
    assert theirs("longdialogue_qa_eng", "Miranda Bell", ["MIRANDA BELL"]) == 0


@pytest.mark.parametrize("subtask", [one for one in TASKS if one.values[0] not in ("kv_retrieval", "math_find")])
@given(prediction=st.text(st.sampled_from("ABCDEI 0123456789.,:\n*-"), max_size=30))
@settings(max_examples=40, deadline=None)
def test_minference_agrees_with_the_first_edition_on_all_other_tasks(subtask, prediction):
    references = RIGHT[subtask][1]
    assert old(subtask, prediction, references) == score_infbench(subtask, prediction, references, MINFERENCE)


def test_trap_numbers_as_text_are_turned_back():
    assert old("math_find", "34", ["34"]) == 100
    assert old("math_find", "34.0", ["34"]) == 0
    assert old("math_find", "34.5", ["34.5"]) == 100
    assert old("math_calc", "[3, 10]", ["3", "10"]) == 100
    assert labels_of("code_run", ["-12"]) == [-12]


def test_code_run_takes_the_last_word():
    assert old("code_run", "func_1(3) returns -17.", [-17]) == 100
    assert old("code_run", "func_1(3) returns -17.", ["-17"]) == 100
    assert old("code_run", "-17 it is", [-17]) == 0
    assert old("code_run", "17", [-17]) == 0
    assert old("code_run", "", [0]) == old("code_run", "...", [0]) == old("code_run", "3x", [3]) == 0
    assert old("code_run", "-17\x00", [-17]) == 0  # part of the word, and lm_eval takes it off


def test_trap_math_calc_ignores_signs_and_stops_at_the_first_wrong_value():
    assert old("math_calc", "[3, 10, 4, 8]", [3, 10, 4, 7]) == 75
    assert old("math_calc", "3 11 4 7", [3, 10, 4, 7]) == 25
    assert old("math_calc", "-3, 010, -4", [3, 10, 4]) == 100
    assert old("math_calc", "-3", [-3]) == 0
    assert old("math_calc", "3", [3, 10]) == 50
    assert old("math_calc", "3, 10, 4, 99, 98", [3, 10, 4]) == 100
    assert old("math_calc", "[3, 10]", [[3, 10]]) == 100


def test_trap_only_the_chat_protocol_drops_the_first_number():
    assert score_infbench("math_calc", "[1, 3, 10]", [3, 10]) == 0
    assert score_infbench("math_calc", "[1, 3, 10]", [3, 10], drop_first_number=True) == 100
    rows = [row("math_calc", "[1, 3, 10]", [3, 10])]
    scored = score_rows("infbench", rows, drop_first_number=True)
    assert scored["scores"]["math_calc"]["score"] == 100.0
    assert "first number of math_calc dropped" in scored["scorer"]
    assert score_rows("infbench", rows)["scores"]["math_calc"]["score"] == 0.0


def test_trap_options_with_the_same_text_take_the_first_letter():
    options = ["no", "yes", "no", "maybe"]
    assert labels_of("longbook_choice_eng", ["no"], options) == ["no", "A"]
    assert labels_of("longbook_choice_eng", ["maybe"], options) == ["maybe", "D"]
    assert labels_of("longbook_choice_eng", ["no", "C"], options) == ["no", "C"]
    scored = score_rows("infbench", [row("code_debug", "D.", ["maybe"], options=options)])
    assert scored["scores"]["code_debug"]["score"] == 100.0


@needs_lm_eval
def test_answers_by_hand():
    assert old("longbook_qa_eng", "The old lighthouse!", ["lighthouse", "an old lighthouse"]) == 100
    assert old("longbook_qa_eng", "old house", ["lighthouse", "old lighthouse"]) == 50
    assert old("longbook_qa_chn", "灯 塔。", ["灯塔"]) == 100
    assert old("longbook_qa_chn", "灯塔“旧”", ["灯塔"]) == pytest.approx(80)  # curly quotes are no characters
    assert old("longbook_qa_chn", "老灯塔", ["老屋", "灯塔"]) == pytest.approx(80)


@needs_lm_eval
def test_summaries_are_compared_without_stems_and_line_by_line():
    assert old("longbook_sum_eng", "men walking", ["men walked"]) == pytest.approx(50)
    lines = "the first thing happens\nthen the second"
    assert old("longbook_sum_eng", "then the second\nthe first thing happens", [lines]) == pytest.approx(100)
    assert old("longbook_sum_eng", "then the second the first thing happens", [lines.replace("\n", " ")]) < 60


@needs_lm_eval
@pytest.mark.parametrize("subtask", ["longbook_sum_eng", "longbook_qa_eng", "longbook_qa_chn"])
@given(prediction=st.text(max_size=30), references=st.lists(st.text("ab 灯塔.", min_size=1).filter(str.strip), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_order_of_references_does_not_matter_and_the_best_counts(subtask, prediction, references):
    score = old(subtask, prediction, references)
    assert score == old(subtask, prediction, references[::-1])
    assert score == max(old(subtask, prediction, [one]) for one in references)


@given(prediction=st.text("MIRANDA BELL\n", max_size=20), labels=st.lists(st.text("ABEL ", min_size=1).filter(str.strip), min_size=1))
def test_order_of_names_does_not_matter_in_the_new_edition(prediction, labels):
    assert new("longdialogue_qa_eng", prediction, labels) == new("longdialogue_qa_eng", prediction, labels[::-1])


@needs_lm_eval
@given(prediction=st.text(st.sampled_from("0123456789.-`'\": \nab"), max_size=20), label=st.integers(-99, 99))
@settings(max_examples=200, deadline=None)
def test_numbers_agree_with_lm_eval_where_it_is_right(prediction, label):
    from hipexp.suites.lm_eval import suite_module

    found = re.search(r"\d+\.\d+|\d+", prediction)
    if not (found and "." in found[0]):  # where the official scorer fails
        theirs = suite_module("infinitebench.utils").process_results_math({"answer": [str(label)]}, [prediction])["score"]
        assert old("math_find", prediction, [label]) == 100 * theirs


# Rows of published tables and the mean that each prints.
@pytest.mark.parametrize(
    ("name", "values", "printed"),
    [
        ("infllm_hip_7", [100, 96.1, 96.8, 25.8, 15.7, 43.7, 25.7], 57.7),  # InfLLM, Mistral-7B-v0.2, 16K
        ("infllm_hip_7", [28.8, 28.8, 14.8, 25.9, 12.9, 44.5, 20.6], 25.2),  # the same model as it is
        ("infllm_hip_7", [100, 97.97, 60.80, 25.86, 12.74, 55.46, 28.00], 54.40),  # InfiniteHiP 3K
        ("minference_10", [100, 100, 14.4, 20.2, 12.4, 67.3, 6.0, 12.9, 22.1, 26.6], 38.2),  # Llama-3-8B-262K, full
        ("minference_10", [100, 100, 12.8, 20.5, 12.9, 65.9, 7.5, 12.5, 22.3, 33.1], 38.8),  # MInference
    ],
)
def test_published_means_are_those_of_our_lists(name, values, printed):
    scores = dict(zip(LISTS[name], values, strict=True))
    assert averages(scores)[name] == pytest.approx(printed, abs=0.06)


def test_a_mean_is_there_only_if_all_its_tasks_are():
    scores = dict.fromkeys(METRICS, 50.0)
    assert averages(scores) == {"paper_12": 50.0, "minference_10": 50.0, "infllm_hip_7": 50.0}
    del scores["code_run"]
    assert set(averages(scores)) == {"minference_10", "infllm_hip_7"}
    del scores["code_debug"]
    assert set(averages(scores)) == {"infllm_hip_7"}
    del scores["passkey"]
    assert averages(scores) == {}


@pytest.mark.parametrize(
    ("subtask", "references", "message"),
    [
        ("passkeys", ["1"], "no task of ∞Bench; use one of passkey"),
        ("passkey", [71432], "needs texts"),
        ("passkey", [" "], "not empty"),
        ("kv_retrieval", [[]], "needs texts"),
        ("kv_retrieval", [[1]], "needs texts"),
        ("longdialogue_qa_eng", [""], "not empty"),
        ("longbook_choice_eng", ["text", "E"], "text and the letter"),
        ("longbook_choice_eng", ["B", "text"], "text and the letter"),
        ("longbook_choice_eng", ["text"], "options=None must be the texts"),
        ("longbook_choice_eng", [1, "B"], "texts that are not empty"),
        ("code_debug", ["run", "K"], "text and the letter"),
        ("math_find", ["many"], "must be a number"),
        ("math_find", [True], "must be a number"),
        ("math_find", [float("nan")], "must be a number"),
        ("math_find", ["9" * 5000], "must be a number"),
        ("code_run", [1.5], "whole number"),
        ("math_calc", [[1, "x"]], "must be a number"),
        ("math_calc", [[]], "must be a number"),
    ],
)
def test_references_that_do_not_fit_get_no_score(subtask, references, message):
    with pytest.raises(ConfigError, match=message):
        score_rows("infbench", [row(subtask, "x", references)])
    with pytest.raises(ConfigError, match=message):
        score_infbench(subtask, "x", references)


def test_an_unknown_edition_is_refused():
    with pytest.raises(ConfigError, match="use 2024-06 or 2024-08 or minference"):
        score_infbench("passkey", "1", ["1"], edition="2025")
