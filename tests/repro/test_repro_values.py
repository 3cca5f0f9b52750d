from dataclasses import dataclass, field, replace

import pytest

from hipexp.config.schema import ConfigError, Experiment, Model, Task
from hipexp.repro import values
from hipexp.repro.data import Published, read
from hipexp.repro.points import Cell
from hipexp.repro.values import derived, values_of


@dataclass
class Stub:
    """A finished run."""

    of: dict
    lines: list = field(default_factory=list)
    experiment: Experiment = field(default_factory=lambda: Experiment(Model("m"), Task("infbench")))

    def summary(self):
        return self.of

    def rows(self):
        return self.lines


@pytest.fixture(autouse=True)
def no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(values, "folder_of", lambda experiment: tmp_path / "run")


def cell(reads, point, dense=False, column="c"):
    return Cell(("", "row", ""), "", column, tuple(reads), dense, point)


def answered(*scores, subtask="kv", depth=None):
    return [
        {"subtask": subtask, "sample": number, "score": score, "depth": depth, "references": [f"key {number}"]}
        for number, score in enumerate(scores)
    ]


SCORED = {"protocol": "hipexp", "task": "infbench", "scores": {}}
TIMES = {
    "latency": {
        "rows": [
            {"phase": "decode", "impl": "fastest", "dense": True, "mean_ms": 2.0, "bytes": 4e6},
            {"phase": "decode", "impl": "slower", "dense": True, "mean_ms": 3.0, "bytes": 4e6},
            {"phase": "decode", "impl": "3stage", "dense": False, "mean_ms": 0.5, "full_ms": 1.5, "bytes": 1e6},
            {"phase": "prefill", "impl": "broken", "dense": True, "note": "not there"},
        ]
    }
}


def test_a_score_has_its_interval_and_the_samples_behind_it():
    value = values.read(cell(["kv"], Stub(SCORED, answered(100.0, 0.0, 100.0, 100.0))))
    assert value.number == 75 and value.interval[0] < 75 < value.interval[1]
    assert value.samples[("run", "kv", 1, "key 1")] == 0
    assert values.read(cell(["kv"], Stub({}))) is None


def test_a_text_cut_to_two_lengths_is_one_and_texts_of_two_lengths_are_two():
    """RULER asks for the same number at two lengths by chance, or puts the same question into longer texts."""

    def text_of(**task):
        run = Stub(SCORED, answered(100.0), Experiment(Model("m"), replace(Task("infbench"), **task)))
        ((_, _, _, text),) = values.read(cell(["kv"], run)).samples
        return text

    assert text_of(length_tok=64, truncate_tok=32) == text_of(length_tok=64, truncate_tok=16)
    assert text_of(length_tok=64) != text_of(length_tok=32)


def test_means_are_over_all_samples_and_depths_over_theirs():
    lines = answered(100.0, subtask="a") + answered(0.0, 0.0, 0.0, subtask="b")
    assert values.read(cell(["mean"], Stub(SCORED, lines))).number == 25
    assert values.read(cell(["a", "b"], Stub(SCORED, lines))).number == 25
    deep = [row | {"sample": number, "depth": number / 10} for number, row in enumerate(answered(*[100.0] * 5, *[0.0] * 5))]
    assert values.read(cell(["depth 0.4-0.6"], Stub(SCORED, deep))).number == 50
    assert values.read(cell(["depth 0.95-1.01"], Stub(SCORED, deep))) is None


def test_a_score_that_the_run_does_not_have_is_a_mistake_of_the_table():
    with pytest.raises(ConfigError, match="its run scores kv, not passkey; mend `reads`"):
        values.read(cell(["passkey"], Stub(SCORED, answered(100.0))))


@pytest.mark.parametrize(
    ("reads", "dense", "number"),
    [
        ("decode_us", True, 2000),
        ("decode_us", False, 500),
        ("tokens_s", False, 2000),
        ("refresh_us", False, 1500),
        ("refresh_us", True, None),
        ("read_mb", True, 4),
        ("link_mb", False, None),
        ("prefill_ms", True, None),
    ],
)
def test_times_are_of_the_fastest_dense_attention_or_of_the_pipeline(reads, dense, number):
    value = values.read(cell([reads], Stub(TIMES), dense))
    assert (value and value.number) == number


def test_computed_columns_use_columns_computed_before():
    table = Published("t", "s", "u", "a", columns=["a", "b", "m", "n", "r"])
    table.derived = {"m": {"mean": ["a", "b"]}, "n": {"mean": ["m", "b"]}, "r": {"relative": [["a"], ["b"]]}}
    found = derived(table, {("", "x", ""): {"a": 1.0, "b": 3.0}, ("", "y", ""): {"a": 2.0, "b": 1.0}, ("", "z", ""): {"a": 2.0}})
    assert found["", "x", ""] == {"m": 2.0, "n": 2.5, "r": 75.0}
    assert found["", "z", ""] == {}


def test_how_much_a_row_has_less_than_another():
    table = read("figure6a")
    found = derived(table, {("", "InfiniteHiP", ""): {"mass recall": 60.0}, ("", "InfLLM", ""): {"mass recall": 50.0}})
    assert found["", "InfLLM", ""] == {"InfiniteHiP has more by": 10.0}
    assert found["", "InfiniteHiP", ""] == {}


def test_computed_columns_stand_beside_those_that_were_read():
    table = Published("t", "s", "u", "a", columns=["a", "b", "m"], derived={"m": {"mean": ["a", "b"]}})
    found = [cell(["kv"], Stub(SCORED, answered(100.0)), column="a"), cell(["kv"], Stub(SCORED, answered(0.0)), column="b")]
    assert values_of(table, found)[("", "row", ""), "", "m"].number == 50


def test_blocks_of_one_text_are_one_sample_of_recall():
    lines = [
        {"subtask": f"{text}@6144/8", "sample": block, "score": score, "references": []}
        for text, scores in (("passkey", (40.0, 60.0)), ("kv_retrieval", (10.0, 30.0)))
        for block, score in enumerate(scores)
    ]
    run = Stub(SCORED | {"task": "recall"}, lines, Experiment(Model("m"), Task("recall")))
    value = values.read(cell(["mean"], run))
    assert value.number == 35
    assert value.samples == {("run", "passkey@6144", 0, ""): 50, ("run", "kv_retrieval@6144", 0, ""): 20}


def test_the_samples_behind_a_computed_mean_are_those_of_its_columns():
    table = Published("t", "s", "u", "a", columns=["a", "b", "m"], derived={"m": {"mean": ["a", "b"]}})
    runs = [Stub(SCORED, answered(100.0, subtask="x")), Stub(SCORED, answered(0.0, subtask="y"))]
    found = [cell(["x"], runs[0], column="a"), cell(["y"], runs[1], column="b")]
    assert values_of(table, found)[("", "row", ""), "", "m"].samples == {("run", "x", 0, "key 0"): 100, ("run", "y", 0, "key 0"): 0}
