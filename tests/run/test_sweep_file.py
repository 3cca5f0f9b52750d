"""Sweep files: what they mean, and what is refused."""

import random
import re
import statistics
from pathlib import Path

import pytest
import yaml

from hipexp.config.overrides import conf_dir
from hipexp.config.schema import ConfigError
from hipexp.run.sweep_file import read_sweep
from hipexp.run.sweep_values import read_parameters

COMMAND = ["${env}", "python", "-m", "hipexp", "task=infbench", "task.samples=2", "track=wandb", "track.mode=auto", "${args_no_hyphens}"]
FILE = {"program": "hipexp", "method": "grid", "command": COMMAND, "parameters": {"seed": {"values": [1, 2]}}}


@pytest.fixture
def sweep(tmp_path):
    """``sweep(key=value)``: ``FILE`` with some keys changed, read; None leaves one out."""

    def make(**changes):
        path = tmp_path / "mine.yaml"
        made = {key: value for key, value in (FILE | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(made, sort_keys=False))
        return read_sweep(path)

    return make


def test_a_sweep_of_the_package_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_sweep(Path("quick")).path == conf_dir() / "sweep" / "quick.yaml"
    Path("quick").write_text(yaml.safe_dump(FILE | {"name": "mine"}))  # a file that is there is meant
    assert read_sweep(Path("quick")).name == "mine"
    with pytest.raises(ConfigError, match=r"slow is no sweep file .*go by their names, as in `sweep budget`"):
        read_sweep(Path("slow"))


def parameter(**entry):
    (found,) = read_parameters({"a": entry}, "file")
    return found


def test_a_grid_is_every_combination_in_the_agents_spelling(sweep):
    read = sweep(parameters={"seed": {"value": 3}, "task.length_tok": {"values": [None, 512.0]}, "pipeline": {"values": ["3stage"]}})
    assert [choice.words for choice in read.choices([], None, 0)] == [
        ["task=infbench", "task.samples=2", "seed=3", "task.length_tok=None", "pipeline=3stage"],
        ["task=infbench", "task.samples=2", "seed=3", "task.length_tok=512.0", "pipeline=3stage"],
    ]
    assert read.choices([], None, 0)[1].values == {"seed": 3, "task.length_tok": 512.0, "pipeline": "3stage"}
    assert (read.metric, read.goal, read.stops) == ("average", "maximize", False)


def test_nested_parameters_have_dotted_names(sweep):
    read = sweep(parameters={"pipeline": {"parameters": {"rope": {"parameters": {"prune": {"value": "native"}}}}}, "seed": {"value": 1}})
    assert [one.name for one in read.parameters] == ["pipeline.rope.prune", "seed"]


def test_overrides_win_over_the_command_and_the_parameters(sweep):
    choices = sweep().choices(["+task=passkey", "++seed=7"], None, 0)
    assert [choice.words for choice in choices] == [["task.samples=2", "+task=passkey", "++seed=7"]]
    (one,) = sweep(parameters={"pipeline.stages.0.keep_tok": {"values": [1, 2]}}).choices(["pipeline.stages[0].keep_tok=3"], None, 0)
    assert one.values == {}


def test_tracking_is_left_to_the_user(sweep):
    (choice,) = sweep(parameters={"track": {"value": "wandb"}, "seed": {"value": 1}}).choices(["track=local"], None, 0)
    assert choice.words == ["task=infbench", "task.samples=2", "seed=1", "track=local"]


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ({"value": None}, [None]),
        ({"values": ["a", 1]}, ["a", 1]),
        ({"min": 2, "max": 4}, [2, 3, 4]),
        ({"distribution": "q_uniform", "min": 0, "max": 6, "q": 2}, [0, 2, 4]),  # numpy.arange, as wandb has it
        ({"distribution": "q_uniform", "min": 1, "max": 3}, [1, 2]),
    ],
)
def test_the_values_of_a_grid(entry, values):
    assert parameter(**entry).grid() == values


@pytest.mark.parametrize(
    ("entry", "least", "most", "middle"),
    [
        ({"min": 1, "max": 9}, 1, 9, 5),
        ({"min": 0.0, "max": 8.0}, 0, 8, 4),
        ({"distribution": "uniform", "min": 0, "max": 8}, 0, 8, 4),
        ({"distribution": "q_uniform", "min": 0, "max": 80, "q": 8}, 0, 80, 40),
        ({"distribution": "log_uniform_values", "min": 1, "max": 10000}, 1, 10000, 100),
        ({"distribution": "q_log_uniform_values", "min": 64, "max": 4096, "q": 64}, 64, 4096, 512),
    ],
)
def test_draws_lie_in_their_range_with_the_median_that_is_due(entry, least, most, middle):
    rng, one = random.Random(0), parameter(**entry)
    drawn = [one.draw(rng) for _ in range(4000)]
    assert least <= min(drawn) < middle < max(drawn) <= most
    assert statistics.median(drawn) == pytest.approx(middle, rel=0.15)
    assert all(value % entry["q"] == 0 for value in drawn if "q" in entry)
    assert {type(value) for value in drawn} == ({int} if one.distribution == "int_uniform" or "q" in entry else {float})


def test_probabilities_are_those_of_the_values():
    rng, one = random.Random(0), parameter(values=["a", "b", "c"], probabilities=[0.7, 0.3, 0])
    drawn = [one.draw(rng) for _ in range(4000)]
    assert drawn.count("a") == pytest.approx(2800, abs=100) and "c" not in drawn


def test_random_points_are_the_same_again_and_more_begin_with_the_fewer(sweep):
    ranges = {"seed": {"min": 0, "max": 10**6}, "task.length_tok": {"values": [512, 1024]}}
    read = sweep(method="random", parameters=ranges)
    few, more, other = (read.choices([], count, seed) for count, seed in ((5, 0), (9, 0), (5, 1)))
    assert few == more[:5] and few != other
    assert len({choice.values["seed"] for choice in more}) == 9
    assert [choice.values["seed"] for choice in read.choices(["task.length_tok=512"], 5, 0)] == [choice.values["seed"] for choice in few]
    with pytest.raises(ConfigError, match=r"method=random has no end; say how many points, as in count=20"):
        read.choices([], None, 0)
    assert len(sweep(method="random", parameters=ranges, run_cap=3).choices([], None, 0)) == 3
    assert len(sweep(run_cap=1).choices([], None, 0)) == len(sweep().choices([], 1, 0)) == 1


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (["${env}", "${interpreter}", "-m", "hipexp", "${args}"], "x.py"),
        (["/usr/bin/python3.11", "-m", "hipexp", "${args_override_hydra}"], None),
        (["hipexp", "${args_no_hyphens}"], None),
        (None, "hipexp/__main__.py"),
        (["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"], "hipexp/__main__.py"),
    ],
)
def test_commands_that_are_ours(sweep, command, program):
    assert sweep(command=command, program=program).words == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "bayes"}, r"method=bayes chooses a point by the results before it.*`wandb sweep .*mine.yaml`, then `wandb agent <id>`"),
        ({"method": "hyper"}, r"method=hyper must be grid or random"),
        ({"method": None}, r"method=None must be grid or random"),
        ({"methods": "grid"}, r"methods is unknown; did you mean method\?"),
        ({"parameters": None}, r"parameters must name parameters"),
        ({"parameters": {"seed": 1}}, r"seed=1 must hold value, values, or min and max, as in seed: {value: 1}"),
        ({"parameters": {"seed": {}}}, r"seed must hold value, values, or min and max; it holds nothing"),
        ({"parameters": {"seed": {"min": 1}}}, r"seed must hold .*; it holds min"),
        ({"parameters": {"seed": {"distribution": "normal"}}}, r"seed.distribution=normal is none of constant, categorical"),
        ({"parameters": {"seed": {"distribution": "uniform", "min": 1}}}, r"seed of distribution uniform must hold min and max; it holds min"),
        ({"parameters": {"seed": {"values": []}}}, r"seed.values=\[\] must be a list of values"),
        ({"parameters": {"seed": {"values": [1, 2], "probabilities": [1, 1]}}}, r"seed.probabilities=\[1, 1\] must be a number from 0 for each"),
        ({"parameters": {"seed": {"min": 2, "max": 1}}}, r"seed.min=2 must not be above max=1; exchange them"),
        ({"parameters": {"seed": {"min": "1e-3", "max": 1}}}, r"seed.min='1e-3' must be a number; YAML reads 1e-3 as text"),
        ({"parameters": {"seed": {"distribution": "int_uniform", "min": 1.5, "max": 2}}}, r"seed.min=1.5 must be a whole number"),
        ({"parameters": {"seed": {"distribution": "log_uniform_values", "min": 0, "max": 2}}}, r"seed.min=0 must be above 0"),
        ({"parameters": {"seed": {"distribution": "q_uniform", "min": 0, "max": 2, "q": 0}}}, r"seed.q=0 must be above 0"),
        ({"parameters": {"seed": {"min": 0.0, "max": 1.0}}}, r"seed of distribution uniform has no grid; .*method: random"),
        ({"metric": {"name": "average", "goal": "max"}}, r"metric.goal=max must be minimize or maximize"),
        ({"metric": "average"}, r"metric='average' must hold a name and a goal"),
        ({"run_cap": 0}, r"run_cap=0 must be a whole number from 1"),
        ({"command": None, "program": "train.py"}, r"command `.*` with program=train.py starts something else than hipexp"),
        ({"command": ["python", "train.py", "${args}"]}, r"starts something else than hipexp"),
        ({"command": ["python", "-m", "hipexp", "seed=1"]}, r"passes no parameters on that hipexp takes; end it with \${args_no_hyphens}"),
        ({"command": ["python", "-m", "hipexp", "-m", "${args}"]}, r"-m in command is no key=value of one experiment point"),
        ({"command": ["python", "-m", "hipexp", "seed=${envvar:SEED}", "${args}"]}, r"seed=\${envvar:SEED} in command is no key=value"),
        ({"command": "python -m hipexp"}, r"command='python -m hipexp' must be a list of words"),
    ],
)
def test_what_is_refused(sweep, changes, message):
    with pytest.raises(ConfigError, match=message):
        read = sweep(**changes)
        read.choices([], None, 0)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\0"])
def test_no_sweep_file(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path)) + " is no sweep file"):
        read_sweep(path)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml is no sweep file"):
        read_sweep(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", sorted((conf_dir() / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_along_run_without_wandb(path):
    read = read_sweep(path)
    assert not any("track" in word for word in read.words)
    assert len(read.choices([], None, 0)) >= 12
