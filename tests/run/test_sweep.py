"""``python -m hipexp sweep`` on the fake model: table, failures, resuming, processes that share and die."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import fake_hf
import hipexp
from hipexp.config.schema import ConfigError
from hipexp.report.runs import load_runs
from hipexp.run import identity, retry, sharing
from hipexp.run.ledger import Interrupted, is_held, parse_rows, read_json, runs_root
from hipexp.run.point import missing_folder, prepare
from hipexp.run.several import Named
from hipexp.run.sharing import Shared, run_each
from hipexp.run.sweep import main
from hipexp.suites.sample import DataMissing

COMMAND = ["${env}", "python", "-m", "hipexp", "task=infbench", "task.subtasks=[passkey]", "task.samples=2", "task.length_tok=400"]


@pytest.fixture
def sweep_file(model_folder, tmp_path):
    """``sweep_file(parameters, key=value)`` writes one of small points of the fake model and returns its path."""

    def make(parameters, **more):
        path = tmp_path / "mine.yaml"
        command = [*COMMAND, f"model.path={model_folder}", "track=wandb", "${args_no_hyphens}"]
        path.write_text(yaml.safe_dump({"method": "grid", "command": [word for word in command if word.split("=")[0] not in parameters], "parameters": parameters, **more}, sort_keys=False))
        return str(path)

    return make


def lines(out: str) -> list[list[str]]:
    """The lines of the table, by cells."""
    return [re.split(r"  +", line.strip()) for line in out.splitlines() if " hipexp " in line or " refused" in line or " failed: " in line]


def metrics(monkeypatch, value_of):
    """Give every finished point the metric that ``value_of`` tells by its summary."""
    from hipexp.run import sweep

    monkeypatch.setattr(sweep, "metrics_of", lambda summary: {"average": value_of(summary)})


@pytest.mark.parametrize("goal", ["maximize", "minimize"])
def test_the_table_is_sorted_by_the_metric_and_shows_what_varies(fake, sweep_file, monkeypatch, capsys, goal):
    path = sweep_file({"seed": {"values": [1, 2, 3]}, "task.wording": {"value": "default"}}, metric={"name": "average", "goal": goal})
    keys = {}
    metrics(monkeypatch, lambda summary: keys.setdefault(summary["run_key"], (30.0, 10.0, 20.0)[len(keys) % 3]))
    assert main([path]) == 0
    out = capsys.readouterr().out
    shown = [float(line[1]) for line in lines(out)]
    assert shown == sorted(shown, reverse=goal == "maximize") and len(set(shown)) == 3
    assert {line[0] for line in lines(out)} == {"1", "2", "3"} and "default" not in out
    place = Path(out.splitlines()[-1].removeprefix("table: "))
    assert place.parent.parent == runs_root() / "sweep"
    assert "3 of 3 points are done" in place.read_text()
    calls = fake.calls
    assert main([path]) == 0
    assert fake.calls == calls == 6 and lines(capsys.readouterr().out) == lines(out)


def test_a_point_that_fails_is_shown_and_does_not_stop_the_others(fake, sweep_file, monkeypatch, capsys):
    generate = hipexp.hf.generate

    def sometimes(*args, **more):
        if fake.calls == 1:
            fake.calls += 1
            raise MemoryError("too long a prompt")
        return generate(*args, **more)

    monkeypatch.setattr(hipexp.hf, "generate", sometimes)
    path = sweep_file({"seed": {"values": [1, 2, 3]}})
    assert main([path]) == 1
    said = capsys.readouterr()
    assert [line[-2] for line in lines(said.out)] == ["done", "done", "failed: out_of_memory"]
    assert "failed (out_of_memory): too long a prompt; log: " in said.err
    assert main([path]) == 0  # again: only what is missing
    assert fake.calls == 1 + 1 + 4 + 1


def test_a_refused_point_is_shown_before_the_others_run(fake, sweep_file, capsys):
    path = sweep_file({"task.samples": {"values": [0, 2]}})
    assert main([path]) == 2
    said = capsys.readouterr()
    assert next(line[-2] for line in lines(said.out)) == "done" and "refused: bad_config" in said.out
    assert said.err.startswith("refused: ") and "task.samples=0: task.samples=0 must be" in said.err
    assert fake.calls == 2
    with pytest.raises(ConfigError, match=r"task.sampels is unknown"):
        main([sweep_file({"task.sampels": {"values": [1, 2]}})])


def test_a_dry_run_lists_the_points_and_runs_nothing(fake, sweep_file, capsys):
    path = sweep_file({"seed": {"min": 0, "max": 9}}, method="random")
    assert main([path, "--dry-run", "count=3", "task.samples=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("to do") == 3 and "3 points, 0 of them done" in out and out.count("task.samples=1") == 3 and "samples=2" not in out
    assert fake.calls == 0 and not runs_root().exists()


def test_points_that_are_the_same_run_are_one(fake, sweep_file, capsys):
    assert main([sweep_file({"seed": {"values": [1, 1.0, "1"]}})]) == 0
    assert fake.calls == 2 and len(lines(capsys.readouterr().out)) == 1


def test_a_metric_that_nothing_measures_is_told_after_the_first_point_and_refused_after_the_table(fake, sweep_file, capsys):
    with pytest.raises(ConfigError, match=r"metric.name=loss is measured by no point of this sweep that is done; there are average, latency.decode_ms"):
        main([sweep_file({"seed": {"values": [1, 2]}}, metric={"name": "loss"})])
    assert fake.calls == 4
    said = capsys.readouterr()
    assert said.err.count("warning: ") == 1 and "loss is measured by no point of this sweep that is done" in said.err
    assert "[2/2]" in said.out and "table: " in said.out


def test_what_grows_under_hyperband_is_a_metric_without_wandb_too(fake, sweep_file, capsys):
    path = sweep_file({"seed": {"values": [1, 2]}}, metric={"name": "running/average", "goal": "maximize"}, early_terminate={"type": "hyperband", "min_iter": 2})
    assert main([path]) == 0
    out = capsys.readouterr().out
    assert "early_terminate is for wandb's server" in out and [line[1] for line in lines(out)] == ["100.0", "100.0"]


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that cannot be reached; the list of what was asked of it."""
    import huggingface_hub

    asked = []

    def fail(path, name, revision=None):
        asked.append(path)
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(identity, "_ABSENT", {})
    return asked


def test_a_point_whose_model_is_missing_is_a_row_and_the_others_run(fake, sweep_file, no_hub, capsys, model_folder):
    path = sweep_file({"seed": {"values": [1, 2]}, "model.path": {"values": ["org/none", str(model_folder)]}})
    assert main([path, "--dry-run"]) == 2
    out = capsys.readouterr().out
    assert out.count("refused: data_missing") == 2 and out.count("to do") == 2 and not runs_root().exists()
    assert main([path, "--json"]) == 2
    said = capsys.readouterr()
    told = json.loads(said.out)["points"]
    assert [one["state"] for one in told] == ["done", "done", "refused: data_missing", "refused: data_missing"] and fake.calls == 4
    assert "no route to the hub" in told[2]["message"] and said.err.count("refused: ") == 2
    assert no_hub == ["org/none"], "asked once, and not for every point"
    failed = [(run.failure, run.config["seed"]) for run in load_runs(state="failed")]
    assert sorted(failed) == [("data_missing", 1), ("data_missing", 2)]  # both of one second: their order is that of names


def test_a_sweep_whose_points_all_miss_their_model_shows_them(fake, sweep_file, no_hub, capsys):
    assert main([sweep_file({"seed": {"values": [1, 2]}, "model.path": {"value": "org/none"}})]) == 2
    assert capsys.readouterr().out.count("refused: data_missing") == 2


def test_what_was_missing_is_retried_when_it_is_here(fake, experiment, no_hub, model_folder, capsys, monkeypatch):
    """Data or a model that are not here make a failed run; the result has another folder, since its key holds what they are."""
    one = experiment()
    one.model.path = "org/none"
    for _ in range(2):
        with pytest.raises(DataMissing):
            prepare(one)
    (run,) = load_runs()
    assert (run.state, run.failure, run.folder) == ("failed", "data_missing", missing_folder(one))
    assert retry.main(["class=data_missing"]) == 1 and "data_missing: " in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(model_folder / "config.json"))
    monkeypatch.setattr(identity, "_ABSENT", {})
    assert retry.main(["class=data_missing"]) == 0 and "  done: average 100" in capsys.readouterr().out
    assert [run.state for run in load_runs()] == ["done"] and not missing_folder(one).exists()


def test_a_folder_without_weights_is_missing_until_they_are_there(fake, experiment, model_folder, capsys):
    one = experiment()
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(DataMissing, match="holds no weights"):
        prepare(one)
    assert [run.failure for run in load_runs()] == ["data_missing"] and fake.calls == 0
    (model_folder / "model.safetensors").write_bytes(b"weights")
    assert retry.main(["class=data_missing"]) == 0
    assert [run.state for run in load_runs()] == ["done"]


def test_json_and_quiet_say_one_thing_on_stdout(fake, sweep_file, capsys):
    path = sweep_file({"seed": {"values": [1, 2]}}, metric={"name": "average", "goal": "maximize"})
    assert main([path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["metric"], one["state"], one["values"]["seed"]) for one in told["points"]] == [(100.0, "done", 1), (100.0, "done", 2)]
    assert Path(told["table"]).is_file() and Path(told["points"][0]["folder"]).is_dir()
    assert main([path, "--quiet"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == (told["table"] + "\n", "")
    assert main([path, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["table"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"sweep takes one file, and there are 0; write it as in sweep conf/sweep/budget.yaml"),
        (["a.yaml", "b.yaml"], r"there are 2"),
        (["a.yaml", "count=0"], r"count=0 must be a whole number from 1"),
        (["a.yaml", "sweep_seed=x"], r"sweep_seed=x must be a whole number from 0"),
        (["a.yaml", "jobs=0"], r"jobs=0 must be"),
    ],
)
def test_words_that_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        main(words)


def test_a_failure_elsewhere_is_not_tried_again_but_an_interruption_is(fake, sweep_file, experiment):
    point = Shared.of(Named("one", experiment()))
    point.folder.mkdir(parents=True)
    for kind, failed in (("error", True), ("interrupted", False)):
        (point.folder / "status.json").write_text(f'{{"state": "failed", "class": "{kind}"}}')
        assert point.failed is failed
        assert not Shared.of(point.run).failed
    fake_calls = fake.calls
    (point.folder / "status.json").write_text('{"state": "failed", "class": "error"}')
    assert run_each([point]) == {} and fake.calls == fake_calls


def test_a_process_whose_parent_is_gone_starts_no_point(fake, experiment, monkeypatch):
    monkeypatch.setattr(sharing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: False))
    with pytest.raises(Interrupted, match="the process that started this one is gone"):
        run_each([Shared.of(Named("one", experiment()))])
    assert fake.calls == 0


def work(path: str, seconds: float, log: str) -> None:
    """A worker that may be killed at any time: the command, with what it printed in ``log``."""
    fake_hf.SETTINGS.seconds = seconds
    with open(log, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        os._exit(main([path]))


def running(workers) -> list[int]:
    """The places of those workers that are running a point now, by the locks they hold."""
    locks = [lock.read_text().split() for lock in runs_root().glob("infbench/*/.lock") if is_held(lock.parent)]
    pids = {int(words[1]) for words in locks if len(words) == 4}
    return [place for place, worker in enumerate(workers) if worker.pid in pids]


@pytest.mark.slow
def test_eight_workers_that_are_killed_at_random_lose_nothing_and_repeat_nothing(fake, sweep_file, monkeypatch, tmp_path):
    """Every sample is done once, and once more for each kill that hit it, at most."""
    rng, count = random.Random(0), tmp_path / "count"
    generate = hipexp.hf.generate

    def counted(*args, **more):
        made = generate(*args, **more)
        with open(count, "ab", buffering=0) as file:
            file.write(b".")
        return made

    monkeypatch.setattr(hipexp.hf, "generate", counted)
    path = sweep_file({"seed": {"min": 1, "max": 16}, "task.samples": {"value": 4}})
    make = multiprocessing.get_context("fork").Process

    def begin():
        process = make(target=work, args=(path, 0.3, str(tmp_path / "log")))
        process.start()
        return process

    workers, kills, end = [begin() for _ in range(8)], 0, time.monotonic() + 120
    while kills < 20 and time.monotonic() < end:
        time.sleep(rng.uniform(0.05, 0.3))
        if victims := running(workers):
            place = rng.choice(victims)
            os.kill(workers[place].pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            workers[place].join()
            kills += workers[place].exitcode != 0
            workers[place] = begin()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 8, (tmp_path / "log").read_text()
    assert kills == 20
    folders = list(runs_root().glob("infbench/*"))
    assert len(folders) == 16
    for folder in folders:
        rows, damaged = parse_rows((folder / "samples.jsonl").read_bytes())
        assert sorted(row["sample"] for row in rows) == [0, 1, 2, 3] and damaged == 0
        assert read_json(folder / "status.json")["state"] == "done" and not is_held(folder)
    assert 16 * 4 <= count.stat().st_size <= 16 * 4 + kills
