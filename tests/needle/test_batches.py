"""Batches: padded prompts, targets where the asked needles are, the same whoever makes them."""

import random

import pytest
import torch

from hipexp.needle.batches import Batch, batches, collate, make_batch, tokenizer
from hipexp.needle.corpus import PromptMaker
from hipexp.needle.phases import Step

MIXTURE = {"named": 0.5, "chains": 0.3, "pairs": 0.2}


@pytest.mark.parametrize("length", [256, 1536])
def test_targets_lie_where_the_asked_needle_is(length):
    maker = PromptMaker(lambda text: tokenizer().encode(text, add_special_tokens=False), {"pairs": 1.0}, seed=3)
    prompts = [maker.prompt(length) for _ in range(3)]
    batch = collate(prompts, length, random.Random(0))
    T = length
    assert batch.ids.shape == batch.weight.shape == (3, T)
    for one in (batch.single, batch.blocks):
        for b, (_, _, links, _) in enumerate(prompts):
            for n in range(one.rows.shape[1]):
                told, rows = one.target[b, n], one.rows[b, n]
                if not told.any():
                    continue
                assert told.sum() == pytest.approx(1, abs=1e-4) and (told[~one.allowed[b, n]] == 0).all()
                assert int(told.nonzero().max()) < int(rows.min()) - min(1024, T // 4)
                needles = {(lo, hi) for a, z, lo, hi, _ in links if a <= int(rows.max()) and z > int(rows.min()) and told[lo] > 0}
                assert needles and all((told[lo:hi] == told.max()).all() for lo, hi in needles)


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.each(found.append)
    return found


def test_batches_are_the_same_from_worker_processes():
    steps = [Step(number, length, 1024 // length, MIXTURE) for number, length in enumerate((128, 192, 384, 192, 1024, 128))]
    alone, together = ([*batches(steps, workers)] for workers in (0, 2))
    assert [step for step, _ in alone] == [step for step, _ in together] == steps
    assert any(batch.single for _, batch in alone) and not all(batch.single for _, batch in alone)
    for (step, one), (_, other) in zip(alone, together, strict=True):
        assert one.ids.shape == (step.sequences, step.length)
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_further_right_tokens_are_those_that_the_prompt_names():
    step = Step(1, 192, 5, {"named": 1.0})
    batch = make_batch(step)
    assert len(batch.others)
    for b, at, *also in batch.others.tolist():
        assert batch.weight[b, at] == 3.0 and int(batch.ids[b, at]) in also
