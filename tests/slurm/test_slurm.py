"""Sweeps through a real Slurm: `make test-slurm` starts one (cluster.sh) and runs this."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hipexp.config.overrides import conf_dir
from hipexp.run.ledger import parse_rows
from hipexp.run.sweep_file import read_sweep

ROOT = Path(__file__).parents[2]
SAMPLES = 40  # half a minute at least: the scheduler takes its time to preempt
POINTS = ["+pipeline=3stage", "task=infbench", "task.subtasks=[passkey]", f"task.samples={SAMPLES}", "task.length_tok=4096"]
SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=low", "hydra.launcher.cpus_per_task=1"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif("hipexp-slurm-" not in os.environ.get("SLURM_CONF", ""), reason="make test-slurm")]


@pytest.fixture
def start():
    """``start(runs, *words)``: hipexp as a process of its own; what it says goes into a file beside ``runs``."""
    started = []

    def run(runs: Path, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "hipexp", *words]
        with open(runs.with_suffix(".log"), "a") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HIPEXP_RUNS": str(runs)}, stdout=log, stderr=log))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def ask(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def wait_for(what, seconds=300):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def answers(runs: Path) -> dict[str, list]:
    """What each run answered, by its folder."""
    return {
        path.parent.name: [(row["sample"], row["prediction"], row["score"]) for row in parse_rows(path.read_bytes())[0]]
        for path in runs.glob("*/*/samples.jsonl")
    }


def test_a_preempted_job_goes_on_and_the_sweep_ends_with_the_same_results(start, tmp_path):
    runs, plain = tmp_path / "slurm", tmp_path / "plain"
    sweep = start(runs, "-m", *SLURM, *POINTS, "seed=1,2")
    first = wait_for(lambda: next((path for path in runs.glob("*/*/samples.jsonl") if path.stat().st_size), None))
    ask("sbatch", "--partition=high", "--exclusive", "--wait", "--output=/dev/null", "--wrap=sleep 5")
    jobs = ask("scontrol", "--all", "--oneliner", "show", "jobs").splitlines()
    assert any("Partition=low" in job and "Restarts=1" in job for job in jobs), jobs
    before, damaged = parse_rows(first.read_bytes())
    assert 1 <= len(before) < SAMPLES and damaged <= 1
    assert sweep.wait(900) == 0, runs.with_suffix(".log").read_text()
    rows, damaged = parse_rows(first.read_bytes())
    assert (rows[: len(before)], [row["sample"] for row in rows], damaged) == (before, list(range(SAMPLES)), 0)
    assert "continuing after" in "".join(path.read_text() for path in runs.glob("sweep/*/.submitit/*/*.out"))
    assert start(plain, "-m", *POINTS, "seed=1,2").wait(900) == 0
    assert answers(runs) == answers(plain)
    assert len(answers(runs)) == 2


def test_24_points_through_slurm_are_those_of_a_local_sweep(start, tmp_path):
    path = conf_dir() / "sweep" / "quick.yaml"
    read = read_sweep(path)
    values = [f"{one.name}={','.join(map(str, one.grid()))}" for one in read.parameters]
    sweep = start(tmp_path / "slurm", "-m", *SLURM, *read.words, *values)
    assert sweep.wait(1200) == 0, (tmp_path / "slurm.log").read_text()
    assert start(tmp_path / "local", "sweep", str(path)).wait(900) == 0
    assert answers(tmp_path / "slurm") == answers(tmp_path / "local")
    assert len(answers(tmp_path / "slurm")) == 24
