"""Rows of ∞Bench's synthetic tasks: answers by an independent count, sizes, distributions, what is refused."""

import json
import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.suites import infbench_rows
from hipexp.suites.infbench_rows import MAKERS, make_rows


def count_tok(text):
    return len(re.findall(r"\d|[a-z]+|\S", text))


def rows(subtask, samples=7, length_tok=1500, seed=0):
    return list(make_rows(subtask, length_tok, samples, seed, count_tok))


@pytest.mark.parametrize("subtask", MAKERS)
def test_official_schema_and_size(subtask):
    made = rows(subtask)
    assert [row["id"] for row in made] == list(range(7))
    for row in made:
        assert list(row) == ["id", "context", "input", "answer", "options"] and row["options"] == [] and row["answer"]
        json.dumps(row)
        size = count_tok(f"{row['context']}\n{row['input']}")
        assert 1500 - 400 < size <= 1500, size  # ten layers of one more function each are the largest step
    assert len({row["context"] for row in made}) == 7


@pytest.mark.parametrize("subtask", MAKERS)
def test_same_seed_same_rows(subtask):
    assert rows(subtask) == rows(subtask)
    assert rows(subtask) != rows(subtask, seed=1)


@pytest.mark.parametrize("subtask", MAKERS)
def test_too_short_is_refused(subtask):
    with pytest.raises(ConfigError, match=rf"length_tok=3 is too short for a row of {subtask}: the smallest takes \d+ tokens"):
        rows(subtask, length_tok=3)


def test_what_is_not_generated():
    with pytest.raises(ConfigError, match="'code_debug' is not generated; generated are passkey, number_string"):
        rows("code_debug")


def test_code_run_by_running_it():
    for row in rows("code_run", samples=12, length_tok=3000):
        space = {}
        exec(row["context"], space)  # our own text
        call = re.search(r"func_\d+\(-?\d+\)", row["input"])[0]
        assert row["answer"] == [eval(call, space)]
        steps = [int(n.replace(" ", "")) for n in re.findall(r"[+-] \d+$", row["context"], re.M)]
        assert min(steps) >= -12 and max(steps) <= 17


def test_code_run_depths():
    depths = []
    for row in rows("code_run", samples=10):
        calls = dict(re.findall(r"def (func_\d+)\(x\):\n    return (func_\d+|x)", row["context"]))
        name, depth = re.search(r"func_\d+", row["input"])[0], 0
        while name != "x":
            name, depth = calls[name], depth + 1
        depths.append(depth)
    assert depths == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]


def test_more_functions_than_published_names(monkeypatch):
    monkeypatch.setattr(infbench_rows, "NAMES", 20)
    context = rows("code_run", samples=1, length_tok=3000)[0]["context"]
    names = re.findall(r"def func_(\d+)", context)
    assert len(names) == len(set(names)) > 40


def test_math_calc_by_counting():
    for row in rows("math_calc"):
        terms = row["context"].split()
        values = [eval("".join(terms[: 2 * n + 1])) for n in range(1, len(terms) // 2 + 1)]
        assert row["answer"] == values and 0 <= min(values) and max(values) <= 99


def test_math_calc_adds_as_often_as_it_subtracts():
    text = rows("math_calc", samples=1, length_tok=20000)[0]["context"]
    assert 0.45 < text.count("+") / (text.count("+") + text.count("-")) < 0.55


@settings(max_examples=60)
@given(numbers=st.lists(st.integers(0, 99), min_size=8, max_size=60))
def test_found_number(numbers):
    distinct = sorted(set(numbers))
    for n, word in enumerate(("", "second ", "third ")):
        if n < len(distinct):
            assert infbench_rows.found_number(f"{word}smallest", numbers) == distinct[n]
            assert infbench_rows.found_number(f"{word}largest", numbers) == distinct[-1 - n]
    median = infbench_rows.found_number("median", numbers)
    assert median == statistics.median(numbers) and (isinstance(median, int) or median % 1 == 0.5)


def test_math_find_asks_every_kind_and_has_the_answer():
    made = rows("math_find", samples=14)
    kinds = [re.search(r"The (.+) number", row["input"])[1] for row in made]
    assert kinds == [kind for kind in infbench_rows.KINDS for _ in range(2)]
    for kind, row in zip(kinds, made, strict=True):
        numbers = json.loads(row["context"])
        assert row["answer"] == [infbench_rows.found_number(kind, numbers)]
        assert max(numbers) <= 99 and (min(numbers) <= 2 or max(numbers) >= 97)  # one bound of the range is drawn, the other is not


@pytest.mark.parametrize(("subtask", "digits"), [("passkey", 5), ("number_string", 10)])
def test_a_number_stated_twice_at_its_depth(subtask, digits):
    made = rows(subtask, samples=3)
    for row in made:
        key = row["answer"][0]
        assert re.fullmatch(rf"\d{{{digits}}}", key) and row["context"].count(key) == 2
    depths = [row["context"].index(row["answer"][0]) / len(row["context"]) for row in made]
    assert depths == pytest.approx([1 / 6, 1 / 2, 5 / 6], abs=0.08)


def test_pairs():
    made = rows("kv_retrieval", samples=3, length_tok=4000)
    for row in made:
        pairs = json.loads(row["context"])
        key = re.search(r'"(.+)"', row["input"])[1]
        assert row["answer"] == [pairs[key]] and len(pairs) > 5
