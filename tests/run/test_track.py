import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hipexp.config import wandb_key
from hipexp.config.schema import Track
from hipexp.run.ledger import LESS_MEMORY, RunFailed, read_json, read_rows, runs_root
from hipexp.run.point import execute
from hipexp.track import open_trackers
from hipexp.track.metrics import metrics_of
from hipexp.track.wandb import WandbTracker, mode_of


class FakeRun:
    def __init__(self, settings):
        self.settings, self.logged, self.summary, self.ended = settings, [], {}, None

    def log(self, data):
        self.logged.append(data)

    def finish(self, exit_code=0):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; ``runs`` are what was started."""
    module = ModuleType("wandb")
    module.runs = []

    def init(**settings):
        module.runs.append(FakeRun(settings))
        return module.runs[-1]

    module.init = init
    module.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
    module.Image = lambda path: path
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return module


def tracked(experiment):
    one = experiment()
    one.track = Track(name="wandb")
    return one


def test_wandb_hears_everything_offline(fake, experiment, wandb):
    folder = execute(tracked(experiment))
    (run,) = wandb.runs
    assert (run.settings["mode"], run.settings["id"]) == ("offline", folder.name[-10:])
    assert run.settings["config"]["run_key"].startswith(folder.name[-10:])
    assert run.settings["config"]["card"]["protocol"] == "hipexp"
    assert run.logged[0]["running/passkey"] == run.logged[0]["running/average"] == 100.0
    assert "average" not in run.logged[0]  # the optimised metric is of whole runs
    edition = run.settings["config"]["card"]["edition"]
    assert run.logged[-1]["scores"].data == [
        ["passkey", "first_number", 100.0, 4, "hipexp", edition],
        ["kv_retrieval", "value_among_words", 100.0, 4, "hipexp", edition],
    ]
    assert (run.summary["score/passkey"], run.summary["average"], run.summary["protocol"]) == (100.0, 100.0, "hipexp")
    assert "done, average 100.0, protocol hipexp\n" in (folder / "log.txt").read_text()
    assert run.ended == 0


def test_wandb_hears_the_traffic_of_an_offload_per_phase(fake, experiment, offloaded, wandb):
    one = offloaded()
    one.track = Track(name="wandb")
    traffic = read_json(execute(one) / "summary.json")["traffic"]
    sent = {name: value for name, value in wandb.runs[0].summary.items() if name.startswith("traffic/")}
    assert sent == {f"traffic/{phase}/{name}": value for phase in ("prefill", "decode") for name, value in traffic[phase].items()}
    assert (sent["traffic/decode/hit_ratio"], sent["traffic/decode/h2d_bytes_per_step"]) == (0.25, 12 << 20)
    assert sent["traffic/prefill/stall_ms"] == traffic["prefill"]["stall_ms"] > 0
    execute(tracked(experiment))
    assert not any(name.startswith("traffic") for name in wandb.runs[1].summary)


def test_wandb_hears_the_rows_of_a_latency_run(wandb, tmp_path):
    rows = [
        {"phase": "prefill", "context_tok": 600, "impl": "dense", "mean_ms": 2.0, "recall": {}},
        {"phase": "decode", "context_tok": 600, "impl": "dense", "note": "too slow"},
    ]
    summary = {"scores": {}, "average": None, "protocol": "hipexp", "latency": {"rows": rows}, "memory": {"peak_bytes": 1}, "traffic": {}}
    tracker = WandbTracker(Track(name="wandb"))
    tracker.start(tmp_path, {"run_key": "0" * 64}, {})
    tracker.log({"prefill_ms": 2.0, "decode_ms": None}, {})
    tracker.finish(summary, [])
    (run,) = wandb.runs
    told = run.logged[-1]["latency_rows"]
    assert (told.columns, told.data) == (
        ["phase", "context_tok", "impl", "mean_ms", "note"],
        [["prefill", 600, "dense", 2.0, None], ["decode", 600, "dense", None, "too slow"]],
    )
    assert run.summary["mean_ms/prefill/600/dense"] == 2.0 and run.summary["memory"] == {"peak_bytes": 1}
    assert run.logged[0] == {"sample/prefill_ms": 2.0}


def test_sweeps_without_wandb_find_every_number_that_wandb_shows(fake, experiment, offloaded, wandb):
    one = offloaded()
    one.track = Track(name="wandb")
    found = metrics_of(read_json(execute(one) / "summary.json"))
    sent = wandb.runs[0].summary
    last = {name: value for name, value in wandb.runs[0].logged[-2].items() if not name.startswith("sample/")}
    assert last == {"running/passkey": 100.0, "running/kv_retrieval": 100.0, "running/average": 100.0} and last.items() <= found.items()
    flat = {f"{part}.{name}": value for part in ("latency", "memory") for name, value in sent[part].items()}
    plain = {name: value for name, value in sent.items() if name not in ("latency", "memory", "protocol")}
    assert found == plain | flat
    assert {"average", "score/passkey", "latency.prefill_ms", "memory.peak_bytes", "traffic/decode/hit_ratio"} <= found.keys()


def test_a_sweep_keeps_the_agents_id_and_gets_stored_results(fake, experiment, wandb, monkeypatch):
    execute(experiment())
    calls, said = fake.calls, []
    execute(tracked(experiment), say=said.append)
    assert wandb.runs == []
    assert "wandb is told nothing" in said[0]
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    execute(tracked(experiment))
    assert fake.calls == calls
    (run,) = wandb.runs
    assert "id" not in run.settings
    assert (run.summary["average"], run.ended) == (100.0, 0)


def test_a_failure_ends_the_wandb_run(fake, experiment, wandb):
    fake.fail = RuntimeError("broken")
    with pytest.raises(RuntimeError):
        execute(tracked(experiment))
    assert wandb.runs[0].ended == 1


def test_wandb_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    open_trackers(Track()).start(Path(), {}, {})


def test_a_tracker_that_cannot_start_says_what_to_do(fake, experiment, wandb, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    with pytest.raises(RunFailed, match=r"track=wandb could not start \(ZeroDivisionError: .*track.mode=offline or track=local"):
        execute(tracked(experiment))


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_tracker_that_fails_costs_no_result(fake, experiment, wandb, monkeypatch, broken, caplog, capsys):
    def fail(*_, **__):
        raise OSError("wandb is gone")

    monkeypatch.setattr(FakeRun, broken, fail)
    folder = execute(tracked(experiment))
    assert (len(read_rows(folder)), read_json(folder / "status.json")["state"]) == (8, "done")
    assert "WandbTracker failed (OSError: wandb is gone)" in caplog.text
    assert "WandbTracker failed (OSError: wandb is gone)" in capsys.readouterr().err


def test_a_tracker_that_fails_does_not_hide_why_a_run_failed(fake, experiment, wandb, monkeypatch):
    monkeypatch.setattr(FakeRun, "finish", lambda *_, **__: 1 / 0)
    fake.fail = MemoryError("too long a prompt")
    with pytest.raises(MemoryError):
        execute(tracked(experiment))
    (status,) = (read_json(path) for path in runs_root().glob("*/*/status.json"))
    assert (status["class"], status["message"]) == ("out_of_memory", f"too long a prompt; {LESS_MEMORY}")


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "never sent"}, "online"),
        ("auto", {"WANDB_API_KEY": "never sent", "WANDB_MODE": "offline"}, "offline"),
        ("offline", {"WANDB_API_KEY": "never sent"}, "offline"),
    ],
)
def test_auto_is_online_where_there_is_a_key(mode, environment, expected, monkeypatch, tmp_path):
    for name in (*wandb_key.KEYS, "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mode_of(Track("wandb", mode=mode)) == expected
