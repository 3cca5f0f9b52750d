"""``python -m hipexp methods``: which runs there are, what they cost by rule, and that the table is made of what is done."""

import pytest

from hipexp.config.compose import compose
from hipexp.config.model import ModelFacts
from hipexp.config.schema import ConfigError
from hipexp.run import methods_table
from hipexp.run.methods_table import METHODS, SPECS, decode_bytes, points, recall_points
from hipexp.run.point import check_point


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))


def test_every_method_is_run_and_the_longest_prompts_only_where_reading_is_linear():
    made = points([], fast=False)
    assert {point.method for point in made} == set(METHODS)
    longest = {point.method for point in made if point.spec.linear}
    assert longest == {"streaming", "lm_infinite", "infllm", "hip_iclr25", "random", "3stage", "3stage_scan"}
    assert [point.spec.times for point in made] == sorted(point.spec.times for point in made)
    assert {point.spec for point in made} == set(SPECS)


def test_recall_is_of_what_selects():
    assert set(METHODS) - set(recall_points([], fast=False)) == {"dense", "dense, middle cut out", "ntk", "self_extend", "lm_infinite"}


def test_every_recall_can_run():
    for run in recall_points([], fast=False).values():
        check_point(run.experiment)


def test_a_dry_run_runs_nothing(monkeypatch):
    monkeypatch.setattr(methods_table, "stored", lambda experiment: experiment.task.name != "recall")
    monkeypatch.setattr(methods_table, "run_all", lambda *_: pytest.fail("ran"))
    assert methods_table.main(["fast=true", "--dry-run"]) == 0


def test_bytes_are_those_of_the_rule():
    facts = ModelFacts(2, 6144, kv_heads=2, head_dim=16, itemsize=4)
    assert decode_bytes(None, facts, 4, 10_000) == (2 * 2 * 2 * 10_000 * 64,) * 2

    def cost(*words):
        return decode_bytes(compose(["task=infbench", *words]).pipeline, facts, 4, 10_000)

    assert cost("+pipeline=streaming") == (2 * 2 * 2 * 1280 * 64,) * 2
    attended, whole = cost("+pipeline=oracle")
    assert attended == 2 * 2 * 2 * 3328 * 64 and whole - attended == 2 * 2 * 10_000 * 64  # every key once, of both layers
    attended, whole = cost("+pipeline=quest", "pipeline.params.dense_layers=1")
    assert attended == 2 * (2 * 10_000 + 4 * 3328) * 64 and whole - attended == 2 * 2 * 625 * 64
    assert cost("+pipeline=ntk") == decode_bytes(None, facts, 4, 10_000)


def test_what_it_varies_is_not_the_users():
    with pytest.raises(ConfigError, match="cannot be changed in `methods`"):
        methods_table.main(["task.samples=3"])


@pytest.mark.slow
def test_the_fast_form(tmp_path, capsys):
    assert methods_table.main(["fast=true"]) == 0
    out = capsys.readouterr().out
    assert "expected time" in out and "| oracle" in out
    (folder,) = tmp_path.glob("*-methods")
    assert (folder / "methods.png").stat().st_size > 10_000
    table = (folder / "table.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| dense |"))
    assert " 100.0 |" in line
