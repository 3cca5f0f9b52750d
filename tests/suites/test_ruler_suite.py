import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from hipexp.config.schema import ConfigError
from hipexp.run.tokenizer_file import read_tokenizer
from hipexp.suites.data.registry import ESSAY_TASKS
from hipexp.suites.ruler import EDITION, SUBTASKS, TASKS, Ruler, make_rows
from hipexp.suites.ruler import resources as files
from hipexp.suites.sample import DataMissing, Item
from ruler_data import write_resources

pytest.importorskip("lm_eval")

QUICK = ("vt", "cwe", "fwe", "qa_1", "qa_2")
NEEDLES = tuple(name for name in SUBTASKS if name not in QUICK)
TEMPLATE = ("<user> ", " <assistant> ")
LENGTH_TOK = 6000
START = 1


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(Path(__file__).parents[2] / "hipexp/needle/model/tokenizer.json")


@pytest.fixture(scope="module")
def count(tokenizer):
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_resources(tmp_path_factory.mktemp("ruler"))


@pytest.fixture
def ruler(tokenizer, count, folder):
    def open_with(subtasks=QUICK, samples=2, template=TEMPLATE, resources=folder, seed=42, length_tok=LENGTH_TOK):
        return Ruler(subtasks, samples, length_tok, lambda text: tokenizer(text).input_ids, count, seed, resources, template)

    return open_with


@pytest.mark.parametrize("subtasks", [QUICK, pytest.param(NEEDLES, marks=pytest.mark.slow)])
def test_samples_are_the_rows_with_the_template_around_and_the_answer_begun(ruler, count, folder, subtasks):
    suite = ruler(subtasks)
    items = suite.items()
    assert items == [Item(name, index, LENGTH_TOK) for name in subtasks for index in range(2)]
    for item in items:
        sample = suite.sample(item)
        row = make_rows(item.subtask, LENGTH_TOK, 2, 42, count, folder, template=TEMPLATE)[item.index]
        assert sample.prompt == "<user> " + row["input"] + " <assistant> " + row["answer_prefix"]
        assert sample.tokens[0] == START and sample.tokens.count(START) == 1
        assert len(sample.tokens) - 1 + sample.max_new_tok == row["length"] <= LENGTH_TOK == sample.length_tok
        assert sample.references == row["outputs"]
        assert sample.max_new_tok == TASKS[item.subtask].new_tok
        assert (sample.subtask, sample.index, sample.removed_tok) == (item.subtask, item.index, 0)
        depth = pytest.approx(sample.prompt.index(row["outputs"][0]) / len(sample.prompt), abs=0.1) if "depth" in sample.meta else None
        read = {"qa_1": ["squad.json"], "qa_2": ["hotpotqa.json"], "cwe": ["english_words.json"]}.get(item.subtask, [])
        read = ["PaulGrahamEssays.json"] if item.subtask in ESSAY_TASKS else read
        assert sample.meta == ({"depth": depth} if item.subtask.startswith("niah") else {}) | ({"stand_ins": read} if read else {})


def test_the_same_item_gives_the_same_sample(ruler):
    suite = ruler()
    first = suite.sample(Item("qa_1", 1, LENGTH_TOK))
    suite.sample(Item("qa_2", 0, LENGTH_TOK))
    assert suite.sample(Item("qa_1", 1, LENGTH_TOK)) == first
    assert ruler(samples=5).sample(Item("qa_1", 1, LENGTH_TOK)) == first
    assert ruler(seed=1).sample(Item("qa_1", 1, LENGTH_TOK)) != first


def test_rows_of_a_task_are_made_once(ruler, monkeypatch):
    from hipexp.suites.ruler import suite as module

    made = []
    monkeypatch.setattr(module, "make_rows", lambda name, *args, **kwargs: made.append(name) or make_rows(name, *args, **kwargs))
    suite = ruler(("vt", "qa_1"), samples=3)
    for item in suite.items():
        suite.sample(item)
    assert made == ["vt", "qa_1"]


def test_scores_are_the_shares_of_the_references_that_were_said(ruler):
    suite = ruler()
    chain = suite.sample(Item("vt", 0, LENGTH_TOK))
    assert suite.score(chain, "\x00" + "\n".join(chain.references[:3]).lower()) == 60
    assert suite.score(chain, "") == 0
    question = suite.sample(Item("qa_1", 0, LENGTH_TOK))
    assert suite.score(question, f" {question.references[0].upper()}.") == 100
    assert suite.score(question, "nothing") == 0


def test_the_card_says_what_decides_the_numbers(ruler, folder):
    card = ruler().card()
    assert (card.suite, card.protocol, card.edition) == ("ruler", "stand-in", EDITION) and EDITION == "2025"
    assert card.length_tok == dict.fromkeys(QUICK, LENGTH_TOK) and card.samples == dict.fromkeys(QUICK, 2)
    assert card.new_tok == {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert card.metric["vt"] == card.metric["cwe"] != card.metric["qa_1"] == card.metric["qa_2"]
    assert len(set(card.template.values())) == 4 and card.template["qa_1"] == card.template["qa_2"]
    assert len(card.chat_template) == 12 and card.chat_template != ruler(template=("<user> ", "")).card().chat_template
    assert "seed 42; wonderwords " in card.data and "sentences" not in card.data
    for name in ("squad.json", "hotpotqa.json", "english_words.json"):
        assert f"{name} sha256 {hashlib.sha256((folder / name).read_bytes()).hexdigest()}" in card.data
    assert "PaulGrahamEssays" not in card.data
    assert json.dumps(card.to_dict())
    assert ruler(("vt",), template=("", "")).card().chat_template is None
    assert "seed 5;" in ruler(("vt",), seed=5).card().data
    assert "rows of seed 5: the official ones are of seed 42" in ruler(("vt",), seed=5).card().note


def test_the_card_says_what_is_no_official_score(ruler, folder, tmp_path, monkeypatch):
    card = ruler(("vt", "qa_1", "cwe")).card()
    assert card.protocol == "stand-in"
    assert card.note == "no official RULER score (qa_1, cwe): squad.json, english_words.json, each a stand-in made by hipexp"
    for name in ("squad.json", "english_words.json"):
        assert f"{name} sha256 {hashlib.sha256((folder / name).read_bytes()).hexdigest()} (stand-in made by hipexp)" in card.data
    plain = ruler(("vt", "fwe")).card()
    assert (plain.protocol, plain.note) == ("official", "") and "stand-in" not in plain.data
    other = write_resources(tmp_path)
    unmarked = (other / "squad.json").read_text().replace("stand-in made by hipexp", "dev")
    (other / "squad.json").write_text(unmarked)
    suite = ruler(("vt", "qa_1"), resources=other)
    own = "no official RULER score (qa_1): squad.json, not known to be the published data"
    assert (suite.card().protocol, suite.card().note) == ("own data", own)
    assert [suite.sample(Item(name, 0, LENGTH_TOK)).meta for name in suite.subtasks] == [{}, {"own_data": ["squad.json"]}]
    both = ruler(("qa_1", "qa_2"), resources=other).card()
    assert both.protocol == "stand-in" and both.note.endswith(own) and "(qa_2): hotpotqa.json, each a stand-in" in both.note
    monkeypatch.setattr(files, "read_record", lambda _: {})
    squad = dataclasses.replace(files.file_named("ruler", "squad.json"), sha256=hashlib.sha256(unmarked.encode()).hexdigest())
    monkeypatch.setattr(files, "file_named", lambda *_: squad)
    fetched = ruler(("qa_1",), resources=other).card()
    assert (fetched.protocol, fetched.note) == ("official", "")


@pytest.mark.slow
def test_the_card_of_needles_names_the_sentence_splitter(ruler, folder):
    data = ruler(("niah_single_2",)).card().data
    assert f"sentences: {files.sentences(folder).name}; PaulGrahamEssays.json sha256 " in data
    cards = ruler(NEEDLES).card()
    assert cards.protocol == "stand-in" and ruler(("niah_single_1", "niah_multikey_2")).card().protocol == "official"
    assert cards.note.startswith(f"no official RULER score ({', '.join(ESSAY_TASKS)}): PaulGrahamEssays.json, each")
    assert len(set(cards.template.values())) == 1
    assert set(cards.new_tok.values()) == {128}


def test_the_card_says_that_the_second_word_list_is_missing(ruler, tmp_path):
    alone = write_resources(tmp_path, more_words=False)
    note = ruler(("cwe",), resources=alone).card().note
    assert note == "cwe without english_words.json: beyond 8166 words (about 128K tokens, for no tokenizer below 48K) it is refused"
    assert ruler(("vt",), resources=alone).card().note == ""


def test_what_is_missing_or_wrong_is_found_when_it_is_opened(ruler, tmp_path):
    with pytest.raises(DataMissing, match=r"squad.json is missing: .*python -m hipexp data pull ruler"):
        ruler(("vt", "qa_1"), resources=tmp_path)
    with pytest.raises(DataMissing, match=r"PaulGrahamEssays.json is missing"):
        ruler(("niah_multikey_1",), resources=tmp_path)
    ruler(("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"), resources=tmp_path)  # need no file
    (tmp_path / "squad.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"squad.json must hold"):
        ruler(("qa_1",), resources=tmp_path)
    (tmp_path / "english_words.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"english_words.json must hold"):
        ruler(("cwe",), resources=tmp_path)
    with pytest.raises(ConfigError, match=r"task.samples=41 must be at most 40"):
        ruler(("qa_2",), samples=41)
    with pytest.raises(ConfigError, match="'niah' is not a task of RULER"):
        ruler(("niah",))


@pytest.mark.parametrize("subtask", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in NEEDLES)])
def test_a_length_that_holds_no_sample_is_refused_when_it_is_opened(ruler, subtask):
    with pytest.raises(ConfigError, match=rf"task\.length_tok=300 is too short for {subtask} with this tokenizer: .*; use a longer one"):
        ruler((subtask,), length_tok=300)


def test_a_chat_template_that_leaves_no_room_is_refused_when_it_is_opened(ruler):
    with pytest.raises(ConfigError, match="is too short for vt"):
        ruler(("vt",), length_tok=LENGTH_TOK, template=("word " * LENGTH_TOK, ""))


@pytest.mark.parametrize("subtask", QUICK)
@pytest.mark.parametrize("length_tok", [1200, 2048, 4096, 5000])
def test_what_can_be_opened_can_be_made(ruler, count, folder, subtask, length_tok):
    try:
        suite = ruler((subtask,), samples=1, length_tok=length_tok)
    except ConfigError as refused:
        assert "is too short" in str(refused)
        with pytest.raises(ConfigError, match="is too short"):
            make_rows(subtask, length_tok, 1, 42, count, folder, template=TEMPLATE)
    else:
        assert len(suite.sample(suite.items()[0]).tokens) <= length_tok


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_lengths_that_are_long_enough_for_any_task_are_not_tried_out(ruler, subtask, monkeypatch):
    from hipexp.suites.ruler import generate as module

    monkeypatch.setattr(module, "make_rows", None)
    for length_tok in (8192, 131_072):
        ruler((subtask,), length_tok=length_tok)


def test_cwe_needs_its_second_list_from_the_length_on_at_which_all_words_of_the_first_fit(ruler, tmp_path):
    """About 130K tokens with a tokenizer of words in a few parts, and far more with the small one of the embedded model."""
    alone = write_resources(tmp_path, more_words=False)
    ruler(("cwe",), resources=alone, length_tok=131_072)
    with pytest.raises(DataMissing, match=r"english_words.json is missing: .*run: python -m hipexp data pull ruler"):
        ruler(("cwe",), resources=alone, length_tok=262_144)
    ruler(("cwe",), length_tok=262_144)
    ruler(("vt",), resources=alone, length_tok=262_144)
