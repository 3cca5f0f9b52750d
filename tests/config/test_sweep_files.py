"""The sweep files give command lines, built by wandb's own functions, that compose."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils

from hipexp.config.compose import compose
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import Track
from hipexp.run.sweep_file import read_sweep

SWEEPS = sorted((conf_dir() / "sweep").glob("*.yaml"))
SPELLINGS = ("args", "args_append_hydra", "args_override_hydra")


def choices(parameter):
    """All values of one parameter of a grid sweep."""
    return parameter["values"] if "values" in parameter else [parameter["value"]]


def points(sweep):
    """Every point as the sweep server sends it to an agent."""
    names = list(sweep["parameters"])
    for values in itertools.product(*(choices(sweep["parameters"][name]) for name in names)):
        yield {"args": {name: {"value": value} for name, value in zip(names, values, strict=True)}}


def command_line(command, point, spelling):
    """The words an agent starts, macros filled in as the agent does it; ``spelling`` replaces the macro of the arguments."""
    macros = {**utils.create_sweep_command_args(point), "env": ["/usr/bin/env"], "interpreter": ["python"], "program": ["unused"]}
    words = []
    for word in map(str, utils.create_sweep_command(list(command))):
        word = word.replace("args_no_hyphens", spelling)
        words += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return words


def test_there_are_sweeps():
    assert {"budget", "offload", "quick", "rope", "stages"} <= {path.stem for path in SWEEPS}


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_composes_as_the_agent_starts_it_and_is_that_of_the_local_sweep(path: Path):
    sweep = utils.load_sweep_config(str(path))
    seen = []
    for point in points(sweep):
        words = command_line(sweep["command"], point, "args_no_hyphens")
        assert words[:4] == ["/usr/bin/env", "python", "-m", "hipexp"]
        seen.append(compose(words[4:]))
        assert (seen[-1].track.name, seen[-1].track.mode) == ("wandb", "auto"), "the server waits for the metric"
    assert all(one != other for one, other in itertools.combinations(seen, 2))
    local = [compose(choice.words) for choice in read_sweep(path).choices([], None, 0)]
    assert local == [dataclasses.replace(one, track=Track(name="local")) for one in seen]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_spelling_of_the_agent_means_the_same(path: Path, spelling):
    sweep = utils.load_sweep_config(str(path))
    first, *_, last = points(sweep)
    for point in (first, last):
        usual, other = (command_line(sweep["command"], point, name)[4:] for name in ("args_no_hyphens", spelling))
        assert compose(other) == compose(usual)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_valid_yaml_with_what_wandb_asks_for(path: Path):
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"method", "metric", "parameters", "command", "program"} <= set(sweep)
    assert {"name", "goal"} <= set(sweep["metric"])


def test_values_as_an_agent_prints_them():
    args = {
        "pipeline": "3stage",
        "pipeline.stages.2.keep_tok": 1024.0,
        "task.length_tok": None,
        "task.subtasks": ["passkey", "kv_retrieval"],
    }
    point = {"args": {name: {"value": value} for name, value in args.items()}}
    experiment = compose(utils.create_sweep_command_args(point)["args"])
    assert experiment.pipeline.stages[2].keep_tok == 1024
    assert experiment.task.length_tok is None and experiment.task.subtasks == ["passkey", "kv_retrieval"]
