"""``--dry-run``, ``--quiet`` and ``--json`` of points and sweeps."""

import json
from pathlib import Path

import pytest

from hipexp import cli
from hipexp.config.schema import ConfigError, Pipeline
from hipexp.report.runs import load_runs
from hipexp.run import plan as module
from hipexp.run.ledger import read_json
from hipexp.run.plan import plan, progress
from hipexp.run.point import execute, folder_of

WORDS = ["task=infbench", "task.subtasks=[passkey]", "task.length_tok=600", "task.samples=3"]


@pytest.fixture
def fast(fake, monkeypatch, model_folder):
    """The fake model; its layers are all alike. Gives the words that choose it."""
    monkeypatch.setattr(module, "layers_of", lambda folder, dtype: ([], []))
    return ["model=hf", f"model.path={model_folder}", *WORDS]


def test_what_is_left(fake, fast, experiment):
    one, calls = experiment(), fake.calls
    told = plan(one)
    assert (told["samples"], told["finished"], told["left"], told["stored"]) == (8, 0, 8, False)
    assert told["folder"] == str(folder_of(one)) and not folder_of(one).exists() and fake.calls == calls
    assert told["config"]["task"]["samples"] == 4 and progress(told) == "not begun: 8 sample(s), 8 left"
    execute(one)
    assert (plan(one)["left"], plan(one)["finished"], plan(one)["stored"]) == (0, 8, True)
    path = folder_of(one) / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    told = plan(one)
    assert (told["left"], told["finished"], told["stored"]) == (5, 3, False)
    assert progress(told) == "3 of 8 sample(s) finished, 5 left"


def test_the_plan_is_what_the_run_prints(fast, experiment):
    one = experiment(Pipeline("streaming", "streaming"))
    told = plan(one)
    assert told["strategy"] == read_json(execute(one) / "card.json")["strategy"]
    assert told["run_key"] == read_json(folder_of(one) / "summary.json")["run_key"]


def test_measurements_are_counted(fast, experiment):
    assert plan(experiment(name="latency", lengths_tok=[600, 700], repeats=3, decode_steps=4))["samples"] == 6
    streaming = Pipeline("streaming", "streaming")
    assert plan(experiment(streaming, name="latency", lengths_tok=[600, 700], repeats=3, decode_steps=4, dense_max_tok=600))["samples"] == 9
    assert plan(experiment(name="passkey", lengths_tok=[600, 700], depths=[0.5], samples=2))["samples"] == 4


def test_what_the_run_would_refuse(fast, experiment):
    with pytest.raises(ConfigError, match="use at least"):
        plan(experiment(length_tok=40))


def test_a_dry_run_of_a_point(fast, fake, capsys):
    calls = fake.calls
    assert cli.main([*fast, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "  length_tok: 600\n" in out and "\nattention: dense, every token\nnot begun: 3 sample(s), 3 left\n" in out
    folder = out.splitlines()[-1]
    assert cli.main([*fast, "--dry-run", "--quiet"]) == 0
    assert capsys.readouterr().out == folder + "\n"
    assert cli.main([*fast, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["folder"], told["left"], told["config"]["pipeline"]) == (folder, 3, None)
    assert fake.calls == calls


def test_a_dry_run_of_a_sweep(fast, fake, capsys):
    assert cli.main([*fast, "--quiet"]) == 0
    calls = fake.calls
    capsys.readouterr()
    assert cli.main(["-m", "pipeline=dense,streaming", "seed=0,1", *fast, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("stored: all 3") == 1 and out.count("not begun: 3") == 3 and "[2/4] pipeline=dense seed=1 " in out
    assert out.endswith("\n\n4 run(s), 9 sample(s) left\n") and fake.calls == calls
    assert cli.main(["-m", "seed=0,1", *fast, "--dry-run", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["left"], one["config"]["seed"]) for one in lines] == [(0, 0), (3, 1)] and lines[1]["overrides"].startswith("seed=1")
    assert cli.main(["-m", "hydra/sweeper=basic", "seed=0,1", *fast, "--dry-run"]) == 2
    assert "chooses them as it goes" in capsys.readouterr().err


def test_quiet_and_json_say_one_thing_on_stdout(fast, capsys):
    assert cli.main([*fast, "--quiet"]) == 0
    told = capsys.readouterr()
    folder = told.out.removesuffix("\n")
    assert read_json(Path(folder) / "summary.json")["average"] == 100.0 and "\n" not in folder and told.err == ""
    assert cli.main([*fast, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == read_json(Path(folder) / "summary.json") | {"folder": folder} and told.out.count("\n") == 1
    assert "stored result of" in told.err and "passkey" in told.err
    assert cli.main(["-m", "seed=0,1", *fast, "--json"]) == 0
    assert [json.loads(line)["average"] for line in capsys.readouterr().out.splitlines()] == [100.0, 100.0]


def test_a_sweep_goes_on_past_what_is_missing_and_says_so_in_the_end(fast, fake, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "nothing"))
    words = ["-m", "task=longbench,infbench", *fast[:2], "task.samples=1"]
    assert cli.main([*words, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("refused: task=longbench ") and "1 run(s)," in said.out
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "longbench needs data.zip" in said.err and fake.calls > 0
    (missing,) = load_runs(state="failed")
    assert (missing.failure, missing.folder.parent.name) == ("data_missing", "longbench")
    assert "refused: data_missing" in said.out and missing.folder.name in said.out and said.out.splitlines()[-1].startswith("1 of 2 points are done")
    assert cli.main([*words, "--json"]) == 2
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (first["status"], first["class"], first["folder"]) == ("refused", "data_missing", str(missing.folder))
    assert second["status"] == "done" and read_json(Path(second["folder"]) / "summary.json")["average"] == second["average"]


def test_one_point_whose_data_are_missing_is_a_failed_run(fast, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "nothing"))
    assert cli.main(["task=longbench", *fast[:2], "--dry-run"]) == 2
    assert len(load_runs()) == 0
    assert cli.main(["task=longbench", *fast[:2]]) == 2
    assert "error: longbench needs data.zip" in capsys.readouterr().err
    (run,) = load_runs()
    assert (run.failure, run.config["task"]["name"]) == ("data_missing", "longbench") and "data pull longbench" in run.status["message"]


def test_a_failure_is_told_however_quiet_a_run_is(fast, fake, capsys):
    fake.fail = MemoryError("9 GB")
    for flag in ("--quiet", "--json"):
        assert cli.main([*fast, flag]) == 1
        told = capsys.readouterr()
        assert told.out == "" and "error: out of memory (9 GB)" in told.err


def test_the_embedded_model_is_planned_without_its_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    monkeypatch.setattr("hipexp.run.point.load_model", lambda model: pytest.fail("loaded"))
    assert cli.main(["+pipeline=3stage", *WORDS, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "layers 0-2 (early)" in "\n".join(told["strategy"]) and told["left"] == 3 and list(tmp_path.iterdir()) == []
