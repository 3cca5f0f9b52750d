"""Prompts of named values: what is asked for is stated, all of it, and by nothing else."""

import random

import pytest

from hipexp.needle.batches import tokenizer
from hipexp.needle.names import DRILL_TOK, NAMED, QUERIES, VALUES, NamedValues, Names


def size(text):
    return len(tokenizer().encode(text, add_special_tokens=False).ids)


def drawn(length, several, seed):
    return NamedValues(random.Random(seed), size).draw(length, several)


@pytest.mark.parametrize("length", [160, 1024])
@pytest.mark.parametrize("kind", [NAMED, VALUES, QUERIES])
def test_named_values_are_all_given_and_nothing_else_has_their_name(kind, length):
    several = said = 0
    for seed in range(40):
        segments = drawn(length, kind, seed)
        stated = {s.states: s.text for s in segments if s.states is not None}
        others = [s.text.strip() for s in segments if not s.answer and s.states is None]
        for at, first in enumerate(segments):
            if not (first.tells and first.asks):
                continue
            name, joint, rest = segments[at - 2].text, segments[at - 1].text, segments[at + 1]
            value = first.text + (rest.text if rest.asks else "")
            in_question = not segments[at - 2].answer
            said += in_question
            frame = (name[-6:] if in_question else name.strip()) + joint
            chosen = [i for i in first.asks if f"{frame}{value}" in stated[i]]
            assert chosen and (not rest.asks or rest.asks[0] in chosen)
            assert set(first.others) <= {stated[i].rsplit(frame, 1)[1][:2] for i in first.asks}
            if not in_question:
                assert name.strip() in next(s.text for s in reversed(segments[:at]) if not s.answer), "the question has the name"
                assert not any(f"{name}{joint}" in f" {text}" for text in others)
            several += len(first.asks) > 1
    assert several > 10 and (said > 10 or kind.drilled)


def groups_of(length, several):
    """Names and numbers of values of each question, over some prompts."""
    made = []
    for seed in range(30):
        maker = NamedValues(random.Random(seed), size)
        answered = maker.groups
        maker.groups = lambda *given, answered=answered: made.append(answered(*given)) or made[-1]
        maker.draw(length, several)
    return [(len({name for name, _ in group.values}), len(group.values)) for groups, *_ in made for group in groups]


def test_questions_are_about_several_names_or_values_as_often_as_asked():
    values, queries = groups_of(1024, VALUES), groups_of(1024, QUERIES)
    assert sum(names == 1 < count for names, count in values) > 0.6 * len(values) > 0
    assert sum(names > 1 for names, _ in queries) > 0.5 * len(queries) > 0


def test_short_drills_give_every_name_several_values():
    questions = 0
    for seed in range(10):
        segments = drawn(DRILL_TOK - 64, VALUES, seed)
        ends = [i for i, segment in enumerate(segments) if segment.ends]
        begins = [i for i, segment in enumerate(segments) if not segment.answer and segment.states is None]
        for begin, end in zip(begins, ends, strict=True):
            assert 2 <= sum(s.tells and bool(s.asks) for s in segments[begin:end]) <= 4
        questions += len(begins)
    assert questions > 10


def test_names_share_words_in_some_prompts():
    shared = 0
    for seed in range(30):
        names = Names(random.Random(seed))
        words = [word for _ in range(20) for word in names.draw().split("-")]
        shared += len(set(words)) < 0.8 * len(words)
    assert 5 < shared < 25
