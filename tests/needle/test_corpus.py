"""Training prompts: what they ask for is in them, within the length, and never from the evaluation's seeds."""

import random
import re
import string

import pytest

from hipexp.needle.corpus import PromptMaker
from hipexp.needle.tokenizer import train_tokenizer
from hipexp.suites.infbench import KV, make_sample


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def encoder(tokenizer):
    return lambda text: reader(tokenizer)(text).ids


def reader(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", ["pairs", "digits", "snippets", "repeats"])
def test_training_reads_text_as_evaluation_does(tokenizer, kind):
    for seed in range(8):
        maker = PromptMaker(reader(tokenizer), seed=seed)
        segments = getattr(maker, kind)(400)
        pieces = list(maker.pieces(segments))
        assert [segment for segment, _ in pieces] == segments
        groups, ids = [[]], [[]]
        for segment, piece in pieces:
            groups[-1].append(segment.text)
            ids[-1] += [i for i in piece if i != 2]
            if segment.ends:
                groups.append([])
                ids.append([])
        assert ids == [encoder(tokenizer)("".join(texts)) for texts in groups]


def test_a_trained_pair_looks_like_an_evaluated_one(tokenizer):
    maker = PromptMaker(reader(tokenizer), seed=1)
    encode = encoder(tokenizer)
    whole = re.compile(re.escape(KV.intro) + '\\n{"[0-9a-f-]{36}"')
    trained = next(ids for ids in iter(lambda: maker.prompt(1024)[0], None) if whole.search(tokenizer.decode(ids)))
    asked = make_sample("kv_retrieval", 1, 3, 1024, encode, 0, "default").tokens
    kinds = [
        ["x" if len(t) == 2 and set(t) <= set(string.hexdigits) else t for t in map(tokenizer.id_to_token, ids)] for ids in (trained, asked)
    ]
    begin = len(encode(KV.intro)) + 2
    assert kinds[0][1 + begin : begin + 151] == kinds[1][begin : begin + 150]


@pytest.mark.parametrize("length", [96, 128, 192, 384, 1536, 6144])
def test_prompts_fit_and_answers_are_in_the_needle(tokenizer, length):
    maker = PromptMaker(reader(tokenizer), seed=3)
    for _ in range(20):
        ids, weight, links = maker.prompt(length)
        assert len(ids) == len(weight) <= length and ids[0] == 1
        for begin, end, low, high, after in links:
            assert low < high <= begin + 1 <= end < len(ids) and after >= 0
            asked = tokenizer.decode([i for i in ids[begin + 1 : end + 1] if i != 2]).strip(' ".')
            assert asked in tokenizer.decode(ids[low:high])
            assert all(weight[begin + 1 : end + 1])


def test_prompts_vary(tokenizer):
    maker = PromptMaker(reader(tokenizer), seed=4)
    prompts = [tokenizer.decode(maker.prompt(768)[0]) for _ in range(160)]
    assert len({prompt[:30] for prompt in prompts}) > 60, "wording"
    assert len({prompt.count('": "') for prompt in prompts}) > 8, "number of pairs"


def test_evaluated_pairs_are_not_those_of_training(tokenizer):
    encode = encoder(tokenizer)
    trained = {answer for seed in range(50) for answer in _answers(PromptMaker(reader(tokenizer), seed=seed), tokenizer)}
    asked = {make_sample("kv_retrieval", i, 20, 3000, lambda text: encode(text), 0, "default").references[0] for i in range(20)}
    assert not trained & asked
    assert random.Random("needle-train/0").random() != random.Random("hipexp-eval/0").random()


def _answers(maker, tokenizer):
    ids, _, links = maker.prompt(1024)
    return [tokenizer.decode(ids[begin + 1 : end]).strip(' ".') for begin, end, *_ in links]
