import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_server import REVISION, DataServer, sha256_of, toy
from hipexp.suites.data import fetch as fetching
from hipexp.suites.data import registry
from hipexp.suites.data.fetch import fetch
from hipexp.suites.data.resolve import place_of, read_record, record_of
from hipexp.suites.sample import DataMissing

BODY = bytes(range(256)) * 300


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    with DataServer() as one:
        monkeypatch.setattr(registry, "HOSTS", one.hosts)
        yield one


def part_of(file, root):
    return place_of(file, root).with_name(f".{file.name}.part")


def left_in(root):
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def refused(file, root):
    with pytest.raises(DataMissing) as caught:
        fetch(file, root)
    assert not place_of(file, root).exists()
    return str(caught.value)


def test_a_file_comes_once_and_is_recorded(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY)
    path = fetch(file, tmp_path)
    assert path == tmp_path / "infbench" / "passkey.jsonl"
    assert path.read_bytes() == BODY
    assert fetch(file, tmp_path) == path
    assert server.ranges(file) == [None]
    assert left_in(tmp_path) == ["passkey.jsonl", "passkey.jsonl.lock.json"]
    record = json.loads(record_of(path).read_text())
    assert record["sha256"] == sha256_of(BODY)
    assert (record["revision"], record["size_bytes"], record["url"]) == (REVISION, len(BODY), file.url)
    assert record["digest"] == "published"


def test_progress_is_told_and_ends_with_all(server, tmp_path):
    file, told = toy(BODY), []
    server.serve(file, BODY, cuts=[1000])
    fetch(file, tmp_path, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, len(BODY)), (len(BODY), len(BODY)))


def test_a_broken_connection_is_continued_where_it_broke(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY, cuts=[1000, 500, 1])
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == [None, "bytes=1000-", "bytes=1500-", "bytes=1501-"]


@settings(max_examples=20)
@given(body=st.binary(min_size=1, max_size=400), cuts=st.lists(st.integers(1, 150), max_size=5), pinned=st.booleans())
def test_any_breaks_give_the_same_bytes(body, cuts, pinned):
    with DataServer() as server, pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("no_proxy", "*")
        patch.setattr(fetching, "PAUSE_S", 0.0)
        patch.setattr(registry, "HOSTS", server.hosts)
        file = toy(body, pinned=pinned)
        server.serve(file, body, cuts=cuts)
        assert fetch(file, Path(folder)).read_bytes() == body


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY, ranges=False, cuts=[1000])
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == [None, "bytes=1000-"]


def test_a_connection_that_brings_nothing_is_given_up_and_can_be_continued(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY, cuts=[1000, 0, 0, 0, 0, 0, 0])
    message = refused(file, tmp_path)
    assert "the connection ended after 1000 of 76800 bytes" in message
    assert "1000 bytes are kept, the same command continues" in message
    assert len(server.asked) == 2 + fetching.RETRIES
    server.serve(file, BODY)
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file)[-1] == "bytes=1000-"


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again(server, tmp_path, status):
    file = toy(BODY)
    server.serve(file, BODY, status=[status, status])
    assert fetch(file, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("status", [404, 403, 401, 410])
def test_a_refusal_is_final_and_says_what_was_wanted(server, tmp_path, status):
    file = toy(BODY)
    server.serve(file, BODY, status=[status])
    message = refused(file, tmp_path)
    assert f"the server answers {status}" in message
    assert len(server.asked) == 1
    for part in ("infbench", "passkey.jsonl", "somebody/data", REVISION[:12], "77 kB", file.url):
        assert part in message
    assert message.endswith("run: python -m hipexp data pull infbench subtask=passkey")
    assert left_in(tmp_path) == []


def test_offline_says_so_at_once(monkeypatch, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(registry, "HOSTS", {"hub": f"http://127.0.0.1:{port}/{{path}}"})
    monkeypatch.setenv("no_proxy", "*")
    started = time.monotonic()
    message = refused(toy(BODY), tmp_path)
    assert time.monotonic() - started < fetching.PAUSE_S
    assert "no connection" in message
    assert "python -m hipexp data pull infbench" in message
    assert left_in(tmp_path) == []


def test_a_server_that_says_nothing_times_out(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(fetching, "RETRIES", 0)
    file = toy(BODY)
    server.serve(file, BODY, gate_at=0)
    assert "timed out" in refused(file, tmp_path)


def test_wrong_bytes_are_thrown_away(server, tmp_path):
    file, other = toy(BODY), BODY[:-1] + b"?"
    server.serve(file, other)
    message = refused(file, tmp_path)
    assert sha256_of(BODY) in message
    assert sha256_of(other) in message
    assert left_in(tmp_path) == []


def test_a_partial_file_of_something_else_costs_one_more_try(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY)
    part_of(file, tmp_path).parent.mkdir()
    part_of(file, tmp_path).write_bytes(b"x" * 1000)
    refused(file, tmp_path)
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == ["bytes=1000-", None]


def test_another_size_than_published_is_refused_before_it_comes(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY + b"more")
    assert "the server has 76804 bytes instead of 76800" in refused(file, tmp_path)
    assert left_in(tmp_path) == []


def test_a_complete_partial_file_needs_no_more_bytes(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY)
    part_of(file, tmp_path).parent.mkdir()
    part_of(file, tmp_path).write_bytes(BODY)
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == [f"bytes={len(BODY)}-"]


def test_a_partial_file_longer_than_the_file_starts_anew(server, tmp_path):
    file = toy(BODY)
    server.serve(file, BODY)
    part_of(file, tmp_path).parent.mkdir()
    part_of(file, tmp_path).write_bytes(BODY + b"too much")
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == [f"bytes={len(BODY) + 8}-", None]


def test_an_answer_with_another_part_is_not_appended(server, tmp_path):
    file = toy(BODY, pinned=False)
    server.serve(file, BODY, wrong_range=True)
    part_of(file, tmp_path).parent.mkdir()
    part_of(file, tmp_path).write_bytes(BODY[:100])
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == ["bytes=100-", None]


def test_an_unknown_length_needs_a_digest(server, tmp_path):
    file = toy(BODY, pinned=False)
    server.serve(file, BODY, says_length=False)
    assert "does not say how long" in refused(file, tmp_path)
    pinned = toy(BODY)
    assert fetch(pinned, tmp_path).read_bytes() == BODY


def test_the_first_download_is_trusted_and_holds_for_the_next(server, tmp_path):
    file = toy(BODY, pinned=False)
    server.serve(file, BODY)
    path = fetch(file, tmp_path)
    record = json.loads(record_of(path).read_text())
    assert (record["sha256"], record["digest"]) == (sha256_of(BODY), "recorded at the first download")
    path.unlink()
    server.serve(file, BODY[::-1])
    message = refused(file, tmp_path)
    assert sha256_of(BODY) in message
    assert str(record_of(path)) in message
    assert read_record(path)["sha256"] == sha256_of(BODY)


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    for file in (toy(BODY), toy(BODY, name="kv_retrieval.jsonl", pinned=False)):
        server.serve(file, BODY)
        path = fetch(file, tmp_path)
        path.write_bytes(BODY[:-1] + b"?")
        assert fetch(file, tmp_path).read_bytes() == BODY


def test_a_record_of_another_revision_does_not_bind(server, tmp_path):
    file = toy(BODY, pinned=False)
    server.serve(file, BODY)
    path = place_of(file, tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"old")
    record_of(path).write_text(json.dumps({"revision": "f" * 40, "sha256": sha256_of(b"old"), "size_bytes": 3}))
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert read_record(path)["revision"] == REVISION


def test_redirections_keep_the_range_and_the_digest_they_name(server, tmp_path):
    file = toy(BODY, pinned=False)
    store = toy(BODY, name="store")
    server.serve(file, b"", redirect="/store", linked=sha256_of(BODY))
    server.serve(store, BODY, cuts=[1000])
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(store) == [None, "bytes=1000-"]
    place_of(file, tmp_path).unlink()
    record_of(place_of(file, tmp_path)).unlink()
    server.serve(store, BODY[::-1])
    assert "the one it names" in refused(file, tmp_path)


def test_a_full_disk_keeps_what_came(server, tmp_path, monkeypatch):
    file = toy(BODY)
    server.serve(file, BODY)

    def append(part, block):
        part.write(block[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "append", append)
        message = refused(file, tmp_path)
    assert "No space left on device" in message
    assert "1000 bytes are kept; free some space" in message
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == [None, "bytes=1000-"]


def test_a_disk_that_fills_up_at_the_very_end_keeps_everything(server, tmp_path, monkeypatch):
    file = toy(BODY)
    server.serve(file, BODY)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "write_record", full)
        assert "76800 bytes are kept" in refused(file, tmp_path)
    assert fetch(file, tmp_path).read_bytes() == BODY
    assert server.ranges(file) == [None, f"bytes={len(BODY)}-"]


def test_a_disk_takes_a_block_in_several_writes(tmp_path):
    class Slow:
        def __init__(self):
            self.got = b""

        def write(self, block):
            self.got += bytes(block[:7])
            return min(7, len(block))

    slow = Slow()
    fetching.append(slow, BODY[:100])
    assert slow.got == BODY[:100]


@pytest.fixture
def nobody():
    """Run as somebody whom file permissions bind."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def open_folder():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_read_only_folder_is_named(server, open_folder, request):
    file = toy(BODY)
    server.serve(file, BODY)
    (open_folder / "infbench").mkdir()
    (open_folder / "infbench").chmod(0o555)
    request.getfixturevalue("nobody")
    message = refused(file, open_folder)
    assert "Permission denied" in message
    assert str(open_folder) in message
    assert "HIPEXP_DATA" in message


def test_a_read_only_folder_with_the_file_will_do(server, open_folder, request):
    file = toy(BODY)
    server.serve(file, BODY)
    fetch(file, open_folder)
    (open_folder / "infbench").chmod(0o555)
    request.getfixturevalue("nobody")
    assert fetch(file, open_folder).read_bytes() == BODY


def test_a_file_where_the_folder_should_be(server, tmp_path):
    (tmp_path / "infbench").write_text("")
    assert "cannot be written to" in refused(toy(BODY), tmp_path)


FETCH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from data_server import toy
from hipexp.suites.data import fetch, registry
registry.HOSTS = {"hub": sys.argv[2]}
fetch.PAUSE_S = 0.0
fetch.fetch(toy(Path(sys.argv[3]).read_bytes()), Path(sys.argv[4]))
"""


@pytest.fixture
def start(server, tmp_path):
    """``start()`` fetches ``BODY`` in a process of its own."""
    (tmp_path / "body").write_bytes(BODY)
    words = [str(Path(__file__).parent), server.hosts["hub"], str(tmp_path / "body"), str(tmp_path / "data")]
    started = []

    def one():
        started.append(subprocess.Popen([sys.executable, "-c", FETCH, *words], stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.wait()


def wait_until(true):
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_a_killed_download_is_continued(server, tmp_path, start):
    file, root = toy(BODY), tmp_path / "data"
    server.serve(file, BODY, gate_at=40_000)
    process = start()
    wait_until(lambda: part_of(file, root).is_file() and part_of(file, root).stat().st_size == 40_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left_in(root) == [".passkey.jsonl.part"]
    server.serve(file, BODY)
    assert fetch(file, root).read_bytes() == BODY
    assert server.ranges(file) == [None, "bytes=40000-"]


def test_of_two_processes_one_fetches_and_one_waits(server, tmp_path, start):
    file, root = toy(BODY), tmp_path / "data"
    served = server.serve(file, BODY, gate_at=40_000)
    first = start()
    wait_until(lambda: part_of(file, root).is_file() and part_of(file, root).stat().st_size == 40_000)
    second = start()
    waiting = second.stderr.readline()
    served.gate.set()
    assert (first.wait(30), second.wait(30)) == (0, 0)
    assert b"another process is fetching" in waiting
    assert server.ranges(file) == [None]
    assert place_of(file, root).read_bytes() == BODY
    assert left_in(root) == ["passkey.jsonl", "passkey.jsonl.lock.json"]


def test_who_waits_takes_over_from_a_process_that_dies(server, tmp_path, start):
    file, root = toy(BODY), tmp_path / "data"
    served = server.serve(file, BODY, gate_at=40_000)
    first = start()
    wait_until(lambda: part_of(file, root).is_file() and part_of(file, root).stat().st_size == 40_000)
    second = start()
    second.stderr.readline()
    first.kill()
    served.gate.set()
    assert second.wait(30) == 0
    assert place_of(file, root).read_bytes() == BODY
    assert server.ranges(file)[-1] == "bytes=40000-"


def test_who_waits_takes_over_from_a_process_that_got_wrong_bytes(server, tmp_path, start):
    file, root = toy(BODY), tmp_path / "data"
    served = server.serve(file, BODY[::-1], gate_at=40_000)
    first = start()
    wait_until(lambda: part_of(file, root).is_file() and part_of(file, root).stat().st_size == 40_000)
    second = start()
    second.stderr.readline()
    server.serve(file, BODY)
    served.gate.set()
    assert (first.wait(30), second.wait(30)) == (1, 0)
    assert place_of(file, root).read_bytes() == BODY


def test_many_processes_on_a_bad_line_make_one_good_file(server, tmp_path, start):
    file, root = toy(BODY), tmp_path / "data"
    server.serve(file, BODY, cuts=[5000] * 10)
    processes = [start() for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert place_of(file, root).read_bytes() == BODY
    assert left_in(root) == ["passkey.jsonl", "passkey.jsonl.lock.json"]
