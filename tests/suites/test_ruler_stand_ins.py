"""What hipexp makes in place of the files that RULER reads: how much, in which form, always the same, and known for what it is."""

import dataclasses
import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from hipexp.config.schema import ConfigError
from hipexp.run.tokenizer_file import read_tokenizer
from hipexp.suites.data.registry import PUNKT_ENGLISH, file_named
from hipexp.suites.data.resolve import folder_for, record_of
from hipexp.suites.ruler import resources as files
from hipexp.suites.ruler.stand_ins import Size, contents, essays, sentence, write_stand_ins

SMALL = Size(prose_chars=3000, documents=30, questions=20, words=500)
NAMES = {source.file for source in files.SOURCES.values()} | {f"{files.PUNKT}/{name}" for name in PUNKT_ENGLISH}
ALL = list(files.SOURCES)
DIGESTS = {
    "PaulGrahamEssays.json": "9e516111",
    "squad.json": "359dc4c2",
    "hotpotqa.json": "0a84b309",
    "english_words.json": "a4213901",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    write_stand_ins(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    write_stand_ins(tmp_path, size=SMALL)
    return tmp_path


def test_files_are_those_of_the_published_data(folder):
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == NAMES
    assert all(file_named("ruler", name) for name in NAMES)


def test_the_seed_decides_every_byte(full):
    for name, expected in DIGESTS.items():
        assert hashlib.sha256((full / name).read_bytes()).hexdigest()[:8] == expected, name
    one, other = dict(contents(1, SMALL)), dict(contents(2, SMALL))
    assert one == dict(contents(1, SMALL))
    assert {name for name in NAMES if one[name] == other[name]} == {f"{files.PUNKT}/{name}" for name in PUNKT_ENGLISH}


def test_prose_is_long_and_does_not_only_repeat(full):
    words = files.essay_words(full)
    tokenizer = read_tokenizer(Path(__file__).parents[2] / "hipexp/needle/model/tokenizer.json")
    assert len(tokenizer(" ".join(words), add_special_tokens=False).input_ids) > 2 * 131_072
    windows = {tuple(words[at : at + 12]) for at in range(len(words) - 11)}
    assert len(windows) > 0.98 * len(words)
    assert words[:12] == f"What follows is no essay but a {files.STAND_IN}.".split() + words[11:12]


def test_sentences_are_whole():
    rng = random.Random(1)
    for said in (sentence(rng) for _ in range(3000)):
        assert "{" not in said and ".." not in said.removesuffix("...") and "  " not in said
        assert said[0] in '"(' or said[0].isupper()
        assert said[-1] in '.?!)"' and said.count('"') % 2 == 0
        assert not re.search(r"\b(?:a\s+[aeiou]\w*|an\s+[^aeiou\W]\w*)", said, re.IGNORECASE), (
            said
        )  # no "hour", "useful" is among the words
        assert len(said.split()) < 32


@pytest.mark.parametrize("name", ["squad", "hotpotqa"])
def test_questions_can_be_answered_from_their_documents(full, name):
    pytest.importorskip("lm_eval")
    asked, documents = files.questions(full, name)
    assert len(asked) >= 200 and len(documents) >= 400 and len(set(documents)) == len(documents)
    assert len({one["query"] for one in asked}) == len(asked)
    for one in asked:
        (answer,) = one["outputs"]
        assert any(answer in documents[number] for number in one["context"])
    for size in (Size(questions=1, documents=20), SMALL, dataclasses.replace(SMALL, questions=30)):
        made = json.loads(dict(contents(3, size))[files.SOURCES[name].file])
        count = len(made) if name == "hotpotqa" else sum(not qa["is_impossible"] for qa in of_squad(made))
        assert count == size.questions


def of_squad(made):
    return [qa for article in made["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]]


def test_fields_are_those_of_the_published_rows(full):
    squad, hotpot = (json.loads((full / name).read_text()) for name in ("squad.json", "hotpotqa.json"))
    assert set(squad) == {"version", "data"} and all(set(article) == {"title", "paragraphs"} for article in squad["data"])
    for paragraph in (paragraph for article in squad["data"] for paragraph in article["paragraphs"]):
        assert set(paragraph) == {"context", "qas"}
        for qa in paragraph["qas"]:
            assert set(qa) == {"question", "id", "answers", "is_impossible"} | ({"plausible_answers"} if qa["is_impossible"] else set())
            assert qa["is_impossible"] == (not qa["answers"])
            assert all(paragraph["context"][one["answer_start"] :].startswith(one["text"]) for one in qa["answers"])
    assert any(qa["is_impossible"] for qa in of_squad(squad))
    for row in hotpot:
        assert set(row) == {"_id", "question", "answer", "type", "level", "supporting_facts", "context"}
        pages = dict(row["context"])
        assert len(row["context"]) == len(pages) == 10
        first, second = (pages[title][line] for title, line in row["supporting_facts"])
        assert row["supporting_facts"][1][0] in first and row["answer"] in second


def test_words_can_be_said_and_are_no_mark(full):
    words = files.more_words(full)
    assert len(words) == len(set(words)) == 60_000
    assert all(word.isalpha() and word.islower() and 4 <= len(word) <= 9 for word in words)


def test_a_stand_in_is_known_by_what_is_in_it(folder, tmp_path):
    assert files.stand_ins(folder, ALL) == [files.SOURCES[name].file for name in ALL] + [files.PUNKT]
    assert files.unknown(folder, ALL) == []
    assert all(files.is_stand_in(folder / name) for name in NAMES)
    squad = json.loads((folder / "squad.json").read_text())
    (folder / "other.txt").write_text(json.dumps(squad, indent=2))
    assert files.is_stand_in(folder / "other.txt")
    text = json.loads((folder / "PaulGrahamEssays.json").read_text())["text"]
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": text[:500]}))
    assert "PaulGrahamEssays.json" in files.stand_ins(folder, ["essays"])


def test_without_its_mark_it_is_not_known_to_be_published(folder):
    path = folder / "squad.json"
    path.write_text(path.read_text().replace(files.STAND_IN, "dev"))
    assert "squad.json" not in files.stand_ins(folder, ALL) and files.unknown(folder, ALL) == ["squad.json"]


def test_where_sentences_end_counts_as_read_with_the_essays(folder):
    tables = [f"{files.PUNKT}/{name}" for name in PUNKT_ENGLISH]
    for path in (folder / name for name in tables):
        path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if files.STAND_IN not in line))
    assert files.unknown(folder, ALL) == files.unknown(folder, ["essays"]) == tables
    assert files.unknown(folder, ["squad"]) == []
    for name in tables:
        content = (folder / name).read_bytes()
        record = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record_of(folder / name).write_text(json.dumps(record | {"revision": file_named("ruler", name).source.revision}))
    assert files.unknown(folder, ALL) == []


def test_published_is_what_has_the_digest_or_the_record_of_its_download(tmp_path, monkeypatch):
    essays_file, squad_file = file_named("ruler", "PaulGrahamEssays.json"), file_named("ruler", "squad.json")
    for name in (essays_file.name, squad_file.name):
        (tmp_path / name).write_text("{}")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    assert files.unknown(tmp_path, ["essays", "squad"]) == [essays_file.name, squad_file.name]
    record = {"size_bytes": 2, "sha256": sha256, "revision": essays_file.source.revision}
    for name in (essays_file.name, squad_file.name):
        record_of(tmp_path / name).write_text(json.dumps(record))
    assert files.unknown(tmp_path, ["essays", "squad"]) == [squad_file.name]
    record_of(tmp_path / essays_file.name).write_text(json.dumps(record | {"revision": "another"}))
    assert essays_file.name in files.unknown(tmp_path, ["essays"])
    monkeypatch.setattr(files, "file_named", lambda *_: dataclasses.replace(squad_file, sha256=sha256))
    assert files.unknown(tmp_path, ["squad"]) == []


def test_nothing_else_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    (tmp_path / "loop").symlink_to("loop")
    data = tmp_path / "data"
    for place in (data, data / "ruler", data / "a" / "b", data / ".." / "data" / "ruler", tmp_path / "link", tmp_path / "link" / "new"):
        with pytest.raises(ConfigError, match="is where published data lie"):
            write_stand_ins(place, size=SMALL)
    assert list(data.iterdir()) == []
    before = sorted(tmp_path.iterdir())
    (tmp_path / "squad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"squad.json is there and no stand-in; choose a folder without it"):
        write_stand_ins(tmp_path, size=SMALL)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "squad.json"]) and (tmp_path / "squad.json").read_text() == "{}"
    for place in (tmp_path / "squad.json" / "below", tmp_path / ("long" * 100), tmp_path / "loop", tmp_path / "loop" / "below"):
        with pytest.raises(ConfigError, match=r"cannot be read or written"):
            write_stand_ins(place, size=SMALL)
    write_stand_ins(tmp_path / "new", size=SMALL)
    write_stand_ins(tmp_path / "new", seed=5, size=SMALL)


def test_a_file_that_cannot_be_read_is_not_replaced(folder, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hipexp.suites.ruler.stand_ins.is_stand_in", refuse)
    with pytest.raises(ConfigError, match=r"cannot be read or written \(Permission denied\); choose another folder"):
        write_stand_ins(folder, size=SMALL)


def test_a_folder_is_refused_of_which_another_part_would_be_read(tmp_path):
    (tmp_path / "ruler").mkdir()
    with pytest.raises(ConfigError, match=r"holds a folder ruler, which would be read in its place"):
        write_stand_ins(tmp_path, size=SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["ruler"]
    write_stand_ins(tmp_path / "ruler", size=SMALL)
    assert folder_for("ruler", [], tmp_path) == folder_for("ruler", [], tmp_path / "ruler") == tmp_path / "ruler"


def test_prose_says_what_it_is_in_every_length():
    for chars in (1, 200, 5000):
        text = essays(random.Random(0), chars)
        assert text.startswith(f"What follows is no essay but a {files.STAND_IN}.") and len(text) >= chars
