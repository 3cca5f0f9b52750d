import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.suites.scoring.statistics import describe, mean_interval, paired_difference

SCORES = st.lists(st.floats(0, 100), min_size=2, max_size=40)


def test_the_interval_of_right_and_wrong_answers_is_near_the_textbook_one():
    values = [100.0] * 800 + [0.0] * 200
    low, high = mean_interval(values)
    error = 1.96 * 100 * math.sqrt(0.8 * 0.2 / 1000)
    assert low == pytest.approx(80 - error, abs=0.2)
    assert high == pytest.approx(80 + error, abs=0.2)


@pytest.mark.parametrize(("n", "share"), [(2, 0.8), (4, 0.9), (10, 0.9), (20, 0.95), (10, 0.5), (60, 0.7)])
def test_the_interval_covers_the_true_mean_at_least_about_95_times_in_100(n, share):
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        low, high = mean_interval(100.0 * (rng.random(n) < share))
        inside += low <= 100 * share <= high
    assert inside >= 182


@pytest.mark.parametrize("flips", [(0.1, 0.0), (0.1, 0.1), (0.0, 0.02)])
def test_so_does_that_of_a_difference_where_few_answers_flip(flips):
    rng = np.random.default_rng(6)
    inside = 0
    for _ in range(200):
        drawn = rng.random(20)
        ours, theirs = 100.0 * (drawn < flips[0]), 100.0 * (drawn > 1 - flips[1])
        low, high = paired_difference(ours, theirs)["interval"]
        inside += low <= 100 * (flips[0] - flips[1]) <= high
    assert inside >= 182


@given(values=SCORES, seed=st.randoms())
@settings(max_examples=15, deadline=None)
def test_intervals_hold_the_mean_and_do_not_depend_on_order(values, seed):
    low, high = mean_interval(values)
    shuffled = list(values)
    seed.shuffle(shuffled)
    assert mean_interval(shuffled) == [low, high] == mean_interval(values)
    assert low - 1e-9 <= np.mean(values) <= high + 1e-9
    assert min(values) < max(values) or low < high
    assert 0 <= low <= high <= 100
    assert describe(values)["n"] == len(values)


def test_equal_scores_leave_the_doubt_that_others_were_not_met():
    told = describe([100.0] * 20)
    assert told["score"] == told["interval"][1] == 100.0
    missed = 1 - told["interval"][0] / 100  # a share so large would have shown itself in 20 samples 39 times in 40
    assert (1 - missed) ** 20 == pytest.approx(0.025)
    assert describe([40.0, 40.0])["interval"] == pytest.approx([40 - 0.4 * 84.1886, 40 + 0.6 * 84.1886], abs=0.01)


def test_one_sample_has_no_interval():
    assert describe([40.0]) == {"score": 40.0, "n": 1, "interval": None}


def test_a_paired_difference_is_ours_less_theirs():
    assert paired_difference([100, 0, 100, 50], [0, 0, 100, 0])["mean"] == 37.5
    same = paired_difference([10.0] * 50, [5.0] * 50)
    assert same["mean"] == 5.0 and same["interval"] == pytest.approx([5 - 1.05 * 7.112, 5 + 0.95 * 7.112], abs=0.01)


def test_pairs_are_compared_more_sharply_than_two_means():
    rng = np.random.default_rng(2)
    theirs = 100.0 * (rng.random(200) < 0.5)
    ours = theirs.copy()
    ours[np.flatnonzero(theirs == 0)[:6]] = 100.0
    low, high = paired_difference(ours, theirs)["interval"]
    assert 0 < low < 3.0 < high
    assert high - low < mean_interval(theirs)[1] - mean_interval(theirs)[0]


def test_runs_of_different_sizes_are_not_compared():
    with pytest.raises(ConfigError, match="3 here, 2 there"):
        paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one score"),
        ([[1.0], [2.0]], "at least one score"),
        ([1.0, math.nan], "number 1 is nan"),
        ([math.inf, 1.0], "number 0 is inf"),
    ],
)
def test_bad_scores_get_no_number(values, message):
    for refuse in (describe, mean_interval, lambda bad: paired_difference(bad, [1.0, 2.0])):
        with pytest.raises(ConfigError, match=message):
            refuse(values)
