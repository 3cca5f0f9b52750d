from dataclasses import replace

import pytest

from hipexp.repro import orderings
from hipexp.repro.data import FULL, NEEDLE, Cells, Claim, read
from hipexp.repro.orderings import ELSEWHERE, FAILS, HOLDS, NOT_RUN, OPEN, by_count, by_factor, by_groups, by_pairs, judge, judge_all
from hipexp.repro.points import Cell, cells
from hipexp.repro.values import Value
from hipexp.run.several import Named

CLAIM = Claim("a above b", "1 against 0", Cells("a"), Cells("b"))


def scored(row, *scores, run="2×", column="c", model="", folder=None, answers=""):
    """One cell with the scores of its samples; ``answers``: before the number of each, what was to be answered."""
    samples = {(folder or row, "kv", number, answers and f"{answers}{number}"): float(score) for number, score in enumerate(scores)}
    return {((model, row, ""), run, column): Value(sum(scores) / len(scores), None, samples)}


def numbered(row, number, run="", column="c", metric=""):
    return {(("", row, metric), run, column): Value(number)}


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([100] * 5, [0] * 5, HOLDS),
        ([0] * 5, [100] * 5, FAILS),
        ([100] * 4, [0] * 4, OPEN),  # four throws fall on one side once in sixteen times
        ([100, 0] * 5, [0, 100] * 5, OPEN),
        ([100] * 9, [100] * 9, OPEN),
        ([100] * 9 + [0], [0] * 9 + [100], HOLDS),
        ([100], [0], OPEN),
    ],
)
def test_scores_are_judged_by_pairs(a, b, word):
    assert judge(CLAIM, "", scored("a", *a) | scored("b", *b)).word == word


def test_pairs_of_several_runs_count_together_and_each_once():
    values = {}
    for run in ("2×", "4×"):
        values |= scored("a", 100, 100, 100, run=run, folder=f"a{run}") | scored("b", 0, 0, 0, run=run, folder=f"b{run}")
    told = judge(CLAIM, "", values)
    assert told.word == HOLDS and told.because.startswith("6 better, 0 worse of 6 pairs; mean +100.0 (+8 to +100)")
    same = {}
    for column in ("x", "y"):  # two published columns that read the same samples
        same |= scored("a", 100, 100, 100, column=column) | scored("b", 0, 0, 0, column=column)
    assert judge(CLAIM, "", same).because.startswith("3 better, 0 worse of 3 pairs")


def test_other_prompts_are_two_groups(monkeypatch):
    claim = Claim("short above long", "", Cells("a", columns=["short"]), Cells("a", columns=["long"]))
    short, long = scored("a", *[100] * 6, column="short"), scored("a", *[0] * 6, column="long", folder="other")
    assert judge(claim, "", short | long).word == HOLDS
    flipped = Claim("long above short", "", claim.less, claim.more)
    assert judge(flipped, "", short | long).word == FAILS
    assert by_groups([100, 0], [0, 100])[0] == OPEN
    assert by_groups([100], [0])[0] == OPEN
    monkeypatch.setattr(orderings, "SHUFFLES", 10)  # what is seen is one of the orders: of eleven, none is rarer than one in eleven
    assert by_groups([100] * 9, [0] * 9)[0] == OPEN
    monkeypatch.undo()
    assert by_groups([100, 100, 0], [0, 100])[1] == by_groups([0, 100, 100], [100, 0])[1]


def test_one_text_cut_to_several_lengths_is_paired():
    claim = Claim("more of the text", "", Cells("a", columns=["32K"]), Cells("a", columns=["8K"]))
    whole = scored("a", *[100] * 5, column="32K", answers="key")
    assert judge(claim, "", whole | scored("a", *[0] * 5, column="8K", folder="cut", answers="key")).because.startswith(
        "5 better, 0 worse of 5"
    )
    assert judge(claim, "", whole | scored("a", *[0] * 5, column="8K", folder="cut", answers="other")).because.startswith(
        "means 100.0 of 5"
    )


def test_samples_that_do_not_meet_decide_nothing():
    assert by_pairs([])[0] == NOT_RUN
    assert judge(CLAIM, "", scored("a", 100)).word == NOT_RUN


@pytest.mark.parametrize(
    ("ratios", "word"), [([2.0, 3.0], HOLDS), ([2.0, 1.2], OPEN), ([0.5, 0.6], FAILS), ([0.5, 0.9], OPEN), ([1.0], OPEN)]
)
def test_times_need_the_factor_everywhere(ratios, word):
    assert by_factor([(ratio, 1.0) for ratio in ratios], 1.5)[0] == word


def test_counts_are_exact():
    assert by_count([(2.0, 1.0), (3.0, 2.9)])[0] == HOLDS
    assert by_count([(2.0, 1.0), (2.0, 2.0)])[0] == FAILS


def test_growth_is_a_quotient_of_two_columns():
    claim = Claim("a grows more", "", Cells("a", over=["1", "4"]), Cells("b", over=["1", "4"]), "times", 1.5)
    values = (
        numbered("a", 1.0, column="1") | numbered("a", 3.0, column="4") | numbered("b", 2.0, column="1") | numbered("b", 2.2, column="4")
    )
    assert judge(claim, "", values).word == HOLDS
    assert "2.73 times" in judge(claim, "", values).because
    assert judge(claim, "", numbered("a", 1.0, column="1") | numbered("b", 2.0, column="1")).word == NOT_RUN


def test_one_column_against_another():
    claim = Claim("more at 4", "", Cells("a", columns=["4"]), Cells("a", columns=["1"]), "counts")
    assert judge(claim, "", numbered("a", 1.0, column="1") | numbered("a", 3.0, column="4")).word == HOLDS


def test_metrics_are_kept_apart_and_models_judged_one_by_one():
    claim = Claim("a above b", "", Cells("a", metric="x"), Cells("b", metric="x"), "counts")
    values = numbered("a", 1.0, metric="x") | numbered("a", 9.0, metric="y") | numbered("b", 5.0, metric="x")
    assert judge(claim, "", values).word == FAILS
    table = read("table6")
    more, less = (claim.row for claim in (table.orderings[0].more, table.orderings[0].less))
    both = scored(more, *[100] * 6, model="m") | scored(less, *[0] * 6, model="m") | scored(more, 0, model="n") | scored(less, 0, model="n")
    found = [planned(of, row) for of in ("m", "n") for row in (more, less)]
    assert [(one.model, one.word) for one in judge_all(table, table.sizes[FULL], both, found)] == [("m", HOLDS), ("n", OPEN)]


def planned(model, row, column="c", run="2×"):
    """A cell that is run."""
    return Cell((model, row, ""), run, column, ("kv",), False, Named(f"{model} {row} {column} {run}", None))


def test_an_ordering_is_judged_for_the_models_that_it_is_about():
    table = read("table10")
    assert all(claim.models == ["Gemma-2-9B"] for claim in table.orderings)
    table.orderings = [Claim("a above b", "", Cells("a"), Cells("b"), models=["m"])]
    size = table.sizes[FULL]
    values, found = {}, [planned(of, row) for of in ("m", "n") for row in "ab"]
    for of in ("m", "n"):
        values |= scored("a", *[100] * 6, model=of) | scored("b", *[0] * 6, model=of)
    assert [(one.model, one.word) for one in judge_all(table, size, values, found)] == [("m", HOLDS)]
    alone = scored("a", *[100] * 6) | scored("b", *[0] * 6)  # one model stands beside all published ones: beside which, the size says
    found = [planned("", row) for row in "ab"]
    told = {beside: judge_all(table, replace(size, beside=beside), alone, found)[0].word for beside in ("", "m", "n")}
    assert told == {"": ELSEWHERE, "m": HOLDS, "n": ELSEWHERE}


@pytest.mark.parametrize(
    ("name", "size", "elsewhere"),
    [("table7", FULL, [0]), pytest.param("table11", FULL, [1], marks=pytest.mark.slow), ("table7", NEEDLE, []), ("table1", FULL, [])],
)
def test_what_a_size_does_not_run_is_not_told_as_unfinished(name, size, elsewhere):
    table = read(name)
    verdicts = judge_all(table, table.sizes[size], {}, cells(table, size, []))
    models = {one.model for one in verdicts}
    words = [ELSEWHERE if number in elsewhere else NOT_RUN for number in range(len(table.orderings)) for _ in models]
    assert [one.word for one in verdicts] == words
    assert all(("size" in one.because) == (one.word == ELSEWHERE) for one in verdicts)


def test_a_verdict_on_a_part_of_its_runs_says_so():
    table = read("table6")
    table.orderings = [CLAIM]
    values = scored("a", *[100] * 6) | scored("b", *[0] * 6)
    found = [planned("", row, run=run) for row in "ab" for run in ("2×", "4×")]
    (told,) = judge_all(table, table.sizes[NEEDLE], values, found)
    assert told.word == HOLDS and told.because.endswith("; 2 of its 4 runs are there")
    values |= scored("a", *[100] * 6, run="4×", folder="a4") | scored("b", *[0] * 6, run="4×", folder="b4")
    assert "runs are there" not in judge_all(table, table.sizes[NEEDLE], values, found)[0].because


def test_lengths_cut_from_one_text_are_one_pair():
    values = {}
    for column in ("16K", "32K"):
        values |= scored("a", 100, 100, 100, column=column, folder=f"a{column}", answers="key")
        values |= scored("b", 0, 0, 0, column=column, folder=f"b{column}", answers="key")
    told = judge(CLAIM, "", values)  # six differences of three texts
    assert told.word == OPEN and told.because.startswith("3 better, 0 worse of 3 pairs; mean +100.0")
    mixed = scored("a", 100, 50, column="16K", folder="a16", answers="key") | scored("b", 0, 100, column="16K", folder="b16", answers="key")
    mixed |= scored("a", 0, 100, column="32K", folder="a32", answers="key") | scored("b", 100, 0, column="32K", folder="b32", answers="key")
    assert judge(CLAIM, "", mixed).because.startswith("1 better, 0 worse of 2 pairs; mean +12.5")
