"""The refresh schedule of decode: which stages run at which step."""

import torch

from hipexp.attention.refresh import Memory
from hipexp.config.schema import Stage


def due(intervals, steps):
    stages = [Stage(chunk_tok=8, keep_tok=8, refresh_steps=r) for r in intervals]
    memory, seen = Memory(), []
    for _ in range(steps):
        seen.append(memory.first_stage_due(stages))
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
