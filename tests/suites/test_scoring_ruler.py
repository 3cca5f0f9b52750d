import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.suites.scoring import score_rows
from hipexp.suites.scoring.ruler import METRICS, averages, score_ruler

REFERENCES = st.lists(st.text(st.characters(min_codepoint=32), min_size=1).filter(str.strip), min_size=1, max_size=4)
# Mean of the 13 tasks at 4K to 128K, and the mean over lengths, as the readme of RULER prints them.
README = {
    "Llama-3.1-8B": ([95.5, 93.8, 91.6, 87.4, 84.7, 77.0], 88.3),
    "Llama-3.1-70B": ([96.5, 95.8, 95.4, 94.8, 88.4, 66.6], 89.6),
    "Qwen2.5-7B-1M": ([96.8, 95.3, 93.0, 91.1, 90.4, 84.4], 91.8),
    "Mistral-7B-v0.2": ([93.6, 91.2, 87.2, 75.4, 49.0, 13.8], 68.4),
    "GLM4-9B-1M": ([94.7, 92.8, 92.1, 89.9, 86.7, 83.1], 89.9),
    "Phi3-mini": ([92.2, 91.5, 90.7, 87.5, 80.6, 66.7], 84.8),
}


def row(subtask, prediction, references, **more):
    return {"subtask": subtask, "prediction": prediction, "references": references, **more}


@pytest.mark.parametrize(
    ("subtask", "prediction", "references", "score"),
    [
        ("niah_single_1", " 1234567.", ["1234567"], 100),
        ("niah_single_1", "7654321", ["1234567"], 0),
        ("niah_multivalue", "11, 22 and 44", ["11", "22", "33", "44"], 75),
        ("niah_multikey_3", "It is ABC-DEF", ["abc-def"], 100),
        ("vt", "abcde FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"], 40),
        ("cwe", "1. apple 2. pear", ["apple", "pear", "fig"], 200 / 3),
        ("fwe", "", ["xyz"], 0),
        ("niah_single_1", "12345678", ["1234567"], 100),  # a part of a word counts
    ],
)
def test_scores_by_hand(subtask, prediction, references, score):
    assert score_ruler(subtask, prediction, references) == pytest.approx(score)


@pytest.mark.parametrize("subtask", ["qa_1", "qa_2"])
def test_trap_questions_need_one_of_the_answers_not_all(subtask):
    assert score_ruler(subtask, "in the year 1912", ["1912", "April 1912"]) == 100
    assert score_ruler("fwe", "in the year 1912", ["1912", "April 1912"]) == 50


def test_trap_control_characters_become_newlines_before_matching():
    assert score_ruler("vt", "AB\x00CD", ["ABCD"]) == 0  # deleting them, as another framework does, would find it
    assert score_ruler("vt", "AB\tCD", ["AB\nCD"]) == 100
    assert score_ruler("vt", "AB\tCD", ["AB\tCD"]) == 0


@given(references=REFERENCES, extra=st.text(), subtask=st.sampled_from(sorted(METRICS)))
def test_an_output_that_holds_all_references_scores_100(references, extra, subtask):
    assert score_ruler(subtask, extra + " " + " ".join(references), references) == 100


@given(prediction=st.text(), references=REFERENCES, subtask=st.sampled_from(sorted(METRICS)))
def test_scores_stay_in_bounds_and_order_does_not_matter(prediction, references, subtask):
    score = score_ruler(subtask, prediction, references)
    assert 0 <= score <= 100
    assert score_ruler(subtask, prediction, references[::-1]) == pytest.approx(score)
    assert score_ruler(subtask, "", references) == 0


def test_long_outputs_are_read_to_their_end():
    assert score_ruler("qa_1", "word " * 400_000 + "Needle", ["needle"]) == 100


def test_scores_are_means_with_two_decimals_by_task_and_length():
    rows = [row("vt", "AA", ["AA"], length=4096), row("vt", "AA", ["AA", "BB", "CC"], length=4096), row("vt@8192", "", ["AA"])]
    scores = score_rows("ruler", rows)["scores"]
    assert scores["vt@4096"]["score"] == 66.67
    assert scores["vt@8192"] == {"metric": "share_of_references", "score": 0.0, "n": 1, "interval": None}


def test_the_mean_of_13_needs_all_13():
    rows = [row(subtask, "x" if subtask == "vt" else "", ["x"]) for subtask in METRICS]
    assert score_rows("ruler", rows)["averages"] == {"13_tasks": 7.69}
    assert score_rows("ruler", rows[1:])["averages"] == {"12_of_13_tasks": 8.33}


@pytest.mark.parametrize("model", README)
def test_means_over_lengths_are_those_of_the_readme(model):
    means, printed = README[model]
    scores = {f"{task}@{4096 * 2**i}": mean for i, mean in enumerate(means) for task in METRICS}
    found = averages(scores)
    assert found["13_tasks"] == pytest.approx(printed, abs=0.1)  # each printed number is rounded
    assert found["13_tasks@131072"] == pytest.approx(means[-1])
    assert found["13_tasks_weights_rising"] == pytest.approx(sum(m * w for m, w in zip(means, (1, 2, 3, 4, 5, 6), strict=True)) / 21)
    assert found["13_tasks_weights_falling"] == pytest.approx(sum(m * w for m, w in zip(means, (6, 5, 4, 3, 2, 1), strict=True)) / 21)


def test_weights_go_by_length_not_by_order():
    found = averages({"vt@131072": 0.0, "vt@4096": 100.0, "vt@65536": 50.0})
    assert found["1_of_13_tasks_weights_falling"] == pytest.approx((3 * 100 + 2 * 50) / 6)
    assert found["1_of_13_tasks_weights_rising"] == pytest.approx((100 + 2 * 50) / 6)


def test_lengths_with_different_tasks_have_no_common_mean():
    assert averages({"vt@4096": 1.0, "cwe@4096": 3.0, "vt@8192": 4.0}) == {"2_of_13_tasks@4096": 2.0, "1_of_13_tasks@8192": 4.0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("niah", "x", ["x"]), "no task of RULER; use one of niah_single_1"),
        (row("vt@many", "x", ["x"]), "<task>@<length in tokens>"),
        (row("vt", "x", [""]), "not empty"),
        (row("vt", "x", [12]), "holds 12"),
        (row("vt", "x", ["x"], length="4K"), "target length"),
        (row("vt", "x", ["x"], length=True), "target length"),
        (row("vt", "x", ["x"], length=0), "target length"),
    ],
)
def test_bad_rows_get_no_score(bad, message):
    with pytest.raises(ConfigError, match=message):
        score_rows("ruler", [bad])
