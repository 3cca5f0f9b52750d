import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.suites.scoring import score_rows
from hipexp.suites.scoring.longbench2 import answer_of, score_longbench2


def row(prediction, letter="A", difficulty="easy", length="short", **more):
    return {"subtask": "longbench2", "prediction": prediction, "references": [letter], "difficulty": difficulty, "length": length, **more}


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("The correct answer is B", "B"),
        ("**The correct answer is** **(C)**", "C"),
        ("The correct answer is A. No: The correct answer is (D)", "D"),  # brackets come first, wherever they stand
        ("The correct answer is (B). The correct answer is (C)", "B"),
        ("The correct answer is (E)", None),
        ("the correct answer is (B)", None),
        ("The answer is (B)", None),
        ("B", None),
        ("", None),
    ],
)
def test_the_answer_is_what_the_output_names(prediction, letter):
    assert answer_of(prediction) == letter
    assert score_longbench2(prediction, ["B"]) == (100 if letter == "B" else 0)


@given(prediction=st.text(), letter=st.sampled_from("ABCD"))
def test_scores_are_0_or_100_and_empty_is_0(prediction, letter):
    assert score_longbench2(prediction, [letter]) in (0, 100)
    assert score_longbench2("", [letter]) == 0
    assert score_longbench2(f"{prediction}The correct answer is ({letter})", [letter]) in (0, 100)
    assert score_longbench2(f"The correct answer is ({letter}){prediction}", [letter]) == 100


def test_groups_with_one_decimal_and_missing_answers_as_guesses():
    right, wrong, none = "The correct answer is (A)", "The correct answer is (B)", "I do not know"
    rows = [
        row(right),
        row(wrong, difficulty="hard", length="medium"),
        row(none, difficulty="hard", length="long"),
        row(right, difficulty="hard", length="long"),
        row(none, length="medium"),
        row(right, length="medium"),
    ]
    scores = {name: entry["score"] for name, entry in score_rows("longbench2", rows)["scores"].items()}
    assert scores == {
        "overall": 50.0,
        "easy": 66.7,
        "hard": 33.3,
        "short": 100.0,
        "medium": 33.3,
        "long": 50.0,
        "overall_compensated": 58.3,
        "easy_compensated": 75.0,
        "hard_compensated": 41.7,
        "short_compensated": 100.0,
        "medium_compensated": 41.7,
        "long_compensated": 62.5,
    }


def test_a_group_without_rows_is_missing():
    assert set(score_rows("longbench2", [row("x")])["scores"]) == {
        "overall",
        "easy",
        "short",
        "overall_compensated",
        "easy_compensated",
        "short_compensated",
    }


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("x") | {"subtask": "qasper"}, "must be 'longbench2'"),
        (row("x", letter="E"), "must be one letter"),
        (row("x") | {"references": ["A", "B"]}, "must be one letter"),
        (row("x", difficulty="medium"), "difficulty='medium' must be one of easy, hard"),
        (row("x", length=12000), "length=12000 must be one of short, medium, long"),
        (row("x", length=["short"]), "must be one of short"),
    ],
)
def test_bad_rows_get_no_score(bad, message):
    with pytest.raises(ConfigError, match=message):
        score_rows("longbench2", [row("x"), bad])
