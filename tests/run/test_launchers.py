"""Hydra's launchers of several processes, where they are installed: hydra-joblib-launcher 1.2.0, hydra-submitit-launcher 1.2.0."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hipexp
from hipexp.run.ledger import read_json

ROOT = Path(__file__).parents[2]
MODEL = Path(hipexp.__file__).parent / "needle" / "model"
WORDS = ["+pipeline=3stage", "task.samples=1", "task.subtasks=[passkey]"]


LAUNCHERS = """
import sys
class Nothing:  # of Hydra's plugins
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hydra_plugins":
            raise ModuleNotFoundError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Nothing())
from hipexp.cli import main
sys.exit(main(["-m", "hydra/launcher=joblib", "+pipeline=2stage,3stage", "--dry-run"]))
"""


def test_a_launcher_that_is_not_installed_is_told_with_what_installs_it():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHERS], env=os.environ | {"PYTHONPATH": path}, check=False, capture_output=True, text=True
    )
    said = "hydra/launcher=joblib is not installed here; run: python -m pip install 'hipexp[launchers]'"
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle")
@pytest.mark.parametrize(("launcher", "more"), [("joblib", ["hydra.launcher.n_jobs=2"]), ("submitit_local", [])])
def test_a_launcher_runs_every_point_in_other_processes(tmp_path, launcher, more):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="pip install 'hipexp[launchers]'")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"HIPEXP_RUNS": str(tmp_path), "HIPEXP_DATA": str(tmp_path), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "hipexp", "-m", f"hydra/launcher={launcher}", *more, *WORDS, *words]
        return subprocess.run(command, cwd=ROOT, env=own, check=False, capture_output=True, text=True)

    done = start("task=infbench", "task.length_tok=400", "seed=1,2,3")
    assert done.returncode == 0, done.stderr
    states = [read_json(path)["state"] for path in tmp_path.glob("infbench/*/status.json")]
    assert states == ["done"] * 3
    assert f"notes and logs of the launcher {launcher}: {tmp_path}/sweep/launch_" in done.stderr
    assert "3 of 3 points are done" in done.stdout.splitlines()[-1] and "attention:" not in done.stdout + done.stderr
    logs = list(tmp_path.glob("sweep/launch_*/*/job.log" if launcher == "joblib" else "sweep/launch_*/.submitit/*/*_log.out"))
    assert len(logs) == 3 and all(log.read_text().count("attention: ") >= 1 for log in logs), "what its jobs said is kept, each by itself"

    told = start("task=infbench", "task.length_tok=40,400", "seed=1", "--json")
    assert told.returncode == 2, told.stderr
    refused, stored = map(json.loads, told.stdout.splitlines())
    assert (refused["status"], refused["class"]) == ("refused", "bad_config") and refused["overrides"].endswith("task.length_tok=40 seed=1")
    assert stored["status"] == "done" and read_json(Path(stored["folder"]) / "summary.json")["scores"] == stored["scores"]
