import errno
import json
import multiprocessing
import os
import time

import pytest

from hipexp.config.schema import ConfigError
from hipexp.run import ledger
from hipexp.run.ledger import Interrupted, RunFailed, classify, is_held, open_ledger, parse_rows, read_json, read_rows
from hipexp.suites.sample import DataMissing

KEY = "0123456789abcdef"


def row(sample, **more):
    return {"subtask": "passkey", "sample": sample, "score": 100.0, **more}


def silent(text):
    raise AssertionError(f"nothing to say, but said: {text}")


def test_rows_survive_and_are_known_again(tmp_path):
    with open_ledger(tmp_path / "run", KEY, silent) as book:
        book.append(row(0))
        book.append(row(1, prediction="line\nbreak \u2028 and é"))
    with open_ledger(tmp_path / "run", KEY, silent) as book:
        assert [r["sample"] for r in book.rows] == [0, 1]
        assert book.has("passkey", 1)
        assert not book.has("passkey", 2)
        assert book.dropped == 0


@pytest.mark.parametrize(
    "torn", [b'{"subtask": "passkey", "sam', b'{"subtask": "passkey", "sample": 2}', b"\0\0\0\0", b"[1]\n", b"\xff\xfe\n"]
)
def test_a_damaged_line_is_dropped_and_done_again(tmp_path, torn):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"".join(json.dumps(row(i)).encode() + b"\n" for i in range(2)) + torn)
    with open_ledger(tmp_path, KEY, silent) as book:
        assert book.dropped == 1
        assert not book.has("passkey", 2)
        book.append(row(2))
    rows, damaged = parse_rows(path.read_bytes())
    assert (len(rows), damaged) == (3, 0)


def test_not_a_number_is_never_a_score(tmp_path):
    with open_ledger(tmp_path, KEY, silent) as book, pytest.raises(ValueError, match="JSON"):
        book.append(row(0, score=float("nan")))
    assert read_rows(tmp_path) == []


def test_a_full_disk_is_reported_and_leaves_no_torn_line(tmp_path, monkeypatch):
    with open_ledger(tmp_path, KEY, silent) as book:
        book.append(row(0))
        real = os.write
        monkeypatch.setattr(ledger.os, "write", lambda file, data: real(file, data[:10]))
        with pytest.raises(RunFailed, match="disk full"):
            book.append(row(1))
        monkeypatch.undo()
        assert parse_rows((tmp_path / "samples.jsonl").read_bytes()) == ([row(0)], 0)


def test_a_folder_of_another_key_is_refused(tmp_path):
    with open_ledger(tmp_path, KEY, silent) as book:
        book.status("running")
    with pytest.raises(RunFailed, match="belongs to another run"), open_ledger(tmp_path, "another", silent):
        pass


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (Interrupted("stop"), "interrupted"),
        (ConfigError("x"), "bad_config"),
        (DataMissing("x"), "data_missing"),
        (FileNotFoundError("x"), "data_missing"),
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
        (RuntimeError("shapes do not match"), "error"),
        (FloatingPointError("logits are not finite"), "error"),
        (OSError(errno.ENOSPC, "x"), "error"),
    ],
)
def test_failures_have_a_class(tmp_path, error, kind):
    assert classify(error) == kind
    with pytest.raises(type(error)), open_ledger(tmp_path, KEY, silent):
        raise error
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["class"]) == ("failed", kind)
    assert (tmp_path / "log.txt").read_text()


def hold(folder, seconds):
    with open_ledger(folder, KEY, print) as book:
        book.append(row(len(book.rows)))
        time.sleep(seconds)


def test_a_second_process_waits_and_says_for_whom(tmp_path):
    other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, 0.5))
    other.start()
    while not read_rows(tmp_path):
        time.sleep(0.01)
    assert is_held(tmp_path)
    said = []
    with open_ledger(tmp_path, KEY, said.append) as book:
        assert [r["sample"] for r in book.rows] == [0]
    other.join()
    assert len(said) == 1
    assert f"process {other.pid}" in said[0]
    assert not is_held(tmp_path)


def test_folder_names_stay_inside_the_runs_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    assert ledger.run_folder("infbench", "org/../model", None, KEY) == tmp_path / "infbench" / "org-..-model_dense_0123456789"
