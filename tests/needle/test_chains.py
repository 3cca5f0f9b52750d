"""Prompts of chains: each answer is the whole chain, from its last name to the first."""

import itertools
import random

import pytest

from hipexp.needle.batches import tokenizer
from hipexp.needle.chains import Chains, spread
from hipexp.needle.segments import Segment


def size(text):
    return len(tokenizer().encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("length", [128, 768])
def test_chains_are_answered_completely_from_the_last_name_to_the_first(length):
    chains = 0
    for seed in range(40):
        sources, answer = {}, ""
        for segment in Chains(random.Random(seed), size).draw(length):
            if segment.states is not None:
                left, right = segment.text.split("=")
                sources[left.split()[-1]] = right.split()[-1]
            elif not segment.answer:
                asked = segment.text
            else:
                answer += segment.text
                if segment.ends:
                    begun = asked.split()[-1] if answer[0] == "=" else ""
                    names = (begun + answer).split("=")
                    assert sources[names[-1]] in asked and sources[names[-1]].isdigit()
                    assert all(sources[after] == before for after, before in itertools.pairwise(names))
                    assert names[0] not in sources.values()
                    chains, answer = chains + 1, ""
    assert chains > 40


def test_needles_lie_at_their_depths_in_the_hay():
    hay = [Segment(str(i)) for i in range(4)]
    made = spread(hay, [Segment("end"), Segment("start"), Segment("middle")], [0.99, 0.0, 0.5])
    assert [segment.text for segment in made] == ["start", "0", "1", "middle", "2", "3", "end"]
