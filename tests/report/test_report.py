import json

import matplotlib.image
import pytest

from hipexp.config.schema import ConfigError
from hipexp.report import listing
from hipexp.report.figures import Axis, HeatMap, draw_heat_maps
from hipexp.report.runs import Run
from hipexp.report.tables import duration, markdown_table, show, text_table
from hipexp.run.ledger import SCORED, WHOLE, RunFailed, open_ledger

KEY = "0123456789abcdef"


def test_text_tables_line_up():
    text = text_table(["name", "score"], [["a", 9.96], ["∞Bench", None], ["kv", 100]])
    assert text.splitlines() == ["name    score", "──────  ─────", "a        10.0", "∞Bench      –", "kv        100"]


def test_small_numbers_are_not_rounded_to_nothing():
    assert [show(x) for x in (0.0, 0.0243, -0.0243, 0.1, 12.34, 3, None)] == ["0.0", "0.024", "-0.024", "0.1", "12.3", "3", "–"]


def test_markdown_tables():
    assert markdown_table(["a", "b"], [["x", 1.0]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1.0 |"]


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (200, "3 min"), (9000, "2.5 h"), (259200, "3 d")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_cells():
    assert [show(None), show(0.25), show(7), show("x")] == ["–", "0.2", "7", "x"]


def test_heat_maps_are_pictures(tmp_path):
    path = tmp_path / "deep" / "map.png"
    maps = [HeatMap("dense", {("0%", "1×"): 100.0, ("0%", "2×"): 0.0}), HeatMap("3stage", {("100%", "2×"): 50.0})]
    draw_heat_maps(path, "Found?", maps, Axis("depth", ["0%", "100%"]), Axis("context", ["1×", "2×"]), note="one sample per cell")
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300
    assert picture.std() > 0.05


def run(folder, state, **more):
    with open_ledger(folder, KEY) as book:
        book.append({name: kinds[0]() for name, kinds in SCORED.items()})
        book.write("summary.json", dict.fromkeys(WHOLE["summary.json"], 0) | {"run_key": KEY, "average": 100.0, "protocol": "own data"})
        book.write("card.json", dict.fromkeys(WHOLE["card.json"], 0))
        book.write("config.yaml", "seed: 0")
        book.status(state, **more)


def test_runs_are_listed_with_what_became_of_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    run(tmp_path / "infbench" / "needle_dense_0123456789", "done")
    run(tmp_path / "infbench" / "needle_3stage_0123456789", "failed", **{"class": "out_of_memory"})
    run(tmp_path / "passkey" / "needle_5k_0123456789", "running")
    assert listing.main([]) == 0
    text = capsys.readouterr().out
    assert "failed: out_of_memory" in text
    assert "stopped" in text
    assert text.count("  100.0  own data  ") == 1 and "average  protocol" in text  # part of the samples make no score
    assert listing.main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {one["state"]: one["average"] for one in listed} == {"done": 100.0, "failed: out_of_memory": None, "stopped": None}
    states = {one["run"]: one["state"] for one in listed}
    assert states == {
        "needle_dense_0123456789": "done",
        "needle_3stage_0123456789": "failed: out_of_memory",
        "needle_5k_0123456789": "stopped",
    }
    with pytest.raises(ConfigError, match="verbose"):
        listing.main(["verbose"])


def test_a_run_that_is_held_is_running(tmp_path):
    with open_ledger(tmp_path, KEY) as book:
        book.status("running")
        assert Run(tmp_path).outcome == "running"
    assert Run(tmp_path).outcome == "stopped"


@pytest.mark.parametrize(
    "name, content",
    [("status.json", b""), ("status.json", b"\0\0"), ("status.json", b"[]"), ("summary.json", b"{"), ("samples.jsonl", None)],
)
def test_a_damaged_run_is_listed_as_one(tmp_path, monkeypatch, capsys, name, content):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    folder = tmp_path / "infbench" / "needle_dense_0123456789"
    run(folder, "done")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert listing.main([]) == 0
    assert "damaged" in capsys.readouterr().out


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match=r"cannot use .*HIPEXP_RUNS"):
        draw_heat_maps(tmp_path / "file" / "map.png", "", [HeatMap("dense", {})], Axis("", ["a"]), Axis("", ["b"]))


def test_no_runs_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path / "none"))
    assert listing.main([]) == 0
    assert "no runs" in capsys.readouterr().out
