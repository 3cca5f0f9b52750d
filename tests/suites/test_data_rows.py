import json
import string
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipexp.config.schema import ConfigError
from hipexp.suites.data.rows import ListOf, fits, read_json, read_literals, read_mapping, read_rows, read_text

SCHEMA = {"id": int, "context": str, "answer": ListOf((str, int), least=1), "options": (ListOf((str,)), type(None)), "weight": (int, float)}
GOOD = {"id": 1, "context": "text é \u2028 more", "answer": ["a", 3], "options": [], "weight": 0.5, "free": {"x": None}}


def line(**changes):
    return json.dumps({name: value for name, value in (GOOD | changes).items() if value is not ...}).encode()


def refusal(read, *arguments):
    with pytest.raises(ConfigError) as caught:
        read(*arguments)
    return str(caught.value)


@pytest.fixture
def rows(tmp_path):
    """``rows(line, ...)`` writes a JSONL file."""

    def write(*lines):
        path = tmp_path / "task.jsonl"
        path.write_bytes(b"\n".join(lines))
        return path

    return write


def test_rows_come_as_they_are(rows):
    assert read_rows(rows(line(), b"", line(id=2), b"  ", b""), SCHEMA) == [GOOD, GOOD | {"id": 2}]
    assert read_rows(rows(line() + b"\r", json.dumps(GOOD, ensure_ascii=False).encode()), SCHEMA) == [GOOD, GOOD]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (line(id=...), "line 2: id is missing"),
        (line(id="1"), "line 2: id must be int, not '1'"),
        (line(id=True), "line 2: id must be int, not True"),
        (line(id=1.0), "line 2: id must be int, not 1.0"),
        (line(context=None), "line 2: context must be str, not None"),
        (line(answer=[]), "line 2: answer must be a list of str or int with at least 1, not []"),
        (line(answer="a"), "line 2: answer must be a list of str or int with at least 1, not 'a'"),
        (line(answer=["a", 2.5]), "line 2: answer must be a list"),
        (line(answer=["a", None]), "line 2: answer must be a list"),
        (line(answer=["a", False]), "line 2: answer must be a list"),
        (line(answer=[["a"]]), "line 2: answer must be a list"),
        (line(options=[1]), "line 2: options must be a list of str or null, not [1]"),
        (line(weight="0.5"), "line 2: weight must be int or float, not '0.5'"),
        (line().replace(b"0.5", b"NaN"), "line 2: it is no JSON (NaN is no number)"),
        (line().replace(b"0.5", b"1e999"), "line 2: weight must be int or float, not inf"),
        (line(context="\ud800"), "line 2: context must be str, not '\\ud800'"),
        (line(answer=["\udfff"]), "line 2: answer must be a list"),
        (line()[:-5], "line 2: it is no JSON"),
        (line() + line(), "line 2: it is no JSON"),
        (b"\xff\xfe" + line(), "line 2: it is not UTF-8"),
        (line().replace(b"text", "té".encode("latin-1")), "line 2: it is not UTF-8"),
        (b"\xef\xbb\xbf" + line(), "line 2: it is no JSON"),
        (b"[1]", "line 2: it must be a JSON object, not [1]"),
        (b'"id"', "line 2: it must be a JSON object, not 'id'"),
        (b"null", "line 2: it must be a JSON object, not None"),
        (b"\0\0\0\0", "line 2: it is no JSON"),
        (b"[" * 100_000, "line 2: it is no JSON"),
    ],
)
def test_one_bad_row_spoils_the_file(rows, bad, said):
    path = rows(line(), bad, line())
    message = refusal(read_rows, path, SCHEMA)
    assert message.startswith(f"{path} has bad rows (1), so none is used: {said}")


def test_many_bad_rows_are_counted_and_the_first_listed(rows):
    message = refusal(read_rows, rows(*[line(id=...)] * 9, line()), SCHEMA)
    assert "has bad rows (9)" in message
    assert "line 5: id is missing; and 4 more;" in message
    assert "line 6" not in message


def test_a_long_value_is_not_printed_in_full(rows):
    assert len(refusal(read_rows, rows(line(id="x" * 100_000)), SCHEMA)) < 500


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  "])
def test_no_rows_are_refused(rows, content):
    assert "has no rows" in refusal(read_rows, rows(content), SCHEMA)


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(read_rows, tmp_path / "no.jsonl", SCHEMA)
    assert "cannot be read (Is a directory)" in refusal(read_rows, tmp_path, SCHEMA)


def test_rows_of_a_json_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, GOOD]))
    assert read_rows(path, SCHEMA) == [GOOD, GOOD]
    path.write_text(json.dumps([GOOD, GOOD | {"answer": []}]))
    assert "row 2: answer must be a list" in refusal(read_rows, path, SCHEMA)
    path.write_text(json.dumps({"rows": [GOOD]}))
    assert "must hold a JSON list of rows" in refusal(read_rows, path, SCHEMA)
    path.write_text("[]")
    assert "has no rows" in refusal(read_rows, path, SCHEMA)
    path.write_text("[{}")
    assert "it is no JSON" in refusal(read_rows, path, SCHEMA)
    path.write_bytes(b"[\xff]")
    assert "it is not UTF-8" in refusal(read_rows, path, SCHEMA)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as one:
        one.writestr("data/good.jsonl", line() + b"\n" + line(id=2) + b"\n")
        one.writestr("data/bad.jsonl", line() + b"\n" + line(answer=[]) + b"\n")
        one.writestr("data/list.json", json.dumps([GOOD]))
        one.writestr("data/long.jsonl", b"\n".join(line(id=i, context=f"{i}" * 90) for i in range(500)))
    return path


def test_rows_of_a_member(archive):
    assert [row["id"] for row in read_rows(archive, SCHEMA, "data/good.jsonl")] == [1, 2]
    assert read_rows(archive, SCHEMA, "data/list.json") == [GOOD]
    assert f"{archive}:data/bad.jsonl has bad rows (1), so none is used: line 2: answer" in refusal(
        read_rows, archive, SCHEMA, "data/bad.jsonl"
    )


def test_a_member_that_is_not_there_is_said(archive):
    assert "has no member data/none.jsonl; it has data/good.jsonl, data/bad.jsonl" in refusal(read_rows, archive, SCHEMA, "data/none.jsonl")


def test_a_damaged_archive_is_said(archive):
    whole = archive.read_bytes()
    for damaged in (b"", whole[:-30], b"PK" + b"\0" * 100):
        archive.write_bytes(damaged)
        assert "is a damaged archive" in refusal(read_rows, archive, SCHEMA, "data/good.jsonl")
    at = whole.index(b"data/long.jsonl") + 200
    archive.write_bytes(whole[:at] + bytes(255 - byte for byte in whole[at : at + 50]) + whole[at + 50 :])
    with pytest.raises(ConfigError):
        read_rows(archive, SCHEMA, "data/long.jsonl")
    assert len(read_rows(archive, SCHEMA, "data/good.jsonl")) == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@given(value=json_values)
def test_a_value_fits_exactly_what_it_is(value):
    kinds = [kind for kind in (int, float, str, bool, type(None), ListOf((int, float, str, bool, type(None)))) if fits(value, kind)]
    assert len(kinds) <= 1
    if isinstance(value, bool | int) or value is None:
        assert kinds == [type(value)]
    if isinstance(value, list):
        assert fits(value, ListOf((int,))) == all(type(item) is int for item in value)


def test_json_and_mappings(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"a": "{context} é", "b": ""}', encoding="utf-8")
    assert read_json(path) == read_mapping(path, str) == {"a": "{context} é", "b": ""}
    assert "a must be int, not '{context} é'" in refusal(read_mapping, path, int)
    for text in ("[]", "{}", '"a"'):
        path.write_text(text)
        assert "must hold a JSON object of int by name" in refusal(read_mapping, path, int)
    path.write_text('{"a": true}')
    assert "a must be int, not True" in refusal(read_mapping, path, int)
    path.write_text('{"a": 1')
    assert "it is no JSON" in refusal(read_json, path)


def test_text_keeps_its_line_ends(tmp_path):
    path = tmp_path / "0shot.txt"
    path.write_bytes("one $DOC$\r\ntwo\n\né".encode())
    assert read_text(path) == "one $DOC$\r\ntwo\n\né"
    path.write_bytes(b"\xe9")
    assert "is not UTF-8" in refusal(read_text, path)


PYTHON = '''
"""A module in the manner of the official ones."""
import os, nothing_of_this_name
open("made_by_running", "w")
templates = {
    "one": "Read {context} and "
    "answer.",  # a comment
    'two': """{a}
{b} """,
    "three": {"tokens": 128, "rate": -1.5, "more": [None, True, ("x",)]},
}
limits: dict = {"one": 6}
computed = {name: name.upper() for name in templates}
called = dict(one="x")
twice = 1
twice = 2
grows = "a"
grows += "b"
def inside():
    hidden = 1
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "prompt.py"
    path.write_text(PYTHON)
    return path


def test_literals_are_read_and_nothing_is_run(module, tmp_path):
    found = read_literals(module, "templates", "limits")
    assert found["templates"] == {
        "one": "Read {context} and answer.",
        "two": "{a}\n{b} ",
        "three": {"tokens": 128, "rate": -1.5, "more": [None, True, ("x",)]},
    }
    assert found["limits"] == {"one": 6}
    assert not (tmp_path / "made_by_running").exists()


@pytest.mark.parametrize("name", ["computed", "called"])
def test_what_is_no_literal_is_refused(module, name):
    assert f"{name} is no literal" in refusal(read_literals, module, name)


@pytest.mark.parametrize(("name", "times"), [("twice", 2), ("grows", 2), ("hidden", 0), ("absent", 0)])
def test_a_name_must_be_assigned_once(module, name, times):
    assert f"assigns {name} {times} times" in refusal(read_literals, module, "templates", name)


@pytest.mark.parametrize("content", [b"templates = {", b"templates = '\xff'", b"a = 1\0", b"templates = " + b"(" * 10_000])
def test_what_is_no_python_is_refused(module, content):
    module.write_bytes(content)
    assert str(module) in refusal(read_literals, module, "templates")


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1), st.text() | st.integers() | st.lists(st.text())))
def test_any_literal_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("literal") / "prompt.py"
    path.write_bytes(f"import os\nname = {value!a}\n".encode())
    assert read_literals(path, "name") == {"name": value}
