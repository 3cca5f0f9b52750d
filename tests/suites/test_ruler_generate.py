import hashlib
import importlib.metadata
import json
import os
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.run.tokenizer_file import read_tokenizer
from hipexp.suites.lm_eval import needles, suite_module
from hipexp.suites.ruler import SUBTASKS, TASKS, check_subtasks, make_rows
from hipexp.suites.ruler import resources as files
from hipexp.suites.ruler.generate import Draft, Frame, search, shrunk, undisturbed, words_of
from hipexp.suites.ruler.stand_ins import ABBREVIATIONS, STARTERS, UPPER_FIRST_LOWER_WITHIN, essays
from hipexp.suites.sample import DataMissing
from ruler_data import write_resources

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")

NEEDLES = tuple(name for name in SUBTASKS if name.startswith("niah"))
QUICK = tuple(name for name in SUBTASKS if name not in NEEDLES)
EACH = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in NEEDLES))  # needles take 15 s to import
UNIT_WORDS = {"essay": 1, "repeat": 19, "needle": 10, "vt": 19, "cwe": 6, "qa": 110}  # most white-space words of one unit
GOLDEN = {"vt": "ce89d1c2", "cwe": "32bb7e66", "fwe": "a4cb1d46"}


def count_words(text):
    return len(text.split())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_resources(tmp_path_factory.mktemp("ruler"))


def states():
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tolist(), *rest)


class Recorder:
    """Calls of a function of lm_eval: their arguments, in order."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        self.calls.append((tuple(list(one) if isinstance(one, list) else one for one in args), kwargs))  # it may shuffle a list
        return self.function(*args, **kwargs)

    def replay(self, seed=42):
        """The results of the same calls, one after the other, on a fresh random stream."""
        with undisturbed():
            random.seed(seed)
            np.random.seed(seed)
            return [self.function(*args, **kwargs) for args, kwargs in self.calls]


@pytest.mark.parametrize("subtask", EACH)
@pytest.mark.parametrize("length_tok", [1024, 4096, 9000])
def test_rows_fit_and_hold_their_answers(folder, subtask, length_tok):
    task = TASKS[subtask]
    length_tok = max(length_tok, 1500) if task.family == "qa" or task.haystack == "essay" else length_tok
    rows = make_rows(subtask, length_tok, 4, 42, count_words, folder)
    slack = length_tok // 16 if task.family == "fwe" else task.step_at(length_tok) * UNIT_WORDS[task.haystack or task.family]
    assert len(rows) == 4
    for number, row in enumerate(rows):
        assert row["length"] == row["length_w_model_temp"] == count_words(row["input"] + row["answer_prefix"]) + task.new_tok
        assert length_tok - slack <= row["length"] <= length_tok
        assert all(answer in row["input"] for answer in row["outputs"])
        assert row["answer_prefix"].startswith(" ") and "{" not in row["answer_prefix"]
        assert row["input"] == row["input"].rstrip()
        if task.family == "niah":
            assert row["input"][row["index"] :].startswith(row["outputs"][0])
            assert row["token_position_answer"] == count_words(row["input"][: row["index"]])
        else:
            assert row["index"] == number
            assert "token_position_answer" not in row
    expected = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    assert {len(row["outputs"]) for row in rows} == {expected.get(subtask, 1)}


@pytest.mark.parametrize("subtask", EACH)
def test_the_seed_decides_the_rows(folder, subtask):
    first = make_rows(subtask, 4096, 3, 42, count_words, folder)
    random.seed(random.randint(0, 1000))
    assert make_rows(subtask, 4096, 3, 42, count_words, folder) == first
    assert make_rows(subtask, 4096, 1, 42, count_words, folder) == first[:1]
    others = make_rows(subtask, 4096, 3, 43, count_words, folder)
    assert all(one["input"] != other["input"] for one, other in zip(first, others, strict=True))


@pytest.mark.parametrize("subtask", EACH)
def test_the_random_state_of_the_caller_is_untouched(folder, subtask):
    before = states()
    make_rows(subtask, 4096, 1, 42, count_words, folder)
    assert states() == before
    with pytest.raises(ConfigError):
        make_rows(subtask, 100, 1, 42, count_words, folder)
    assert states() == before


@pytest.mark.parametrize("subtask", EACH)
def test_lengths_at_which_the_official_generator_never_ends_are_refused(folder, subtask):
    with pytest.raises(ConfigError, match=rf"task.length_tok=220 is too short for {subtask} with this tokenizer: .*; use a longer one"):
        make_rows(subtask, 220, 1, 42, lambda text: 2 * count_words(text), folder)


def test_a_tokenizer_that_has_no_room_for_the_example_of_chains_is_refused(folder):
    with pytest.raises(ConfigError, match=r"vt needs a tokenizer for which 500 tokens hold the official solved example"):
        make_rows("vt", 9000, 1, 42, lambda text: 4 * count_words(text), folder)


@pytest.mark.parametrize("subtask", EACH)
def test_the_chat_template_counts_and_stands_around_the_task(folder, subtask):
    before, after = "You are one of those who answer. " * 20, " Over to you now:" * 5
    rows = make_rows(subtask, 4096, 2, 42, count_words, folder, template=(before, after))
    plain = make_rows(subtask, 4096, 2, 42, count_words, folder)
    new_tok = TASKS[subtask].new_tok
    for row in rows:
        assert "Over to you" not in row["input"] + row["answer_prefix"] and "those who" not in row["input"]
        assert row["length"] == count_words(before + row["input"] + after + row["answer_prefix"]) + new_tok <= 4096
    assert len(rows[0]["input"]) < len(plain[0]["input"])


def test_new_tokens_can_be_set(folder):
    for subtask in QUICK:
        (row,) = make_rows(subtask, 4096, 1, 42, count_words, folder, new_tok=1000)
        assert row["length"] == count_words(row["input"] + row["answer_prefix"]) + 1000 <= 4096


def test_coded_words_are_those_of_lm_eval(folder):
    module = suite_module("ruler.fwe_utils")
    with undisturbed():
        random.seed(42)
        np.random.seed(42)
        theirs = module.sys_kwext(lambda text: SimpleNamespace(input_ids=text.split()), max_seq_length=4096 - 50, num_samples=3)
    ours = make_rows("fwe", 4096, 3, 42, count_words, folder)
    assert [(row["input"], row["outputs"], row["length"]) for row in ours] == [
        (row["input"], row["outputs"], row["length"]) for row in theirs
    ]
    assert {row["answer_prefix"] for row in ours} == {" " + theirs[0]["gen_prefix"]}


@pytest.mark.parametrize("subtask", ["qa_1", "qa_2"])
def test_documents_are_those_of_lm_eval(folder, subtask, monkeypatch):
    module = suite_module("ruler.qa_utils")
    recorder = Recorder(module.generate_input_output)
    monkeypatch.setattr(module, "generate_input_output", recorder)
    length_tok = 2500  # less than all documents
    rows = make_rows(subtask, length_tok, 3, 42, count_words, folder)
    assert {args[0] for args, _ in recorder.calls[-3:]} == {0, 1, 2}
    for row, (text, answers) in zip(rows, recorder.replay()[-3:], strict=True):
        assert (row["input"], row["outputs"], row["answer_prefix"]) == (text, answers, " Answer:")
    sizes = [args[1] for args, _ in recorder.calls]
    per_unit = (count_words(recorder.replay()[0][0]) + 1) / 10
    assert sizes[:2] == [10, (10 + int(length_tok / per_unit * 3)) // 2]


def test_all_documents_are_repeated_and_their_order_is_kept(folder):
    asked, documents = files.questions(folder, "squad")
    before = list(documents)
    (row,) = make_rows("qa_1", 9000, 1, 42, count_words, folder)
    shown = re.findall(r"Document \d+:\n", row["input"])
    assert len(shown) > len(documents) == 60
    assert documents == before
    assert len(asked) == 40


def test_common_words_are_those_of_lm_eval(folder, monkeypatch):
    module = suite_module("ruler.cwe_utils")
    recorder = Recorder(module.get_example)
    monkeypatch.setattr(module, "get_example", recorder)
    rows = make_rows("cwe", 4096, 3, 42, count_words, folder)
    calls = [args for args, _ in recorder.calls]
    assert {args[1:] for args in calls[::2]} == {(10, 3, 10)} and {args[1:] for args in calls[1::2]} == {(30, 3, 10)}
    assert (calls[0][0], calls[1][0]) == (40, 4096)
    monkeypatch.setattr(module, "get_example", recorder.function)
    monkeypatch.setattr(module, "RNG", SimpleNamespace(shuffle=lambda items: random.Random(42).shuffle(items)))
    theirs = Recorder(module.generate_input_output)
    theirs.calls = [((args[0], 4096), {}) for args in calls[1::2]]
    prefix = module.CONFIG["answer_prefix"]
    for row, (example, text, answers) in zip(rows, theirs.replay()[-3:], strict=True):
        spaced = example.replace(prefix, prefix + " ")
        assert row["input"] + row["answer_prefix"] == f"{spaced}\n{text}"
        assert row["outputs"] == answers


def test_the_word_list_of_the_official_seed_is_that_of_lm_eval():
    words = sorted(suite_module("ruler.cwe_utils").WORDS)
    random.Random(42).shuffle(words)
    assert words == suite_module("ruler.cwe_utils").WORDS


@pytest.mark.slow
@pytest.mark.parametrize("subtask", NEEDLES)
def test_needles_are_those_of_lm_eval(folder, subtask, monkeypatch):
    module = needles()
    recorder = Recorder(module.generate_input_output)
    monkeypatch.setattr(module, "generate_input_output", recorder)
    rows = make_rows(subtask, 4096, 3, 42, count_words, folder)
    replayed = recorder.replay()
    made = [one for one in replayed if count_words(one[0]) + 128 <= 4096][-3:]
    for row, (text, answers, query) in zip(rows, made, strict=True):
        assert (row["input"] + row["answer_prefix"], row["outputs"]) == (text, answers)
        assert query in row["answer_prefix"]
    step = TASKS[subtask].step
    assert [args[0] for args, _ in recorder.calls[:2]] == [step, (step + int(4096 / (count_words(replayed[0][0]) / step) * 3)) // 2]


@pytest.mark.slow
@pytest.mark.parametrize("subtask", ["niah_single_1", "niah_multikey_3", "niah_multivalue", "niah_multiquery"])
def test_the_answer_prefix_of_needles_is_that_of_lm_eval(folder, subtask):
    module, task = needles(), TASKS[subtask]
    haystack = files.essay_words(folder) if task.haystack == "essay" else module.get_haystack(task.haystack)
    settings_ = dict(type_haystack=task.haystack, type_needle_k=task.keys, type_needle_v=task.values, num_needle_k=task.n_keys)
    more = dict(num_needle_v=task.n_values, num_needle_q=task.n_asked, max_seq_length=4096, num_samples=2)
    template, prefix = words_of(task)
    with undisturbed():
        theirs = module.generate_samples(
            haystack, lambda text: SimpleNamespace(input_ids=text.split()), template=template + prefix, **settings_, **more
        )
    for row in theirs:
        assert row["input"].endswith(" " + row["gen_prefix"])


@pytest.mark.slow
def test_essays_are_repeated_when_they_are_too_short(folder):
    (row,) = make_rows("niah_single_2", 40_000, 1, 42, count_words, folder)
    words = files.essay_words(folder)
    assert len(words) < 20_000
    assert row["length"] > 39_000
    assert row["input"].count(" ".join(words[40:60])) > 1


def test_chains_follow_the_recipe(folder):
    rows = make_rows("vt", 4096, 5, 42, count_words, folder)
    examples = set()
    for row in rows:
        task = row["input"].split("\n\n")[-1]  # the example and its question stand before
        lines = task.split("\nQuestion: ")[0].splitlines()
        chain = [line for line in lines if line.startswith("VAR ")]
        assert len(chain) == 5 and len({line for line in lines if line not in chain}) == 1
        value = re.fullmatch(r"VAR ([A-Z]{5}) = ([0-9]{5})", chain[0])
        names = [value[1]]
        for line in chain[1:]:
            after, before = re.fullmatch(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5}) ", line).groups()
            assert before == names[-1]
            names.append(after)
        assert row["outputs"] == names
        assert f"value {value[2]} in the text" in task
        assert row["answer_prefix"].endswith(f"5 variables are assigned the value {value[2]}, they are: ")
        short = re.findall(r"VAR ([A-Z]{3}) = ([0-9]{5}|VAR [A-Z]{3})", row["input"])
        assert len(short) == 5 and short[0][1].isdigit() and short[0][1] != value[2]
        assert f"they are:  {' '.join(name for name, _ in short)}\n\n" in row["input"]
        examples.add(tuple(short))
        assert 400 < count_words("\n\n".join(row["input"].split("\n\n")[:2])) <= 500 + 5  # its answer comes on top of 500
    assert len(examples) == 5


def test_a_second_word_list_is_for_more_words_than_wonderwords_has(folder, tmp_path):
    alone = write_resources(tmp_path, more_words=False)
    assert len(suite_module("ruler.cwe_utils").WORDS) == 8166 or importlib.metadata.version("wonderwords") != "3.0.1"
    with pytest.raises(DataMissing, match=r"english_words.json is missing: .*data pull ruler"):
        make_rows("cwe", 60_000, 1, 42, count_words, alone)
    (row,) = make_rows("cwe", 60_000, 1, 42, count_words, folder)
    second = set(files.more_words(folder))
    assert set(row["outputs"]) <= second
    assert row["length"] > 59_900
    (row,) = make_rows("cwe", 40_000, 1, 42, count_words, alone)
    assert not set(row["outputs"]) <= second and 39_900 < row["length"] <= 40_000
    (tmp_path / "english_words.json").write_text(json.dumps([f"w{n}" for n in range(9000)]))
    with pytest.raises(ConfigError, match=r"makes cwe try [0-9]+ words, but .*english_words.json has 9000"):
        make_rows("cwe", 60_000, 1, 42, count_words, tmp_path)


def test_wrong_requests_are_refused(folder):
    with pytest.raises(ConfigError, match="'qa_3' is not a task of RULER"):
        make_rows("qa_3", 4096, 1, 42, count_words, folder)
    with pytest.raises(ConfigError, match=r"task.samples=41 must be at most 40, the questions of .*squad.json"):
        make_rows("qa_1", 4096, 41, 42, count_words, folder)
    with pytest.raises(ConfigError, match="seed=-1 must be from 0"):
        make_rows("vt", 4096, 1, -1, count_words, folder)
    with pytest.raises(ConfigError, match="finds no tokens in a prompt of qa_1"):
        make_rows("qa_1", 4096, 1, 42, lambda _: 0, folder)
    assert check_subtasks([]) == SUBTASKS and len(SUBTASKS) == 13
    assert check_subtasks(["vt", "cwe", "vt"]) == ("vt", "cwe")


@given(
    step=st.integers(1, 40),
    most=st.integers(1, 2000),
    per_unit=st.integers(1, 30),
    frame_tok=st.integers(0, 300),
    room=st.integers(1, 9000),
)
@settings(max_examples=200, deadline=None)
def test_the_search_finds_the_largest_size_that_fits(step, most, per_unit, frame_tok, room):
    frame, tried = Frame("vt", room, 7, "", "", count_words), []

    def measure(size):
        tried.append(size)
        return size * per_unit + frame_tok

    found = search(measure, step, most, frame, more_tok=3)
    fitting = [n for n in range(step, max(most, 2 * step) + 1) if n * per_unit + frame_tok + 10 <= room]
    assert found == max(fitting, default=step)
    assert tried[0] == (step + max(most, 2 * step)) // 2
    assert min(tried) >= step and max(tried) <= max(most, 2 * step)


@given(size=st.integers(1, 500), step=st.integers(1, 40), smallest=st.integers(1, 12), room=st.integers(10, 600))
@settings(max_examples=200, deadline=None)
def test_samples_shrink_by_steps_until_they_fit(size, step, smallest, room):
    frame, tried = Frame("vt", room, 5, "", "", count_words), []

    def build(units):
        tried.append(units)
        return Draft("word " * units, "so", [])

    sizes = list(range(size, 0, -step))
    end = next((n for n in sizes if n + 6 <= room or n <= step), None)
    if end is not None and end >= smallest and end + 6 <= room:
        draft, length = shrunk(build, size, step, smallest, frame)
        assert length == count_words(draft.text) + 6 == end + 6
        assert tried == sizes[: sizes.index(end) + 1]
    else:
        with pytest.raises(ConfigError, match="too short for vt"):
            shrunk(build, size, step, smallest, frame)
        assert all(n >= smallest for n in tried)


def test_a_smallest_sample_gets_more_than_one_try():
    frame, sizes = Frame("vt", 20, 0, "", "", count_words), iter([30, 25, 21, 20])
    _, length = shrunk(lambda _: Draft("word " * next(sizes), "", []), 10, 10, 1, frame)
    assert length == 20


@pytest.mark.skipif(importlib.metadata.version("wonderwords") != "3.0.1", reason="other words")
@pytest.mark.parametrize("subtask", GOLDEN)
def test_rows_stay_as_they_are(folder, subtask):
    """Of the tasks that read no file. A change of lm_eval's words or builders, or of ours, fails here."""
    rows = make_rows(subtask, 4096, 3, 42, count_words, folder)
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8] == GOLDEN[subtask]


def step_tok(task, row, count):
    """Tokens of an official step, of the longest units in a row."""
    text = row["input"]
    if task.family == "fwe":
        return count(" ".join(text.split()[-(131_072 // 32) :]))
    if task.family == "cwe":
        return task.step * 3 * count("24000. incomprehensibility ")
    if task.haystack == "essay":
        return 2 * count(" ".join(text.split()[: task.step]))
    units = text.split("\n\n") if task.family == "qa" else text.splitlines()
    return task.step * (max(map(count, units)) + 2)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["words", "needle"])
def test_a_row_of_each_task_at_128k_takes_less_than_a_minute_in_all(folder, tokenizer):
    """On one core, imports apart; each row within one official step of the target."""
    needle, took_s = read_tokenizer(Path(__file__).parents[2] / "hipexp/needle/model/tokenizer.json"), {}

    def count(text):
        return len(needle(text, add_special_tokens=False).input_ids) if tokenizer == "needle" else count_words(text)

    for subtask, task in TASKS.items():
        words_of(task)  # imports
        start = time.process_time()
        (row,) = make_rows(subtask, 131_072, 1, 42, count, folder)
        took_s[subtask] = time.process_time() - start
        assert 131_072 - step_tok(task, row, count) <= row["length"] <= 131_072, subtask
    assert sum(took_s.values()) < 60, took_s


# Resources


@pytest.mark.parametrize(
    ("name", "subtask", "origin"),
    [("squad.json", "qa_1", "rajpurkar"), ("hotpotqa.json", "qa_2", "namlh2004"), ("PaulGrahamEssays.json", None, "baber")],
)
def test_a_missing_file_is_named_with_its_repair(tmp_path, name, subtask, origin):
    with pytest.raises(DataMissing, match=rf"{name} is missing: .*{origin}.*python -m hipexp data pull ruler"):
        make_rows(subtask, 4096, 1, 42, count_words, tmp_path) if subtask else files.essay_words(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("squad.json", "version https://git-lfs", "cannot be read as JSON"),
        ("squad.json", '{"data": [{"paragraphs": [{"qas": []}]}]}', "its form is another one .*context"),
        ("squad.json", '{"data": []}', "no question in it can be answered"),
        ("squad.json", '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "is_impossible": true}]}]}]}', "no question"),
        (
            "squad.json",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "is_impossible": false, "answers": []}]}]}]}',
            "answer without text",
        ),
        (
            "squad.json",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "is_impossible": false, "answers": [{"text": " "}]}]}]}]}',
            "question 0 .* answer without text",
        ),
        ("hotpotqa.json", '[{"question": "q", "answer": "a"}]', "its form is another one"),
        ("hotpotqa.json", '[{"question": "q", "answer": "", "context": [["t", ["s"]]]}]', "answer without text"),
        ("hotpotqa.json", "3", "its form is another one"),
        ("PaulGrahamEssays.json", '["text"]', 'no object with a string "text"'),
        ("PaulGrahamEssays.json", '{"text": " "}', 'its "text" is empty'),
        ("english_words.json", "{}", "no words"),
        ("english_words.json", '["a", 3]', "no words, or something that is none"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    resource = next(key for key, source in files.SOURCES.items() if source.file == name)
    read = {"essays": files.essay_words, "more_words": files.more_words}.get(resource, lambda folder: files.questions(folder, resource))
    with pytest.raises(ConfigError, match=rf"{name} must hold .*, but .*{problem}.*data pull ruler"):
        read(tmp_path)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "PaulGrahamEssays.json"
    path.write_text('{"text": "one  two\\n"}')
    assert files.essay_words(tmp_path) == ["one", "two", ""]
    before = files.digests(tmp_path, ["essays", "squad"])
    path.write_text('{"text": "three"}')
    os.utime(path, (1, 1))
    assert files.essay_words(tmp_path) == ["three"]
    assert files.digests(tmp_path, ["essays", "squad"]) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()} != before


def test_sentences_end_as_the_files_in_the_folder_say(tmp_path):
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    write_resources(tmp_path, punkt=True)
    learnt = PunktParameters()
    learnt.abbrev_types, learnt.sent_starters, learnt.collocations = set(ABBREVIATIONS), set(STARTERS), {("st", "mary")}
    learnt.ortho_context.update(dict.fromkeys(STARTERS, UPPER_FIRST_LOWER_WITHIN))
    text = " ".join(files.essay_words(tmp_path)[:6000])
    cut = files.sentences(tmp_path)
    assert cut(text) == PunktSentenceTokenizer(learnt).tokenize(text) != PunktSentenceTokenizer().tokenize(text)
    assert files.sentences(tmp_path) is cut
    other = write_resources(tmp_path / "other", punkt=True)
    (other / files.PUNKT / "sent_starters.txt").unlink()
    with pytest.raises(ConfigError, match=r"punkt_tab/english must hold .*sent_starters.txt.*remove it or run"):
        files.sentences(other)


def test_sentence_ends_by_hipexp_are_named_so(tmp_path):
    write_resources(tmp_path, punkt=True)
    assert files.sentences(tmp_path).name.startswith("punkt_tab, a stand-in made by hipexp (")
    other = write_resources(tmp_path / "other", punkt=True)
    for path in (other / files.PUNKT).iterdir():
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if files.STAND_IN not in line))
    assert files.sentences(other).name.startswith("punkt_tab (")


@pytest.mark.parametrize("trained", [False, True])
def test_remembered_sentences_are_those_of_the_splitter(trained):
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer

    words = essays(random.Random(4), 12_000).split()
    split = PunktSentenceTokenizer(PunktTrainer(" ".join(words)).get_params() if trained else None).tokenize
    cut = files.Sentences("some", split)
    order = [5, 900, *random.Random(5).sample(range(1, len(words)), 80), len(words)]
    for size in order:
        text = " ".join(words[:size])
        assert cut(text) == split(text), size
    other = " ".join(reversed(words))
    assert cut(other) == split(other)


def test_sentences_of_a_text_that_was_seen_are_not_cut_again():
    calls = []

    def split(text):
        calls.append(len(text))
        return re.findall(r"[^.]+\.", text)

    cut = files.Sentences("dots", lambda text: [part.strip() for part in split(text)])
    text = "One two three. " * 500
    cut(text.strip())
    cut(text[: 15 * 400].strip())
    assert calls[0] == 7499 and calls[1] < 100


def test_without_punkt_tab_the_card_says_so(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    files._sentences.cache_clear()
    cut = files.sentences(tmp_path)
    files._sentences.cache_clear()
    assert cut.name.startswith("untrained Punkt (no punkt_tab)")
    assert cut("One two. Three four.") == ["One two.", "Three four."]
