"""The method that ``docs/methods.md`` walks through, built from that page."""

from pathlib import Path

import pytest

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError
from hipexp.run.ledger import read_json
from hipexp.run.point import check_point, execute
from pages import blocks

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "runs"))
    (method,) = (block for block in blocks(PAGE) if block.file == "mean_key.py")
    assert len(method.text.splitlines()) <= 100
    (tmp_path / "mean_key.py").write_text(method.text, encoding="utf-8")
    return tmp_path


def words():
    (command,) = (command for block in blocks(PAGE) for command, _ in block.commands() if "mean_key.py" in command)
    return command.split()[3:]


def test_it_runs_and_is_better_than_a_draw(folder):
    alone = [
        "task=recall",
        "task.geometry=4/2/16",
        "task.contexts_tok=[2048]",
        "task.samples=2",
        "task.divisors=[1]",
        "task.subtasks=[drifting]",
    ]
    sizes = ["pipeline.sink_tok=32", "pipeline.window_tok=64"]

    def held(own):
        (found,) = read_json(execute(compose([*own, *sizes, *alone])) / "summary.json")["recall"].values()
        return found["stages"][0]["mass"]["mean"]

    own = held([word for word in words() if not word.startswith("task")])
    assert held(["+pipeline=random", "pipeline.params.keep_tok=512"]) < own <= 1


def test_another_file_is_another_run(folder):
    from hipexp.run.point import folder_of

    experiment = compose(words())
    before = folder_of(experiment)
    (folder / "mean_key.py").write_text((folder / "mean_key.py").read_text().replace("amax((0, 1, 2))", "mean((0, 1, 2))"))
    assert folder_of(experiment) != before


def test_mistakes_are_told(folder):
    with pytest.raises(ConfigError, match=r"pipeline.params.keep is unknown; did you mean keep_tok\?"):
        check_point(compose([*words(), "pipeline.params.keep=3"]))
    with pytest.raises(ConfigError, match="is no file of Python"):
        check_point(compose([*words(), "pipeline.method=nowhere.py"]))
