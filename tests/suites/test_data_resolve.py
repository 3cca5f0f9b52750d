import json
import os
import zipfile
from dataclasses import replace

import pytest

from data_server import REVISION, sha256_of, toy
from hipexp.config.schema import ConfigError
from hipexp.suites.data import registry
from hipexp.suites.data.resolve import data_root, find, find_rows, folder_for, place_of, problem_with, record_of, write_record
from hipexp.suites.sample import DataMissing

ROWS, KEYS, PROMPTS = b'{"id": 1}\n', b'{"id": 2}\n', b"templates = {}\n"
PINNED = toy(ROWS)
RECORDED = toy(KEYS, name="kv_retrieval.jsonl", pinned=False, subtasks=("kv_retrieval",))
PROMPT = toy(PROMPTS, name="prompt.py", prompts=True, exact=False, subtasks=())
ARCHIVE = replace(toy(b"zip", name="data.zip", subtasks=()), suite="longbench", member="data/{subtask}.jsonl")


@pytest.fixture(autouse=True)
def root(monkeypatch, tmp_path):
    """A cache with three files, found without ``HIPEXP_DATA``."""
    monkeypatch.delenv("HIPEXP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(registry, "FILES", (PROMPT, PINNED, RECORDED, ARCHIVE))
    folder = tmp_path / "caches" / "hipexp" / "data"
    put(folder, PINNED, ROWS)
    put(folder, RECORDED, KEYS)
    put(folder, PROMPT, PROMPTS, recorded=False)
    return folder


def put(folder, file, body, recorded=True):
    path = place_of(file, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    if recorded:
        write_record(file, path, sha256_of(body), len(body))
    return path


def refusal(suite, name, folder=None):
    with pytest.raises(DataMissing) as caught:
        find(suite, name, folder)
    return str(caught.value)


def test_the_cache_is_where_caches_are(monkeypatch, tmp_path, root):
    assert data_root() == root
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data_root() == tmp_path / "home" / ".cache" / "hipexp" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == tmp_path / "home" / ".cache" / "hipexp" / "data"
    monkeypatch.setenv("HIPEXP_DATA", "~/there")
    assert data_root() == tmp_path / "home" / "there"
    monkeypatch.setenv("HIPEXP_DATA", "")
    assert data_root() == tmp_path / "home" / ".cache" / "hipexp" / "data"


def test_files_are_found_with_their_digest_and_origin(root):
    found = find("infbench", "passkey.jsonl")
    assert (found.path, found.sha256) == (root / "infbench" / "passkey.jsonl", sha256_of(ROWS))
    assert found.origin == f"somebody/data@{REVISION[:12]} passkey.jsonl, sha256 {sha256_of(ROWS)[:12]}"
    assert find("infbench", "kv_retrieval.jsonl").sha256 == sha256_of(KEYS)
    assert find("infbench", "prompt.py").sha256 == sha256_of(PROMPTS)


def test_hipexp_data_moves_files_and_changes_nothing(monkeypatch, root, tmp_path):
    here = [find("infbench", file.name) for file in (PINNED, RECORDED, PROMPT)]
    root.rename(tmp_path / "moved")
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "moved"))
    there = [find("infbench", file.name) for file in (PINNED, RECORDED, PROMPT)]
    assert [(one.sha256, one.origin) for one in here] == [(one.sha256, one.origin) for one in there]
    assert all(one.path.is_relative_to(tmp_path / "moved") for one in there)


@pytest.mark.parametrize("file", [PINNED, RECORDED, PROMPT], ids=["pinned", "recorded", "prompts"])
@pytest.mark.parametrize("recorded", [True, False])
def test_hipexp_data_cannot_bring_other_bytes(monkeypatch, tmp_path, file, recorded):
    """Nor can it with a record that was written for them, of another revision."""
    path = put(tmp_path / "mine", file, b"something else, and longer", recorded)
    if recorded:
        text = record_of(path).read_text()
        record_of(path).write_text(text.replace(REVISION, "f" * 40))
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "mine"))
    assert file.name in refusal("infbench", file.name)


def test_hipexp_data_pointing_nowhere_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_DATA", str(tmp_path / "nowhere"))
    message = refusal("infbench", "passkey.jsonl")
    assert f"HIPEXP_DATA={tmp_path / 'nowhere'} is no folder" in message
    for part in ("passkey.jsonl", "somebody/data", REVISION[:12], "10 B", "run: python -m hipexp data pull infbench subtask=passkey"):
        assert part in message


def test_nothing_there_is_said_with_the_command(root):
    (root / "infbench" / "passkey.jsonl").unlink()
    message = refusal("infbench", "passkey.jsonl")
    assert f"is not there ({root / 'infbench' / 'passkey.jsonl'})" in message
    assert "HIPEXP_DATA" not in message
    assert message.endswith("run: python -m hipexp data pull infbench subtask=passkey")


def test_another_size_is_refused(root):
    for file, body in ((PINNED, ROWS), (RECORDED, KEYS)):
        place_of(file, root).write_bytes(body + b"\n")
        assert "has 11 bytes instead of 10" in refusal("infbench", file.name)


def test_a_change_of_the_same_size_is_seen_by_a_deep_look_alone(root):
    for file, body in ((PINNED, ROWS), (RECORDED, KEYS)):
        path = place_of(file, root)
        path.write_bytes(body.replace(b"id", b"ID"))
        assert problem_with(file, path, deep=False) is None
        assert "has SHA-256" in problem_with(file, path, deep=True)


def test_changed_prompts_are_always_refused(root):
    put(root, PROMPT, PROMPTS)
    place_of(PROMPT, root).write_bytes(PROMPTS.replace(b"{}", b"[]"))
    assert sha256_of(PROMPTS) in refusal("infbench", "prompt.py")


def test_a_file_of_unknown_size_is_judged_by_its_digest(root):
    file = replace(PINNED, exact=False)
    path = place_of(file, root)
    record_of(path).unlink()
    assert problem_with(file, path, deep=False) is None
    path.write_bytes(ROWS.replace(b"1", b"7"))
    assert "has SHA-256" in problem_with(file, path, deep=False)


def test_a_record_of_other_bytes_does_not_bind_a_published_file(root):
    file = replace(PINNED, exact=False)
    path = put(root, PINNED, b"older and longer")
    path.write_bytes(ROWS)
    assert problem_with(file, path, deep=False) is None


def test_a_file_without_publisher_needs_its_record(root):
    record_of(place_of(RECORDED, root)).unlink()
    assert "has no record of its download" in refusal("infbench", "kv_retrieval.jsonl")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"sha256": 1, "revision": "a", "size_bytes": 2}', '{"sha256": "a", "revision": "b"}', "\xff"]
)
def test_a_damaged_record_is_none(root, text):
    record_of(place_of(RECORDED, root)).write_text(text, encoding="latin-1")
    assert "has no record of its download" in refusal("infbench", "kv_retrieval.jsonl")


def test_files_are_checked_once_per_process(root):
    path = find("infbench", "passkey.jsonl").path
    path.write_bytes(b"")
    assert find("infbench", "passkey.jsonl").path == path


def test_a_refusal_is_not_remembered(root):
    path = place_of(PINNED, root)
    path.write_bytes(b"")
    refusal("infbench", "passkey.jsonl")
    path.write_bytes(ROWS)
    assert find("infbench", "passkey.jsonl").path == path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read what root owns")
def test_unreadable_files_are_not_there(root):
    os.seteuid(65534)
    try:
        assert "is not there" in refusal("infbench", "passkey.jsonl")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("inside", ["", "infbench"])
def test_a_folder_of_ones_own_comes_first(tmp_path, inside):
    own = tmp_path / "own" / inside
    own.mkdir(parents=True)
    (own / "passkey.jsonl").write_bytes(b"mine\n")
    found = find("infbench", "passkey.jsonl", tmp_path / "own")
    assert (found.path, found.sha256) == (own / "passkey.jsonl", sha256_of(b"mine\n"))
    assert found.origin == f"own file passkey.jsonl, sha256 {sha256_of(b'mine' + bytes([10]))[:12]}"
    assert find("infbench", "kv_retrieval.jsonl", tmp_path / "own").origin.startswith("somebody/data@")


def test_own_files_are_read_again_when_they_change(tmp_path):
    own = tmp_path / "passkey.jsonl"
    own.write_bytes(b"a\n")
    first = find("infbench", "passkey.jsonl", tmp_path).sha256
    own.write_bytes(b"ab\n")
    assert find("infbench", "passkey.jsonl", tmp_path).sha256 != first


def test_published_bytes_in_a_folder_of_ones_own_are_known(tmp_path):
    (tmp_path / "passkey.jsonl").write_bytes(ROWS)
    assert find("infbench", "passkey.jsonl", tmp_path).origin == find("infbench", "passkey.jsonl").origin


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        find("infbench", "passkey.jsonl", tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"holds nothing of infbench; it would hold passkey\.jsonl"):
        find("infbench", "passkey.jsonl", tmp_path / "other")


def test_rows_of_a_subtask_are_a_file_or_a_member(root):
    put(root, ARCHIVE, b"zip", recorded=False)
    assert find_rows("infbench", "kv_retrieval") == find("infbench", "kv_retrieval.jsonl")
    found = find_rows("longbench", "qasper_e")
    assert (found.path, found.member) == (root / "longbench" / "data.zip", "data/qasper_e.jsonl")
    assert found.origin == find("longbench", "data.zip").origin
    with pytest.raises(ConfigError, match="generated"):
        find_rows("ruler", "vt")


@pytest.mark.parametrize("name", ["data/qasper.jsonl", "qasper.jsonl", "longbench/qasper.jsonl", "longbench/data/qasper.jsonl"])
def test_an_archive_may_be_unpacked_in_a_folder_of_ones_own(tmp_path, name):
    path = tmp_path / "own" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(ROWS)
    found = find_rows("longbench", "qasper", tmp_path / "own")
    assert (found.path, found.member) == (path, None)
    with pytest.raises(DataMissing):
        find_rows("longbench", "hotpotqa", tmp_path / "own")


def test_an_archive_of_ones_own(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", ROWS)
    found = find_rows("longbench", "qasper", tmp_path)
    assert (found.path, found.member) == (tmp_path / "data.zip", "data/qasper.jsonl")
    assert found.origin.startswith("own file data.zip")


def test_a_folder_of_material_is_whole_or_refused(root, tmp_path, monkeypatch):
    assert folder_for("infbench", ["passkey"]) == root / "infbench"
    fresh = tmp_path / "fresh"
    put(fresh, PINNED, b"", recorded=False)
    monkeypatch.setenv("HIPEXP_DATA", str(fresh))
    with pytest.raises(DataMissing, match="has 0 bytes"):
        folder_for("infbench", ["passkey"])
    assert folder_for("infbench", ["kv_retrieval"]) == fresh / "infbench"
    assert folder_for("infbench", ["passkey"], root) == root / "infbench"
    assert folder_for("infbench", ["passkey"], root / "infbench") == root / "infbench"
    with pytest.raises(ConfigError, match="holds nothing"):
        folder_for("infbench", ["passkey"], tmp_path / "caches")


def test_a_record_says_where_a_file_is_from(root):
    record = json.loads(record_of(place_of(RECORDED, root)).read_text())
    assert (record["file"], record["source"], record["licence"]) == ("infbench/kv_retrieval.jsonl", "somebody/data", "none")
