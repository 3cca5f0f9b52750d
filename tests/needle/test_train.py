"""A step of the training, and its checkpoints."""

import pytest
import torch

from hipexp.needle import train
from hipexp.needle.batches import make_batch
from hipexp.needle.locality import LOCALITY
from hipexp.needle.phases import Step
from hipexp.needle.train import Log, choose_near, per_token, prepare, train_step


@pytest.fixture
def example():
    step = Step(1, 192, 5, {"named": 1.0})
    batch = make_batch(step)
    assert len(batch.others) and batch.single
    return step, batch


@pytest.mark.parametrize("fast", [False, True])
def test_a_step_learns(example, fast):
    model, optimizer = prepare("cpu")
    losses = [train_step(model, optimizer, *example, 3e-3, fast).answer.item() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_where_several_tokens_are_right_their_chances_add():
    logits = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([[3, 1, 2, 6]])
    plain, right = per_token(logits, expected, torch.zeros(0, 4, dtype=torch.long))
    logits[0, 2, 5] = 9.0
    each, also_right = per_token(logits, expected, torch.tensor([[0, 3, 2, 5, -1]]))  # position 3 is expected behind the third
    chances = logits[0, 2].softmax(-1)
    assert each[0, 2] == pytest.approx(-float((chances[2] + chances[5]).log()), abs=1e-5)
    assert also_right[0, 2] == 1 and logits[0, 2].argmax() == 5
    assert torch.equal(each[0, [0, 1, 3]], plain[0, [0, 1, 3]]) and torch.equal(right[0, [0, 1, 3]], also_right[0, [0, 1, 3]])


def test_short_prompts_always_see_near_tokens_only_in_the_first_layers():
    for number in range(20):
        choose_near(Step(number, 128, 1, {}))
        assert LOCALITY.near_tok in (128 // 6, 128 // 8, 128 // 12) and LOCALITY.near_layers == (0, 1, 2)
    near = []
    for number in range(200):
        choose_near(Step(number, 768, 1, {}))
        near.append(LOCALITY.near_tok)
    assert 0.6 < sum(map(bool, near)) / len(near) < 0.8


SHORT_RECIPE = [Step(number, 96, 4, {"repeats": 1.0}) for number in range(6)]


@pytest.fixture
def short_recipe(monkeypatch):
    monkeypatch.setattr(train, "STEPS", len(SHORT_RECIPE))
    monkeypatch.setattr(train, "step_of", SHORT_RECIPE.__getitem__)


def test_an_interrupted_training_ends_as_one_in_one_piece(short_recipe, tmp_path):
    assert train.train(tmp_path / "whole", minutes=9, workers=0)
    while not train.train(tmp_path / "pieces", minutes=0, workers=0):
        assert not (tmp_path / "pieces" / "model").exists()
    whole, pieces = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces


def test_a_checkpoint_of_another_recipe_is_refused(short_recipe, tmp_path, monkeypatch):
    assert not train.train(tmp_path, minutes=0, workers=0)
    monkeypatch.setattr(train, "recipe", lambda: "another")
    with pytest.raises(SystemExit, match="another recipe"):
        train.train(tmp_path, minutes=0, workers=0)


def test_the_log_has_a_line_of_every_twenty_fifth_step(tmp_path, example):
    step, batch = example
    measured = train_step(*prepare("cpu"), step, batch, 1e-3, False)
    with open(tmp_path / "log", "w") as file:
        log = Log(file)
        for number in range(60):
            log.add(step._replace(number=number), measured, 1.0)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 3 and '"step": 50' in lines[2]
