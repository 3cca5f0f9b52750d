import dataclasses

import pytest

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError, Offload
from hipexp.run import latency
from hipexp.run.ledger import read_json, read_rows
from hipexp.run.point import execute, report
from hipexp.run.strategy import refresh_pattern

PIPELINE = compose(["+pipeline=3stage", "task=latency"]).pipeline


def measured(experiment, **task):
    settings = {"lengths_tok": [1024, 512], "decode_steps": 20, "dense_max_tok": 512} | task
    return experiment(PIPELINE, name="latency", **settings)


def test_rows_alternate_and_follow_the_contract(fake, experiment):
    folder = execute(measured(experiment, repeats=2))
    assert [row["subtask"] for row in read_rows(folder)] == ["dense@512", "pruned@512"] * 2 + ["pruned@1024"] * 2
    rows = read_json(folder / "summary.json")["latency"]["rows"]
    wanted = {"phase", "context_tok", "impl", "mean_ms", "p10_ms", "p90_ms", "cached_ms", "worst_ms", "speedup", "bytes"}
    assert all(set(row) == wanted for row in rows)
    assert [(row["phase"], row["context_tok"], row["impl"]) for row in rows] == [
        (phase, length, impl) for phase in ("prefill", "decode") for length, impl in ((512, "dense"), (512, "3stage"), (1024, "3stage"))
    ]
    dense, pruned = rows[3]["mean_ms"], rows[4]["mean_ms"]
    assert [row["speedup"] for row in rows] == [1.0, 1.0, None, 1.0, pytest.approx(dense / pruned, abs=1e-3), None]
    assert "dense was not measured at 1024 tokens" in report(measured(experiment, repeats=2), folder)


def test_rows_of_an_offloaded_pipeline_tell_its_traffic(fake, experiment):
    one = dataclasses.replace(measured(experiment, repeats=2), offload=Offload("host", device_tok=16384))
    folder = execute(one)
    rows = read_json(folder / "summary.json")["latency"]["rows"]
    told = [
        {name: row.get(name) for name in ("h2d_bytes", "d2h_bytes", "hit_ratio", "stall_ms")} for row in rows if row["impl"] == "3stage"
    ]
    assert told == [{"h2d_bytes": 12 << 20, "d2h_bytes": 2 << 20, "hit_ratio": 0.25, "stall_ms": 6.0}] * 4
    assert all("h2d_bytes" not in row for row in rows if row["impl"] == "dense")
    traffic = read_json(folder / "summary.json")["traffic"]
    assert (traffic["decode"]["steps"], traffic["decode"]["h2d_bytes_per_step"]) == (4 * 20, 12 << 20)
    table = report(one, folder)
    assert table.splitlines()[0].split()[-9:] == ["MiB", "hit", "%", "MiB", "fetched", "MiB", "written", "stall", "ms"]
    assert ["25.0", "12.0", "2.0", "6.0"] == next(line for line in table.splitlines() if "3stage" in line).split()[-4:]
    assert ["–"] * 4 == next(line for line in table.splitlines() if "dense" in line and "512" in line).split()[-4:]
    assert "still right, but slow: 75 % of what decode asked for had to be fetched" in table
    assert (folder / "traffic.png").stat().st_size > 10_000


def test_a_resident_run_has_no_picture_of_traffic(fake, experiment):
    folder = execute(measured(experiment))
    assert not list(folder.glob("*.png")) and "fetched" not in report(measured(experiment), folder)


def test_a_measurement_is_resumed_per_length_and_implementation(fake, experiment):
    one = measured(experiment)
    folder = execute(one)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(lines[:2]))
    (folder / "status.json").unlink()
    calls = fake.calls
    execute(one)
    assert fake.calls - calls == 2  # the missing measurement and its warm-up
    assert [row["subtask"] for row in read_rows(folder)] == ["dense@512", "pruned@512", "pruned@1024"]


@pytest.mark.parametrize(
    "task, key",
    [({"lengths_tok": [512, 100]}, r"task\.lengths_tok\[1\]=100"), ({"lengths_tok": None, "length_tok": 100}, r"task\.length_tok=100")],
)
def test_a_length_without_room_is_refused_before_loading(fake, experiment, monkeypatch, task, key):
    monkeypatch.setattr("hipexp.run.point.load_model", lambda model: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=rf"^{key} is too short for passkey: its frame takes \d+ tokens .* use at least \d+"):
        execute(measured(experiment, decode_steps=48, **task))


def test_another_name_of_the_same_pipeline_is_the_same_measurement(fake, experiment):
    one = measured(experiment)
    execute(one)
    calls = fake.calls
    renamed = dataclasses.replace(one, pipeline=dataclasses.replace(PIPELINE, name="mine"))
    rows = read_json(execute(renamed) / "summary.json")["latency"]["rows"]
    assert (fake.calls, {row["impl"] for row in rows}) == (calls, {"dense", "3stage"})


def test_decode_means_cover_whole_refresh_periods():
    steps = [10.0, 1.0, 1.0, 1.0] * 2 + [99.0]
    times = latency.decode_times([steps], period=4, shortest=4)
    assert times == {"mean_ms": 3.25, "p10_ms": 1.0, "p90_ms": 10.0, "cached_ms": 1.0, "worst_ms": 10.0}
    assert latency.decode_times([[2.0]], period=16, shortest=4)["mean_ms"] == 2.0


def test_refresh_periods_of_the_preset():
    assert refresh_pattern(PIPELINE, 5) == (16, 4)
    assert refresh_pattern(None, 5) == (1, 1)
    assert refresh_pattern(dataclasses.replace(PIPELINE, staggered_refresh=True), 5) == (16, 1)  # no step without a refresh


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0)])
def test_quantiles(share, value):
    assert latency.quantile([4.0, 1.0, 3.0, 2.0], share) == value
