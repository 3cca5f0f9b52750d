import collections
import hashlib
import json
import random
import re
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hipexp
from hipexp.config.schema import ConfigError, Task
from hipexp.suites import infbench, open_suite
from hipexp.suites.infbench import DEPTHS, KINDS, SUBTASKS, WORDINGS, make_sample, score
from hipexp.suites.sample import LineEncoder
from small_tokenizer import Tokenizer, split_characters

CHARACTERS = LineEncoder(Tokenizer(split_characters))
GOLDEN = "c9767d85ec2ed421"
GOLDEN_PASSKEY = (
    "Somewhere in the following text a pass key is hidden. Find it and keep it in mind.\n"
    "The pass key is 12566. Keep it in mind. 12566 is the pass key.\n"
    "Rain falls on the hills. The river takes it down to the sea. Clouds bring it back. The wheel keeps turning.\n"
    "What is the pass key?\n"
    "The pass key is"
)
GOLDEN_PAIRS = (
    "The following JSON object holds pairs of a key and a value.\n"
    '{"627bb2f5-3ee1-4f1e-8542-f7ac8a8bec22": "0f76dde0-bbc2-43eb-85b7-a6a9bfe9c78c", "a56b8ad5-15d5-4b38-8704-b01fced67c5b": "036a5572-7c24-448e-94ca-64fbf97be9e9", "12abc6b3-d532-4e4b-9960-7eca04b2da1b": "50f36539-9c9b-4683-bc97-a164e4b39a69"}\n'
    'What is the value of the key "a56b8ad5-15d5-4b38-8704-b01fced67c5b"?\n'
    '"a56b8ad5-15d5-4b38-8704-b01fced67c5b": "'
)


@pytest.mark.parametrize("subtask", SUBTASKS)
@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("length_tok", [300, 301, 1000, 5000])
def test_prompts_fill_the_length_and_are_never_cut(encode, tokenizer, subtask, wording, length_tok):
    for index in range(3):
        sample = make_sample(subtask, index, 3, length_tok, encode, wording=wording)
        assert sample.tokens == tokenizer(sample.prompt).input_ids
        left = length_tok - sample.max_new_tok - len(sample.tokens)
        one_more = len(encode(KINDS[subtask].wording[wording].noise + "\n")) if subtask != "kv_retrieval" else 120
        assert 0 <= left <= one_more
        assert sample.removed_tok == 0
        assert sample.references[0] in sample.prompt


def test_a_sample_depends_on_its_name_alone(encode):
    first = make_sample("kv_retrieval", 1, 4, 2000, encode, seed=3)
    make_sample("kv_retrieval", 0, 4, 2000, encode, seed=3)
    assert make_sample("kv_retrieval", 1, 4, 2000, encode, seed=3) == first
    others = [
        make_sample(*name, encode, seed=seed)
        for *name, seed in (("kv_retrieval", 1, 4, 2000, 4), ("kv_retrieval", 2, 4, 2000, 3), ("kv_retrieval", 1, 4, 2010, 3))
    ]
    assert len({one.references[0] for one in (first, *others)}) == 4


def test_needles_stand_at_the_depths_of_the_recipe():
    samples = [make_sample("passkey", i, DEPTHS * 2, 900, CHARACTERS) for i in range(DEPTHS * 2)]
    depths = [sample.meta["depth"] for sample in samples]
    assert collections.Counter(collections.Counter(depths).values()) == {2: DEPTHS}
    assert (min(depths), max(depths)) == (0.0, 1.0)
    for sample in samples:
        lines = sample.prompt.splitlines()[1:-2]
        position = next(i for i, line in enumerate(lines) if sample.references[0] in line)
        assert position == round(sample.meta["depth"] * sample.meta["noise_lines"])
        assert len(lines) == sample.meta["noise_lines"] + 1


@given(count=st.integers(1, 200))
def test_depths_are_spread_evenly(count):
    depths = [infbench.place_of(i, count, DEPTHS) for i in range(count)]
    assert depths == sorted(depths)
    uses = collections.Counter(depths)
    if count >= DEPTHS:
        assert set(depths) == set(range(DEPTHS))
        assert max(uses.values()) - min(uses.values()) <= 1
    else:
        assert max(uses.values()) == 1
        assert depths[0] + depths[-1] in (DEPTHS - 1, DEPTHS)
        for i, depth in enumerate(depths):
            assert i / count * DEPTHS < depth + 0.5 < (i + 1) / count * DEPTHS


def test_few_samples_need_neither_sinks_nor_window():
    assert [infbench.place_of(i, 2, DEPTHS) for i in range(2)] == [14, 44]
    assert [infbench.place_of(i, 4, 1000) for i in range(4)] == [125, 375, 625, 875]


@given(seed=st.integers(), index=st.integers(0, 19))
@settings(max_examples=20, deadline=None)
def test_pairs_ask_for_evenly_spread_pairs(seed, index):
    sample = make_sample("kv_retrieval", index, 20, 2500, CHARACTERS, seed=seed)
    pairs = json.loads(re.search(r"\{.*\}", sample.prompt)[0])
    assert len(pairs) == sample.meta["pairs"]
    asked = list(pairs)[(2 * index + 1) * len(pairs) // 40]
    assert pairs[asked] == sample.references[0]
    assert sample.prompt.endswith(f'\n"{asked}": "')
    assert all(uuid.UUID(text).version == 4 for pair in pairs.items() for text in pair)
    assert len({*pairs, *pairs.values()}) == 2 * len(pairs)


@given(seed=st.integers())
def test_pass_keys_have_five_digits(seed):
    assert re.fullmatch("[1-9][0-9]{4}", infbench.five_digits(random.Random(seed)))


@given(seed=st.integers())
def test_long_numbers_are_five_digits_doubled_five_times(seed):
    text = infbench.ten_digits(random.Random(seed))
    assert re.fullmatch("[0-9]{10}", text)
    # Doubling in place never makes a run of equal digits vanish: at most five runs remain.
    assert 1 <= len(re.findall(r"(.)\1*", text)) <= 5


def test_digits_are_uniform():
    rng = random.Random(0)
    counts = collections.Counter("".join(infbench.ten_digits(rng) for _ in range(5000)))
    assert all(abs(counts[digit] / 50000 - 0.1) < 0.012 for digit in "0123456789")


@pytest.mark.parametrize(
    ("subtask", "prediction", "reference", "right"),
    [
        ("passkey", " 71432.", "71432", True),
        ("passkey", "The key is 71432, or 11111", "71432", True),
        ("passkey", "11111 or 71432", "71432", False),
        ("passkey", " 714321", "71432", False),
        ("passkey", " 071432", "71432", False),
        ("passkey", "7 1432", "71432", False),
        ("passkey", "1 71432", "71432", False),
        ("passkey", "", "71432", False),
        ("passkey", "٧١٤٣٢", "71432", False),
        ("number_string", " 0011223344.", "0011223344", True),
        ("number_string", " 11223344.", "0011223344", False),
        ("kv_retrieval", 'a1b2-c3"', "a1b2-c3", True),
        ("kv_retrieval", 'it is: {"a1b2-c3"}!', "a1b2-c3", True),
        ("kv_retrieval", "x\na1b2-c3\ny", "a1b2-c3", True),
        ("kv_retrieval", "a1b2-c34", "a1b2-c3", False),
        ("kv_retrieval", "a1b2 -c3", "a1b2-c3", False),
        ("kv_retrieval", "(a1b2-c3)", "a1b2-c3", False),
        ("kv_retrieval", "", "a1b2-c3", False),
    ],
)
def test_scoring_follows_the_official_rule(subtask, prediction, reference, right):
    assert score(subtask, prediction, [reference]) == (100.0 if right else 0.0)


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_perfect_answer_fits_the_new_token_limit(encode, subtask):
    for index in range(20):
        sample = make_sample(subtask, index, 20, 700, encode)
        text = KINDS[subtask].answer.format(sample.references[0])
        assert len(encode(sample.prompt + text)) - len(sample.tokens) < sample.max_new_tok
        assert score(subtask, text, sample.references) == 100.0


def test_prompts_are_frozen():
    """A change of words or of a recipe changes every score: raise RESULT_VERSION, SCORER or the template with it."""
    made = "\0".join(make_sample(name, 1, 3, 400, CHARACTERS, wording=words).prompt for name in SUBTASKS for words in WORDINGS)
    assert hashlib.sha256(made.encode()).hexdigest()[:16] == GOLDEN
    assert make_sample("passkey", 0, 1, 150, CHARACTERS).prompt == GOLDEN_PASSKEY
    assert make_sample("kv_retrieval", 1, 3, 280, CHARACTERS).prompt == GOLDEN_PAIRS


def training_source():
    return "".join(path.read_text() for path in sorted(Path(hipexp.__file__).parent.joinpath("needle").glob("*.py")))


def test_training_never_draws_from_the_names_of_evaluation():
    source = training_source()
    names = re.findall(r'Random\(f?"([^"]+)"', source)
    assert names
    assert not any(name.startswith(infbench.SEED_NAMESPACE) for name in names)
    assert f'"{infbench.SEED_NAMESPACE}' not in source


def test_the_heldout_wording_shares_no_sentence_with_training():
    source = training_source()
    for name in SUBTASKS:
        seen, unseen = (KINDS[name].wording[words] for words in ("default", "heldout"))
        for part in ("intro", "noise", "question"):
            text = getattr(unseen, part)
            assert not text or (text != getattr(seen, part) and text not in source)


@pytest.mark.parametrize("name", infbench.OFFICIAL_ONLY)
def test_official_subtasks_say_how_to_get_their_data(name):
    with pytest.raises(ConfigError, match=rf"`python -m hipexp data pull infbench subtask={name}`, then task.protocol=completion"):
        infbench.check_subtasks([name])


def test_unknown_subtasks_list_the_known():
    with pytest.raises(ConfigError, match=r"'passkeys'.*passkey, number_string, kv_retrieval"):
        infbench.check_subtasks(["passkeys"])


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_length_below_the_frame_is_refused_with_numbers(encode, tokenizer, subtask):
    with pytest.raises(ConfigError, match=r"task\.length_tok=30 .* use at least \d+") as refused:
        make_sample(subtask, 0, 1, 30, encode)
    least = int(str(refused.value).split()[-1])
    assert len(make_sample(subtask, 0, 1, least, encode).tokens) <= least
    with pytest.raises(ConfigError, match="use at least"):
        open_suite(Task(name="infbench", subtasks=[subtask], length_tok=30), tokenizer, 100, 0)


def test_defaults_are_all_subtasks_at_twice_the_trained_length(tokenizer):
    suite = open_suite(Task(name="infbench"), tokenizer, 500, 0)
    items = suite.items()
    assert {item.length_tok for item in items} == {1000}
    assert [item.subtask for item in items] == [name for name in SUBTASKS for _ in range(5)]
    card = suite.card().to_dict()
    assert json.loads(json.dumps(card)) == card
    assert card["protocol"] == "hipexp"
    assert "not an official ∞Bench score" in card["note"]
