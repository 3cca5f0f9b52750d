"""``python -m hipexp methods``: which runs there are, what they cost by rule, and that the table is made of what is done."""

import pytest

from hipexp.config.check import METHODS
from hipexp.config.compose import compose, conf_dir
from hipexp.config.model import ModelFacts
from hipexp.config.schema import ConfigError
from hipexp.run import data as data_command
from hipexp.run import methods_table
from hipexp.run.methods_table import decode_bytes, points, read_comparison, recall_points
from hipexp.run.point import check_point


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))


ALL = read_comparison("methods", fast=False)


def test_every_method_is_run_and_the_longest_prompts_only_where_reading_is_linear():
    made = points(ALL, [])
    assert {point.name for point in made} == set(ALL.words)
    assert set(METHODS) - {"hip", "hip_tree"} < set(ALL.words)
    longest = {point.name for point in made if point.spec.linear}
    assert longest == {"streaming", "lm_infinite", "infllm", "hip_iclr25", "random", "3stage", "3stage_scan", "4stage_scan", "3stage_plus"}
    assert [point.spec.times for point in made] == sorted(point.spec.times for point in made)
    assert {point.spec for point in made} == set(ALL.specs)


def test_recall_is_of_what_selects():
    measured = {name for name, _ in recall_points(ALL, [])}
    assert set(ALL.words) - measured == {"dense", "dense, middle cut out", "ntk", "self_extend", "lm_infinite"}


def test_times_are_of_the_longest_prompt_that_all_read():
    made = methods_table.time_points(ALL, [])
    assert list(made) == list(ALL.words) and ALL.longest == 8
    lengths = {name: run.experiment.task.length_tok for name, run in made.items()}
    assert lengths.pop("dense, middle cut out") == 6144 and set(lengths.values()) == {49_152}
    for name, run in made.items():
        task, pipeline = run.experiment.task, run.experiment.pipeline
        assert task.name == "latency" and (task.dense_max_tok is None) == (pipeline is None) and task.truncate_tok is None
        check_point(run.experiment)
        assert pipeline is None or name.startswith(pipeline.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "comparison").glob("*.yaml")))
def test_every_run_and_every_recall_can_run(name, tmp_path):
    assert data_command.main(["make", "stand-ins", f"out={tmp_path / 'data'}"]) == 0
    for fast in (False, True):
        comparison = read_comparison(name, fast)
        for run in recall_points(comparison, []).values():
            check_point(run.experiment)
        for point in points(comparison, [], [f"task.data={tmp_path / 'data'}"]):
            check_point(point.run.experiment)


def test_a_comparison_of_ones_own(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text(
        "title: Mine\ncontestants: {small: [+pipeline=3stage, 'pipeline.stages.2.keep_tok=1024']}\n"
        "runs: [{task: infbench, times: 2, subtasks: [passkey], samples: 1}]\nrecall: {held: [task=recall]}\n"
    )
    made = read_comparison(str(own), fast=False)
    (point,) = points(made, [])
    assert point.run.experiment.pipeline.stages[2].keep_tok == 1024 and point.run.experiment.task.length_tok == 12_288
    assert list(recall_points(made, [])) == [("small", "held")]


RUNS = "runs: [{task: infbench, times: 2, subtasks: [passkey]}]"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("title: x", "KeyError: 'contestants'"),
        ("- 1", "TypeError"),
        ("a: [", "ParserError"),
        ("\0", "ReaderError"),
        (f"{{title: x, contestants: {{a: {{word: [+pipeline=3stage]}}}}, {RUNS}, recall: {{}}}}", "KeyError: 'words'"),
        (f"{{title: x, contestants: {{a: {{words: [], more: []}}}}, {RUNS}, recall: {{}}}}", "contestant a has more"),
        (f"{{title: x, contestants: {{}}, {RUNS}, recall: {{}}}}", "there must be a contestant"),
        ("{title: x, contestants: {a: []}, runs: [], recall: {}}", "a run that is not for linear ones only"),
        (f"{{title: x, contestants: {{a: [3]}}, {RUNS}, recall: {{}}}}", r"\[3\] must be a list of words"),
        (f"{{title: x, contestants: {{a: []}}, {RUNS}, recall: {{r: task=recall}}}}", "task=recall must be a list of words"),
        (f"{{title: x, contestants: {{a: []}}, {RUNS.replace('2', 'two')}, recall: {{}}}}", "times=two must be a whole number"),
        (f"{{title: x, contestants: {{a: []}}, {RUNS.replace('[passkey]', 'passkey')}, recall: {{}}}}", "TypeError"),
    ],
)
def test_what_is_no_comparison(tmp_path, text, told):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"is no comparison .[^$]*{told}[^$]*as conf/comparison/"):
        read_comparison(str(tmp_path / "mine.yaml"), fast=False)
    with pytest.raises(ConfigError, match=r"of=nothing: there is no such comparison; use .*methods"):
        read_comparison("nothing", fast=False)
    (tmp_path / "ablation.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"ablation.yaml has the name of another comparison"):
        read_comparison(str(tmp_path / "ablation.yaml"), fast=False)


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
    assert (folder / "picture.png").stat().st_size > 10_000
    table = (folder / "table.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.startswith("| dense |"))
    assert " 100.0 |" in line
