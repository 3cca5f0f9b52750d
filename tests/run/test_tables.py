import re

import pytest

from hipexp.config.schema import ConfigError
from hipexp.repro import command as repro
from hipexp.repro.data import read
from hipexp.repro.points import cells, points_of
from hipexp.run import demo, needle_table, record_demo
from hipexp.run.ledger import runs_root, write_json
from hipexp.run.needle_table import Rate, Spec
from hipexp.run.point import folder_of
from hipexp.run.several import Named, run_all


@pytest.fixture
def overrides(fake, model_folder):
    return [f"model.path={model_folder}"]


def test_the_demo_ends_with_a_table_and_a_picture(overrides, fake, capsys):
    assert demo.main(overrides) == 0
    text = capsys.readouterr().out
    assert "[1/11] dense, passkey, 1 × the trained length (512 tokens)" in text
    assert text.count("not run") == 1
    assert "not official ∞Bench" in text
    table, picture = (runs_root() / "demo" / name for name in ("table.txt", "passkey.png"))
    assert table.exists()
    assert picture.stat().st_size > 10000
    assert text.splitlines()[-2:] == [f"table:   {table}", f"picture: {picture}"]
    calls = fake.calls
    assert demo.main(overrides) == 0
    assert fake.calls == calls
    assert "[1/" not in capsys.readouterr().out


def test_what_pages_show_of_the_demo_has_machine_and_date(overrides, fake):
    runs = demo.points(overrides)
    run_all(list(runs.values()))
    for run in runs.values():  # which the fake model's runs do not have
        write_json(folder_of(run.experiment) / "env.json", {"device": "a processor", "threads": 2, "packages": {"torch": "2.13.0+cpu"}})
    told = record_demo.section(runs, 512)
    table, _, words = told.rpartition("\n\n")
    assert "| 2,048 | 4× | `3stage` | 100 (3) | 100 (2) | 100 (2) |" in table and "| 4,096 | 8× | dense | – | – | – |" in table
    assert re.fullmatch(r"\d{4}-\d\d-\d\d; a processor, 2 thread\(s\), torch 2\.13\.0\+cpu\. Score, and in brackets .*", words)
    page = f"above\n{record_demo.BEGIN}\nold\n{record_demo.END}\nbelow\n"
    assert record_demo.written(page, told) == f"above\n{record_demo.BEGIN}\n\n{told}\n\n{record_demo.END}\nbelow\n"
    with pytest.raises(ConfigError, match="must have the marks"):
        record_demo.written("no marks", told)
    with pytest.raises(ConfigError, match="takes the folder of the documentation"):
        record_demo.main(["nowhere"])


def test_every_point_of_the_demo_is_checked_before_the_first_runs(monkeypatch, fake):
    with pytest.raises(ConfigError, match="is too short for"):
        demo.main(["model.trained_tok=20"])
    assert fake.calls == 0 and not list(runs_root().glob("*/*"))


def test_the_long_table_is_resumable_and_judges_itself(overrides, fake, monkeypatch, capsys):
    few = tuple(Spec(spec.method, spec.times, spec.subtasks, 1, spec.words) for spec in needle_table.SPECS if spec.times == 8)
    monkeypatch.setattr(needle_table, "SPECS", few)
    monkeypatch.setattr(needle_table, "LATENCY", (((1024, 2048), 2), ((3072,), 1)))
    assert needle_table.main(overrides) == 0
    text = capsys.readouterr().out
    assert "expected time:" in text
    assert "| 3stage at 8×: kv_retrieval | ≥ 50 | 100.0 | yes |" in text
    assert "| prefill at 262144 tokens, dense / 3stage | ≥ 3.5 | – | not measured |" in text
    assert "held out" in text and text.count("Run on: ") == 2
    (table,) = runs_root().glob("*-table_*/table.md")
    assert f"table:   {table}" in text
    calls = fake.calls
    assert needle_table.main(overrides) == 0
    assert fake.calls == calls
    assert "expected time" not in capsys.readouterr().out


def test_every_run_of_the_long_table_is_a_point_of_its_own(overrides):
    points = needle_table.accuracy_points(overrides)
    assert len(points) == len(needle_table.SPECS)
    assert len({point.name for point in points.values()}) == len(points)
    without = [point.experiment.pipeline for spec, point in points.items() if spec.words == needle_table.NO_GROUP]
    assert all(pipeline.layers["early"].range == "" for pipeline in without)


def test_rates_go_through_what_was_measured():
    rate = Rate.through((1000, 3.0), (2000, 10.0))
    assert rate.seconds(1000) == pytest.approx(3.0)
    assert rate.seconds(2000) == pytest.approx(10.0)
    flat = Rate.through((1000, 3.0), (2000, 5.0))
    assert flat.square == 0.0
    assert flat.seconds(2000) == pytest.approx(5.0)


def test_offload_is_for_the_pruned_points_of_a_table(overrides, fake, capsys):
    words = [*overrides, "offload=host", "offload.policy=lru"]
    everything = [
        *demo.points(words).values(),
        *needle_table.accuracy_points(words).values(),
        *needle_table.latency_points(words),
        *points_of(cells(read("table2"), "needle", words)),
    ]
    assert {point.experiment.pipeline is None for point in everything} == {True, False}
    for point in everything:
        where, pipeline = point.experiment.offload, point.experiment.pipeline
        offloads = pipeline is not None and pipeline.method in ("hip", "streaming")
        assert (where.name, where.policy) == (("host", "lru") if offloads else ("none", "clock"))
    assert demo.main(words) == 0
    assert "[11/11] 3stage, passkey, 8 × the trained length (4096 tokens)" in capsys.readouterr().out
    resident = [point for point in demo.points(overrides).values() if point.experiment.pipeline is None]
    assert all(point.summary()["scores"] for point in resident)  # the same runs as without an offload
    assert demo.points(words)["3stage", 1, "passkey"].summary()["traffic"]["decode"]["hit_ratio"] == 0.25


@pytest.mark.parametrize(
    ("command", "words", "key"),
    [
        (demo.main, ["task.samples=3"], "task.samples=3"),
        (demo.main, ["+pipeline=2stage"], r"\+pipeline=2stage"),
        (needle_table.main, ["task.length_tok=500"], "task.length_tok=500"),
        (repro.main, ["table2", "size=needle", "task.length_tok=1024"], "task.length_tok=1024"),
        (repro.main, ["table2", "pipeline.window_tok=512"], "pipeline.window_tok=512"),
    ],
)
def test_what_a_table_varies_is_not_to_be_overridden(overrides, command, words, key):
    with pytest.raises(ConfigError, match=f"{key} cannot be changed in .* left to you are model, seed"):
        command(words + overrides)


def test_a_point_that_is_not_done_has_no_summary(fake, experiment):
    assert Named("x", experiment()).summary() == {}
