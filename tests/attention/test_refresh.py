"""The refresh schedule of decode: which stages run at which step."""

import pytest
import torch

from hipexp.attention.refresh import Memory
from hipexp.config.schema import Pipeline, Stage


def due(intervals, steps, shift_steps=0):
    stages = [Stage(chunk_tok=8, keep_tok=8, refresh_steps=r) for r in intervals]
    memory, seen = Memory(), []
    for _ in range(steps):
        seen.append(memory.first_stage_due(stages, shift_steps))
        memory.lists[len(stages)] = torch.zeros(1, 1, 1), torch.ones(1, 1)
        memory.step += 1
    return seen


def test_one_period_of_16_8_4():
    assert due((16, 8, 4), 20) == [0, 3, 3, 3, 2, 3, 3, 3, 1, 3, 3, 3, 2, 3, 3, 3, 0, 3, 3, 3]


def test_counts_per_96_steps_of_96_24_8():
    seen = due((96, 24, 8), 96)
    assert [seen.count(i) for i in range(4)] == [1, 3, 8, 84]


def test_everything_runs_while_nothing_is_remembered():
    memory = Memory(step=5)
    assert memory.first_stage_due([Stage(chunk_tok=8, keep_tok=8, refresh_steps=16)]) == 0


@pytest.mark.parametrize("intervals", [(16, 8, 4), (96, 24, 8), (8,)])
def test_a_shifted_layer_does_the_same_earlier(intervals):
    plain = due(intervals, 300)
    for shift in (1, 3, 31, 100):
        shifted = due(intervals, 200, shift)
        assert shifted[0] == 0 and shifted[1:] == plain[shift + 1 : shift + 200]


def test_staggered_layers_share_the_work_of_every_step_but_the_first():
    """Of 16 layers one runs all stages, one more two, two more one, in every step: what one layer does in a period."""
    seen = [due((16, 8, 4), 40, plan.shift_steps) for plan in Pipeline(stages=[Stage(8, 8)], staggered_refresh=True).plan(16)]
    assert [layer[0] for layer in seen] == [0] * 16
    for step in range(1, 40):
        assert [[layer[step] for layer in seen].count(i) for i in range(4)] == [1, 1, 2, 12]
    assert {plan.shift_steps for plan in Pipeline(stages=[Stage(8, 8)]).plan(16)} == {0}


def test_a_stage_from_whose_query_this_one_has_turned_away():
    """Two heads; the mean of their cosines to the query of a stage's last run counts, whatever their lengths."""
    memory, first = Memory(), torch.tensor([[1.0, 0], [0, 2]])
    assert memory.first_stage_turned(first, 1.0, 3) == 3  # nothing ran yet
    memory.ran(0, 3, first)
    turned = torch.tensor([[3.0, 0], [4, 3]])  # cosines 1 and 0.6
    assert [memory.first_stage_turned(turned, below, 3) for below in (0.79, 0.81)] == [3, 0]
    memory.ran(1, 3, turned)
    assert memory.first_stage_turned(turned, 0.79, 3) == 3 and memory.first_stage_turned(turned, 0.81, 3) == 0
    assert memory.first_stage_turned(first, 0.81, 3) == 1
    memory.ran(3, 3, first)  # no stage ran
    first *= -1  # what was asked is kept, not where it lay
    assert memory.first_stage_turned(turned, 0.79, 1) == 3 - 2 and memory.first_stage_turned(first, 0.0, 3) == 0
