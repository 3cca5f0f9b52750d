"""Training prompts: what they ask for is in them, within the length, and never from the evaluation's seeds."""

import ast
import importlib.util
import random
import re
import string
from pathlib import Path

import pytest

from hipexp import needle
from hipexp.needle.batches import tokenizer
from hipexp.needle.corpus import PromptMaker
from hipexp.needle.phases import PHASES
from hipexp.suites.infbench import KV, make_sample

KINDS = ("repeats", "snippets", "pairs", "digits", "named", "values", "queries", "chains")


def read(text):
    return tokenizer().encode(text, add_special_tokens=False)


def encode(text):
    return read(text).ids


def decode(ids):
    return tokenizer().decode(ids)


def maker_of(length, seed, phase=0):
    return PromptMaker(read, PHASES[phase].mixture(length), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_text_as_evaluation_does(kind):
    for seed in range(8):
        maker = PromptMaker(read, {kind: 1.0}, seed)
        segments = maker.draw(400)
        pieces = list(maker.reader.pieces(segments))
        assert [segment for segment, _ in pieces] == segments
        groups, ids = [[]], [[]]
        for segment, piece in pieces:
            groups[-1].append(segment.text)
            ids[-1] += [i for i in piece if i != 2]
            if segment.ends:
                groups.append([])
                ids.append([])
        assert ids == [encode("".join(texts)) for texts in groups]


def test_a_trained_pair_looks_like_an_evaluated_one():
    maker = maker_of(1024, seed=1)
    whole = re.compile(re.escape(KV.intro) + '\\n{"[0-9a-f-]{36}"')
    trained = next(ids for ids in iter(lambda: maker.prompt(1024).ids, None) if whole.search(decode(ids)))
    asked = make_sample("kv_retrieval", 1, 3, 1024, encode, 0, "default").tokens
    kinds = [
        ["x" if len(t) == 2 and set(t) <= set(string.hexdigits) else t for t in map(tokenizer().id_to_token, ids)]
        for ids in (trained, asked)
    ]
    begin = len(encode(KV.intro)) + 2
    assert kinds[0][1 + begin : begin + 151] == kinds[1][begin : begin + 150]


@pytest.mark.parametrize("length", [96, 128, 192, 384, 1536, 6144])
def test_prompts_fit_and_answers_are_in_the_needle(length):
    maker = maker_of(length, seed=3)
    for _ in range(20):
        ids, weight, links, _ = maker.prompt(length)
        assert len(ids) == len(weight) <= length and ids[0] == 1
        for begin, end, low, high, after in links:
            assert low < high <= begin + 1 <= end < len(ids) and after >= 0
            asked = decode([i for i in ids[begin + 1 : end + 1] if i != 2]).strip(' ".')
            assert asked in decode(ids[low:high])
            assert all(weight[begin + 1 : end + 1])


@pytest.mark.parametrize("length", [192, 384, 768, 6144])
@pytest.mark.parametrize("kind", ["named", "values", "queries", "chains"])
def test_prompts_of_the_later_phases_fit_and_ask_for_what_was_stated(kind, length):
    maker = PromptMaker(read, {kind: 1.0}, seed=5, first_weight=3.0)
    for _ in range(10 if length < 6144 else 3):
        ids, weight, links, others = maker.prompt(length)
        assert len(ids) == len(weight) <= length and ids[0] == 1
        assert 3.0 in weight and links
        assert all(weight[at] == 3.0 and ids[at] in also and len(also) > 1 for at, also in others.items())
        # A link asks in no token at all where the space before a name is read as a part of it.
        assert all(low < high <= begin + 1 <= end + 1 <= len(ids) for begin, end, low, high, _ in links)


def test_a_mixture_has_the_shares_it_names():
    maker = PromptMaker(read, {"pairs": 0.75, "digits": 0.25}, seed=1)
    pairs = sum('": "' in "".join(s.text for s in maker.draw(384)) for _ in range(200))
    assert 120 < pairs < 180


def test_every_kind_of_prompt_is_in_a_mixture():
    named = {kind for phase in PHASES for _, mixture in phase.mixtures for kind in mixture}
    assert named == set(PromptMaker(read, {}).kinds) == set(KINDS)


def test_prompts_vary():
    maker = maker_of(768, seed=4)
    prompts = [decode(maker.prompt(768).ids) for _ in range(160)]
    assert len({prompt[:30] for prompt in prompts}) > 60, "wording"
    assert len({prompt.count('": "') for prompt in prompts}) > 8, "number of pairs"


def test_evaluated_pairs_are_not_those_of_training():
    trained = {answer for seed in range(50) for answer in _answers(maker_of(1024, seed))}
    asked = {make_sample("kv_retrieval", i, 20, 3000, encode, 0, "default").references[0] for i in range(20)}
    assert not trained & asked
    assert random.Random("needle-train/0").random() != random.Random("hipexp-eval/0").random()


def _answers(maker):
    ids, _, links, _ = maker.prompt(1024)
    return [decode(ids[begin + 1 : end]).strip(' ".') for begin, end, *_ in links]


def test_no_sentence_of_ruler_is_in_the_training_text():
    pytest.importorskip("lm_eval")
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks" / "ruler"
    ours = "".join(path.read_text() for path in Path(needle.__file__).parent.glob("*.py"))
    sentences = set()
    for name in ("niah_utils.py", "prepare_niah.py", "vt_utils.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                sentences |= {part.strip() for part in re.split(r"[\n.?!{}]", node.value) if len(part.split()) >= 4}
    assert len(sentences) > 8
    assert not [sentence for sentence in sentences if sentence in ours]
