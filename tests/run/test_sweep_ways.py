"""The same points as a wandb agent starts them and as a sweep without wandb, in real processes on the embedded model."""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from wandb.sdk.launch.sweeps import utils

import hipexp
from hipexp.config.overrides import conf_dir
from hipexp.run.ledger import is_held, parse_rows, read_json

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "deadbeef"  # of the form of a key of wandb
WORDS = ["+pipeline=3stage", "task=infbench", "task.subtasks=[passkey]", "task.length_tok=4096", "task.samples=4", "track=wandb"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (Path(hipexp.__file__).parent / "needle" / "model" / "config.json").exists(), reason="make needle"),
]


def environment(runs: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"HIPEXP_RUNS": str(runs), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more}


def agent_lines(path: Path) -> list[list[str]]:
    """What an agent starts for every point of a grid, by wandb's own functions."""
    sweep = utils.load_sweep_config(str(path))
    names = list(sweep["parameters"])
    lines = []
    for values in itertools.product(*(sweep["parameters"][name]["values"] for name in names)):
        point = {"args": {name: {"value": value} for name, value in zip(names, values, strict=True)}}
        macros = {**utils.create_sweep_command_args(point), "env": ["/usr/bin/env"]}
        words = [macros[word[2:-1]] if word.startswith("${") else [word] for word in utils.create_sweep_command(list(sweep["command"]))]
        line = list(itertools.chain(*words))
        assert line[:2] == ["/usr/bin/env", "python"]
        lines.append([line[0], sys.executable, *line[2:]])
    return lines


def results(runs: Path) -> dict[str, tuple]:
    """Scores and answers of every run, by its folder."""
    found = {}
    for path in runs.glob("*/*/summary.json"):
        rows, _ = parse_rows((path.parent / "samples.jsonl").read_bytes())
        answers = [(row["subtask"], row["sample"], row["prediction"]) for row in rows]
        found[path.parent.name] = read_json(path)["scores"], answers
    return found


def test_24_points_by_an_agents_command_lines_and_by_a_local_sweep(tmp_path):
    path = conf_dir() / "sweep" / "quick.yaml"
    lines = agent_lines(path)
    assert len(lines) == 24

    def run(number: int) -> int:
        own = environment(tmp_path / "agent", WANDB_SWEEP_ID="sweep0", WANDB_RUN_ID=f"point{number}")
        return subprocess.run(lines[number], cwd=ROOT, env=own, check=False, stdout=subprocess.DEVNULL).returncode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(24))) == [0] * 24
    command = [sys.executable, "-m", "hipexp", "sweep", str(path), "jobs=2"]
    out = subprocess.run(command, cwd=ROOT, env=environment(tmp_path / "local"), check=True, capture_output=True, text=True).stdout
    assert "24 of 24 points are done" in Path(out.splitlines()[-1].removeprefix("table: ")).read_text()
    assert results(tmp_path / "local") == results(tmp_path / "agent")
    assert len(results(tmp_path / "agent")) == 24
    assert len({scores["kv_retrieval"]["score"] for scores, _ in results(tmp_path / "local").values()}) > 1, "points that differ"
    assert len(list((tmp_path / "agent").glob("*/*/wandb/offline-run-*-point*"))) == 24


def test_processes_that_are_killed_in_the_middle_of_runs_lose_nothing_and_repeat_nothing(tmp_path):
    """Two processes at 24 points of four samples, one killed (-9) again and again while its run has one to three of them."""
    rng, runs, folder = random.Random(1), tmp_path / "runs", tmp_path / "out"
    folder.mkdir()
    words = ["sweep", str(conf_dir() / "sweep" / "quick.yaml"), "task.samples=2", "task.length_tok=1024"]

    def start() -> subprocess.Popen:
        with open(folder / f"{time.monotonic_ns()}.log", "w") as log:
            return subprocess.Popen([sys.executable, "-m", "hipexp", *words], cwd=ROOT, env=environment(runs), stdout=log, stderr=log)

    def lines() -> dict[Path, bytes]:
        return {path: data[: data.rfind(b"\n") + 1] for path in runs.glob("*/*/samples.jsonl") if (data := path.read_bytes())}

    def in_the_middle() -> list[tuple[subprocess.Popen, Path]]:
        begun = {path: (path.parent / ".lock").read_text().split() for path, data in lines().items() if 1 <= data.count(b"\n") <= 3}
        held = {words[1]: path for path, words in begun.items() if len(words) > 1 and is_held(path.parent)}
        return [(worker, held[str(worker.pid)]) for worker in workers if str(worker.pid) in held]

    workers, kept, hits, end = [start(), start()], [], 0, time.monotonic() + 600
    while len(kept) < 8 and time.monotonic() < end:
        time.sleep(0.02)
        assert all(worker.poll() in (None, 0) for worker in workers), [path.read_text() for path in folder.iterdir()]
        so_far = sum(data.count(b"\n") for data in lines().values())
        if so_far >= 10 * len(kept) and (victims := in_the_middle()):  # all over the sweep, which has 96 samples
            time.sleep(rng.uniform(0, 0.4))  # somewhere in the next sample, or in the end of the run
            victim, path = rng.choice(victims)
            victim.kill()
            if victim.wait() == -signal.SIGKILL:
                kept.append(lines())
                hits += read_json(path.parent / "status.json")["state"] == "running"
                workers[workers.index(victim)] = start()
    assert len(kept) == 8 and [worker.wait(600) for worker in workers] == [0, 0]
    done = lines()
    assert len(done) == 24
    for path, data in done.items():
        rows, damaged = parse_rows(path.read_bytes())
        assert (sorted((row["subtask"], row["sample"]) for row in rows), damaged) == (
            list(itertools.product(("kv_retrieval", "passkey"), (0, 1))),
            0,
        )
        assert all(data.startswith(before.get(path, b"")) for before in kept), "what was finished at a kill stays as it was"
        told = re.findall(r"INFO (\w+ \d): score", (path.parent / "log.txt").read_text())
        assert len(told) == len(set(told)), "no sample was done twice"
    assert hits >= 4, "half of the kills, or more, hit a run that had some of its samples and not all"
    (table,) = (runs / "sweep").glob("*/table.md")
    assert "24 of 24 points are done" in table.read_text()


def test_sigterm_under_wandb_leaves_a_run_that_goes_on_and_no_key(tmp_path):
    own = environment(tmp_path, WANDB_API_KEY=KEY)
    command = [sys.executable, "-m", "hipexp", *WORDS]
    process = subprocess.Popen(command, cwd=ROOT, env=own)
    while not (files := list(tmp_path.glob("*/*/samples.jsonl"))) or not files[0].stat().st_size:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 1
    assert read_json(files[0].parent / "status.json")["class"] == "interrupted"
    before, _ = parse_rows(files[0].read_bytes())
    assert 1 <= len(before) < 4
    assert subprocess.run(command, cwd=ROOT, env=own, check=False).returncode == 0
    after, damaged = parse_rows(files[0].read_bytes())
    assert (after[: len(before)], len(after), damaged) == (before, 4, 0)
    logs = list(files[0].parent.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2
    assert any(b"score/passkey" in log.read_bytes() and b"running/average" in log.read_bytes() for log in logs)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
