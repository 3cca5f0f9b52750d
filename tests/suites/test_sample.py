import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError, Task
from hipexp.suites import check_task, open_suite
from hipexp.suites.passkey import PasskeyGrid
from hipexp.suites.sample import largest_fit
from hipexp.suites.truncation import Truncated, cut_middle


@given(base=st.integers(0, 50), step=st.integers(1, 40), room=st.integers(0, 3000), guess=st.integers(-5, 200))
def test_the_largest_fit_is_found_from_any_guess(base, step, room, guess):
    found = largest_fit(lambda n: base + step * n, room, guess)
    assert found == (room - base) // step if base <= room else found == -1


@pytest.mark.parametrize("text", ["", "a", "one\ntwo\n", "one\none\none\n\n", "no end", "x\r\ny\u2028z\n" * 3])
def test_lines_are_joined_as_the_tokenizer_would(encode, tokenizer, text):
    assert encode(text) == tokenizer(text).input_ids


@given(tokens=st.lists(st.integers(), max_size=40), keep=st.integers(2, 50))
def test_the_middle_is_cut(tokens, keep):
    kept = cut_middle(tokens, keep)
    assert len(kept) == min(len(tokens), keep)
    assert kept[: (keep + 1) // 2] == tokens[: min(len(tokens), keep)][: (keep + 1) // 2]
    assert kept[-1:] == tokens[-1:]


def test_truncated_prompts_leave_room_for_the_answer(tokenizer):
    suite = open_suite(Task(name="infbench", samples=2, length_tok=2000, truncate_tok=600), tokenizer, 100, 0)
    assert isinstance(suite, Truncated)
    for item in suite.items():
        sample, whole = suite.sample(item), suite.suite.sample(item)
        assert len(sample.tokens) + sample.max_new_tok == 600
        assert sample.removed_tok == len(whole.tokens) - len(sample.tokens)
        assert sample.tokens[-20:] == whole.tokens[-20:]
    for task in (Task(name="infbench", length_tok=2000, truncate_tok=80), Task(name="passkey", lengths_tok=[2000], truncate_tok=13)):
        with pytest.raises(ConfigError, match=f"task.truncate_tok={task.truncate_tok} is too short"):
            open_suite(task, tokenizer, 100, 0)


def test_the_grid_has_every_cell(tokenizer):
    suite = open_suite(Task(name="passkey", lengths_tok=[300, 600], depths=[0.0, 0.5, 1.0], samples=2), tokenizer, 100, 0)
    assert isinstance(suite, PasskeyGrid)
    samples = [suite.sample(item) for item in suite.items()]
    cells = [(sample.subtask, sample.meta["depth"]) for sample in samples]
    assert cells == [(f"passkey@{n}", depth) for n in (300, 600) for depth in (0.0, 0.5, 1.0) for _ in range(2)]
    assert len({sample.references[0] for sample in samples}) == len(samples)
    for sample in samples:
        lines = sample.prompt.splitlines()[1:-2]
        position = next(i for i, line in enumerate(lines) if sample.references[0] in line)
        assert position == round(sample.meta["depth"] * (len(lines) - 1))
        assert suite.score(sample, sample.references[0]) == 100.0


def test_unknown_tasks_and_wordings_are_refused():
    for task in (Task(name="nothing"), Task(name="infbench", wording="other"), Task(name="infbench", subtasks=["nothing"])):
        with pytest.raises(ConfigError):
            check_task(task)
