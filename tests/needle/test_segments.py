"""Segments become token sequences with weights and links where they belong."""

from types import SimpleNamespace

from hipexp.needle.segments import Link, Prompt, Reader, Segment


def letters(text):
    """One token a letter."""
    return SimpleNamespace(ids=[ord(c) for c in text], offsets=[(i, i + 1) for i in range(len(text))])


def test_weights_links_and_other_right_tokens():
    stated = [Segment("ab ", states=0, unknown=1), Segment("ac ", states=1)]
    answer = [Segment("b", answer=1.0, asks=(0, 1), after=7, tells=True, others=("b", "c")), Segment(".", answer=0.3, ends=True)]
    ids, weight, links, others = Reader(letters, 3.0).read([*stated, Segment("a"), *answer])
    assert ids == [1, *map(ord, "ab ac ab."), 2]
    assert weight == [0.0] * 8 + [3.0, 0.3, 0.3]
    assert links == [Link(7, 8, 2, 4, 7), Link(7, 8, 4, 7, 7)]
    assert others == {8: [ord("b"), ord("c")]}


def test_values_that_begin_alike_leave_no_choice():
    stated = Segment("b1 b2 ", states=0)
    answer = Segment("b", answer=1.0, asks=(0,), tells=True, others=("b", "b"))
    assert Reader(letters, 3.0).read([stated, answer]).others == {}


def test_a_cut_prompt_asks_for_nothing_behind_the_cut():
    prompt = Prompt([1, 5, 6, 7, 8], [0.0, 0.0, 1.0, 0.0, 1.0], [Link(1, 2, 0, 1, 0), Link(3, 4, 0, 1, 0)], {2: [6, 9], 4: [8, 9]})
    assert prompt.cut(3) == Prompt([1, 5, 6], [0.0, 0.0, 1.0], [Link(1, 2, 0, 1, 0)], {2: [6, 9]})
    assert prompt.cut(5) == prompt
