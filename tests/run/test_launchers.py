"""Hydra's launchers of several processes, where they are installed: hydra-joblib-launcher 1.2.0, hydra-submitit-launcher 1.2.0."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hipexp
from hipexp.run.ledger import read_json

ROOT = Path(__file__).parents[2]
MODEL = Path(hipexp.__file__).parent / "needle" / "model"
WORDS = ["+pipeline=3stage", "task=infbench", "task.subtasks=[passkey]", "task.samples=1", "task.length_tok=400", "seed=1,2,3"]


def installed(launcher: str) -> bool:
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.hydra_{launcher}_launcher") is not None


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle")
@pytest.mark.parametrize(("launcher", "more"), [("joblib", ["hydra.launcher.n_jobs=2"]), ("submitit_local", [])])
def test_a_launcher_runs_every_point_in_other_processes(tmp_path, launcher, more):
    package = launcher.partition("_")[0]
    if not installed(package):
        pytest.skip(f"hydra-{package}-launcher is not installed")  # no part of hipexp: users add the one they want (docs/sweeps.md)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"HIPEXP_RUNS": str(tmp_path), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hipexp", "-m", f"hydra/launcher={launcher}", *more, *WORDS]
    done = subprocess.run(command, cwd=ROOT, env=own, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = [read_json(path)["state"] for path in tmp_path.glob("infbench/*/status.json")]
    assert states == ["done"] * 3
    assert f"notes and logs of the launcher {launcher}: {tmp_path}/sweep/launch_" in done.stderr
    assert list(tmp_path.glob("sweep/launch_*")), "what its jobs said is kept"
