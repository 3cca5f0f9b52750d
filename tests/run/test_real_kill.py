"""The real command line, killed and started again, on the embedded model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hipexp
from hipexp.run.ledger import parse_rows, read_json, read_rows

MODEL = Path(hipexp.__file__).parent / "needle" / "model"
ROOT = Path(__file__).parents[2]
WORDS = ["+pipeline=3stage", "model=needle", "task=infbench", "task.subtasks=[passkey]", "task.samples=4", "task.length_tok=4096"]


def start(runs: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"HIPEXP_RUNS": str(runs), "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-m", "hipexp", *WORDS], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="the embedded model is not trained yet: make needle")
def test_a_killed_run_ends_with_the_same_result(tmp_path):
    killed = start(tmp_path / "killed")
    while not (files := list(tmp_path.glob("killed/*/*/samples.jsonl"))) or not files[0].stat().st_size:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before, _ = parse_rows(files[0].read_bytes())
    assert 1 <= len(before) < 4
    folders = []
    for name in ("killed", "whole"):
        run = start(tmp_path / name)
        out, _ = run.communicate()
        assert run.returncode == 0
        folders.append(Path(out.splitlines()[-1]))
    again, whole = map(read_rows, folders)
    assert again[: len(before)] == before
    answers = [[(row["sample"], row["prediction"], row["score"], row["new_tok"]) for row in rows] for rows in (again, whole)]
    assert answers[0] == answers[1]
    assert len(whole) == 4
    summaries = [read_json(folder / "summary.json") for folder in folders]
    assert summaries[0]["scores"] == summaries[1]["scores"]
