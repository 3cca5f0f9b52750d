"""Several points: processes with the same ones share them."""

import dataclasses
import signal
import time
from pathlib import Path

import pytest
import torch

import hipexp
from hipexp.config.schema import ConfigError
from hipexp.run.ledger import Interrupted, is_held, locked, make_folder, read_rows
from hipexp.run.point import folder_of, stored
from hipexp.run.several import compose_named, helpers, run_all, split_jobs

MODEL = Path(hipexp.__file__).parent / "needle" / "model"


@pytest.fixture
def real_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    return tmp_path


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def some(n: int, *words: str):
    common = ["task=infbench", "task.subtasks=[passkey]", "task.length_tok=400", "task.samples=2", *words]
    return [compose_named(f"point {seed}", [*common, f"seed={seed}"], []) for seed in range(n)]


def test_what_another_process_is_running_comes_last(fake, model_folder, capsys):
    points = some(3, f"model.path={model_folder}")
    folder = folder_of(points[0].experiment)
    make_folder(folder)
    done = []
    lock = locked(folder / ".lock")
    lock.__enter__()
    assert is_held(folder)

    def after():
        done.append([stored(point.experiment) for point in points])
        if len(done) == 2:
            lock.__exit__(None, None, None)

    run_all(points, after=after)
    assert done == [[False, True, False], [False, True, True], [True, True, True]]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")] == [
        "[1/3] point 1",
        "[2/3] point 2",
        "[3/3] point 0",
    ]
    run_all(points, after=lambda: pytest.fail("there is nothing to do"))


def test_what_another_process_finished_meanwhile_is_not_run(fake, model_folder, capsys):
    points = some(3, f"model.path={model_folder}")
    run_all(points, after=lambda: run_all(points[1:]))
    assert "[2/3]" not in capsys.readouterr().out
    assert fake.calls == 6


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "", "1.5", "²"])
def test_a_number_of_processes_is_one(jobs):
    with pytest.raises(ConfigError, match=f"jobs={jobs} must be a whole number from 1"):
        split_jobs(["a=1", f"jobs={jobs}"])
    with pytest.raises(ConfigError, match="jobs= is said 2 times"):
        split_jobs(["a=1", "jobs=1", "jobs=3", "b"])
    assert split_jobs(["a=1", "jobs=3", "b"]) == (3, ["a=1", "b"])
    assert split_jobs(["a=1"]) == (1, ["a=1"])


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle")
def test_two_processes_share_the_points(real_runs):
    points, threads = some(12, "model=needle"), torch.get_num_threads()
    with helpers(points, 2, real_runs):
        assert torch.get_num_threads() == max(1, threads // 2)
        wait_for(lambda: list(real_runs.glob("infbench/*/.lock")))  # of the other process
        run_all(points)
    assert torch.get_num_threads() == threads
    assert all(stored(point.experiment) for point in points)
    assert all(len(read_rows(folder_of(point.experiment))) == 2 for point in points)
    assert "/12] point " in (real_runs / "job-2.log").read_text()


def test_a_process_that_fails_leaves_its_points_to_the_others(real_runs, capsys):
    (point,) = some(1, "model=needle")
    model = dataclasses.replace(point.experiment.model, path=str(real_runs / "nowhere"))
    broken = [dataclasses.replace(point, experiment=dataclasses.replace(point.experiment, model=model))]
    with helpers(broken, 3, real_runs):
        pass
    told = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in told] == [str(real_runs / f"job-{number}.log") for number in (2, 3)]
    assert all("Error" in (real_runs / f"job-{number}.log").read_text() for number in (2, 3))


def test_processes_end_with_an_error_of_the_first(real_runs):
    points = some(40, "model=needle", "task.length_tok=6000")
    with pytest.raises(KeyboardInterrupt), helpers(points, 2, real_runs):
        wait_for(lambda: list(real_runs.glob("infbench/*/.lock")))
        raise KeyboardInterrupt
    assert not any(stored(point.experiment) for point in points[2:])
    assert not any(is_held(folder_of(point.experiment)) for point in points)


def test_processes_end_when_the_first_is_asked_to_stop(real_runs):
    """Between its runs too, where no folder is held."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        points = some(40, "model=needle", "task.length_tok=6000")
        with pytest.raises(Interrupted), helpers(points, 2, real_runs):
            wait_for(lambda: list(real_runs.glob("infbench/*/.lock")))
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it goes on")
        assert not any(is_held(folder_of(point.experiment)) for point in points)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_points_no_processes(tmp_path):
    with helpers([], 3, tmp_path / "none"):
        assert not (tmp_path / "none").exists()
