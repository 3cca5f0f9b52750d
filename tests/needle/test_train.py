"""A step of the training, its phases, its checkpoints, and how it is interrupted."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest
import torch

from hipexp.config.schema import ConfigError
from hipexp.needle import phases, train
from hipexp.needle.batches import make_batch
from hipexp.needle.locality import LOCALITY
from hipexp.needle.phases import Phase, Step
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
    with pytest.raises(ConfigError, match="another recipe"):
        train.train(tmp_path, minutes=0, workers=0)


TWO_PHASES = tuple(
    Phase(lengths=((steps, 96),), step_tok=384, peak=peak, warm_up_steps=1, decay=1.0, mixtures=((0, {"repeats": 1.0}),), fast=fast)
    for steps, peak, fast in ((3, 4e-3, False), (4, 2e-3, True))
)


@pytest.mark.parametrize("pieces", [[(9, 2)], [(0, 0), (0, 2), (0, 0), (0, 1), (9, 0)], [(0, 2), (9, 1)]])
def test_each_phase_has_its_own_rates_precision_and_optimizer_state(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(phases, "PHASES", TWO_PHASES)
    monkeypatch.setattr(train, "STEPS", 7)
    seen = []

    def recorded(model, optimizer, step, batch, rate, fast):
        seen.append((step.number, round(rate, 6), fast, bool(optimizer.state)))
        return train_step(model, optimizer, step, batch, rate, fast)

    monkeypatch.setattr(train, "train_step", recorded)
    finished = [train.train(tmp_path, minutes, workers) for minutes, workers in pieces]
    assert finished == [False] * (len(pieces) - 1) + [True]
    assert seen == [
        (0, 4e-3, False, False),
        (1, 2.667e-3, False, True),
        (2, 1.333e-3, False, True),
        (3, 2e-3, True, False),
        (4, 1.5e-3, True, True),
        (5, 1e-3, True, True),
        (6, 5e-4, True, True),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_training_behind_its_step(short_recipe, tmp_path, monkeypatch, number):
    assert train.train(tmp_path / "whole", minutes=9, workers=0)

    def struck(model, optimizer, step, *rest):
        if step.number == 2:
            signal.raise_signal(number)
        return train_step(model, optimizer, step, *rest)

    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", struck)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path / "struck", minutes=9, workers=0)
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "struck" / "train.pt", weights_only=True)["step"] == 3
    assert train.train(tmp_path / "struck", minutes=9, workers=0)
    whole, again = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "struck"))
    assert whole == again


# Each step waits, so that the processes that make prompts are all far ahead and wait to hand over theirs.
SLOW_TRAINING = """
    import sys, time
    from hipexp.needle import train
    from hipexp.needle.phases import Step
    trained = train.train_step

    def slow(*arguments):
        print("begun", flush=True)
        time.sleep(2)
        return trained(*arguments)

    train.train_step, train.STEPS = slow, 99
    train.step_of = lambda number: Step(number, 192, 8, {"pairs": 1.0})
    sys.exit(train.main(["--out", sys.argv[1], "--workers", "2"]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_no_process_outlives_a_training_that_is_stopped(tmp_path, number):
    command = [sys.executable, "-c", textwrap.dedent(SLOW_TRAINING), str(tmp_path)]
    # All its processes hold its output: that ends with the last of them.
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        assert any("begun" in line for line in running.stdout)
        with pytest.raises(ConfigError, match="another training"):
            train.train(tmp_path, minutes=0, workers=0)
        time.sleep(1)
        if number == signal.SIGKILL:
            running.kill()
        else:  # a batch system tells all processes, as a terminal does
            os.killpg(running.pid, number)
        said, _ = running.communicate(timeout=20)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    if number == signal.SIGTERM:
        assert running.returncode == 1 and "the same command continues" in said and "Traceback" not in said
        assert torch.load(tmp_path / "train.pt", weights_only=True)["step"] >= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "-1"], "--workers -1 must be a number from 0 on"),
        (["--minutes", "nan"], "--minutes nan must be a number from 0 on"),
        (["--out", "{file}"], "--out must be a folder that can be written (File exists)"),
        (["--out", "{file}/below"], "--out must be a folder that can be written (Not a directory)"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, words, said):
    (tmp_path / "file").touch()
    assert train.main(["--out", str(tmp_path / "out"), *(word.format(file=tmp_path / "file") for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("damage", [lambda whole: whole[:-2000], lambda whole: b"", lambda whole: b"text"])
def test_a_damaged_checkpoint_is_one_line(short_recipe, tmp_path, capsys, damage):
    assert not train.train(tmp_path, minutes=0, workers=0)
    checkpoint = tmp_path / "train.pt"
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    capsys.readouterr()
    assert train.main(["--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {checkpoint} is no checkpoint that can be read") and "remove it" in line


def test_what_torch_saved_but_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"model": 1}, tmp_path / "train.pt")
    with pytest.raises(ConfigError, match="KeyError"):
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
