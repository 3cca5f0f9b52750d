"""The recipe: the lengths of its steps, their mixtures and the learning rate."""

from collections import Counter
from itertools import pairwise

import pytest

from hipexp.needle import phases
from hipexp.needle.phases import PHASES, STEPS, TRAINED_LENGTH, phase_of, step_of

FIRST = [sum(phase.steps for phase in PHASES[:number]) for number in range(len(PHASES))]


@pytest.mark.parametrize("number", range(len(PHASES)))
def test_each_phase_has_its_lengths_and_a_learning_rate_that_ends_near_nothing(number):
    phase, first = PHASES[number], FIRST[number]
    assert phase_of(first) == (phase, 0) and phase_of(first + phase.steps - 1) == (phase, phase.steps - 1)
    rates = [phase.learning_rate(step) for step in range(phase.steps)]
    assert max(rates) == phase.peak and max(rates[0], rates[-1]) <= phase.peak / phase.warm_up_steps
    steps = Counter(step_of(first + step).length for step in range(phase.steps))
    assert set(steps) == {length for _, length in phase.lengths} and max(steps) == TRAINED_LENGTH
    assert all(a < b for (_, a), (_, b) in pairwise(phase.lengths))


def test_the_later_phases_take_as_many_steps_of_each_length_as_made_the_weights():
    made = (
        {128: 296, 192: 299, 384: 468, 768: 480, 1536: 447, 3072: 464, 6144: 611},
        {128: 82, 192: 44, 384: 73, 768: 119, 1536: 113, 3072: 160, 6144: 310},
    )
    for phase, first, expected in zip(PHASES[1:], FIRST[1:], made, strict=True):
        steps = Counter(step_of(first + step).length for step in range(phase.steps))
        assert {length: steps[length] for length in expected} == pytest.approx(expected, rel=0.1)


def test_the_recipe_ends():
    assert FIRST[-1] + PHASES[-1].steps == STEPS
    with pytest.raises(IndexError, match=f"{STEPS} steps"):
        phase_of(STEPS)


def test_shares_are_shares_and_go_by_length():
    for phase in PHASES:
        assert phase.mixtures[0][0] == 0
        assert all(sum(mixture.values()) == pytest.approx(1) for _, mixture in phase.mixtures)
    for least, mixture in PHASES[2].mixtures[1:]:
        assert PHASES[2].mixture(least) is mixture is not PHASES[2].mixture(least - 1)


@pytest.mark.parametrize("number", [0, 700, STEPS - 1])
def test_a_step_has_as_many_tokens_as_its_phase_says_but_not_many_sequences(number):
    step, (phase, _) = step_of(number), phase_of(number)
    assert step == step_of(number), "drawn again it is the same"
    assert step.sequences == min(phase.step_tok // step.length, phases.MOST_SEQUENCES)
