import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from hipexp.config.schema import ConfigError
from hipexp.run import ledger
from hipexp.run.ledger import SCORED, Interrupted, RunFailed, classify, is_held, open_ledger, parse_rows, read_json, read_rows
from hipexp.suites.sample import DataMissing

KEY = "0123456789abcdef"


def row(sample, **more):
    return {name: kinds[0]() for name, kinds in SCORED.items()} | {"subtask": "passkey", "sample": sample, "score": 100.0, **more}


def line(sample, **more):
    return json.dumps(row(sample, **more)).encode() + b"\n"


def test_rows_survive_and_are_known_again(tmp_path):
    with open_ledger(tmp_path / "run", KEY) as book:
        book.append(row(0))
        book.append(row(1, prediction="line\nbreak \u2028 and é"))
    with open_ledger(tmp_path / "run", KEY) as book:
        assert [r["sample"] for r in book.rows] == [0, 1]
        assert book.has("passkey", 1)
        assert not book.has("passkey", 2)
        assert book.dropped == 0


@pytest.mark.parametrize(
    "torn", [b'{"subtask": "passkey", "sam', b'{"subtask": "passkey", "sample": 2}', b"\0\0\0\0", b"[1]\n", b"\xff\xfe\n"]
)
def test_a_damaged_line_is_dropped_and_done_again(tmp_path, torn):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(line(0) + line(1) + torn)
    with open_ledger(tmp_path, KEY) as book:
        assert book.dropped == 1
        assert not book.has("passkey", 2)
        book.append(row(2))
    rows, damaged = parse_rows(path.read_bytes())
    assert (len(rows), damaged) == (3, 0)


@pytest.mark.parametrize(
    "bad",
    [
        b'{"subtask": "passkey", "sample": 2}\n',
        line(2, score=float("nan")),
        line(2).replace(b"100.0", b"1e999"),
        line(2, score="100"),
        line(2, score=True),
        line(2, score=None),
        line("2"),
        line(2, score=None, impl="dense", steps_ms=[]),
        line(2, score=None, impl="dense", steps_ms=["1"]),
        line(1),
        line(1, score=0.0),
    ],
)
def test_only_whole_lines_count_and_only_once(bad):
    assert parse_rows(line(0) + line(1) + bad) == ([row(0), row(1)], 1)


def test_a_measurement_has_no_score():
    assert parse_rows(line(0, score=None, impl="dense", steps_ms=[1.0, 2]))[1] == 0


def test_lines_of_other_runs_are_dropped(tmp_path):
    with open_ledger(tmp_path, KEY) as book:
        for sample in range(3):
            book.append(row(sample))
        book.keep([("passkey", 0), ("passkey", 2)])
        assert (book.dropped, book.has("passkey", 1)) == (1, False)
    assert [r["sample"] for r in read_rows(tmp_path)] == [0, 2]


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]", b"7", b"\xff"])
def test_a_damaged_file_counts_as_missing(tmp_path, content, caplog):
    (tmp_path / "status.json").write_bytes(content)
    assert read_json(tmp_path / "status.json") == {}
    assert "status.json is damaged" in caplog.text
    with open_ledger(tmp_path, KEY) as book:
        assert not book.done


def complete(book):
    """Everything that a finished run must have."""
    book.write("summary.json", {"run_key": KEY, "scores": {}, "latency": {}, "protocol": "hipexp", "note": "", "exact": False})
    book.write("card.json", {"model": {}, "strategy": []})
    book.write("config.yaml", "seed: 0")
    book.status("done")


@pytest.mark.parametrize("name", ["status.json", "summary.json", "samples.jsonl", "card.json", "config.yaml"])
def test_a_run_without_one_of_its_files_is_not_done(tmp_path, name):
    with open_ledger(tmp_path, KEY) as book:
        book.append(row(0))
        complete(book)
        assert book.done
        (tmp_path / name).unlink()
        assert not book.done


def test_not_a_number_is_never_a_score(tmp_path):
    with open_ledger(tmp_path, KEY) as book, pytest.raises(ValueError, match="JSON"):
        book.append(row(0, score=float("nan")))
    assert read_rows(tmp_path) == []


def test_a_full_disk_is_reported_and_leaves_no_torn_line(tmp_path, monkeypatch):
    with open_ledger(tmp_path, KEY) as book:
        book.append(row(0))
        real = os.write
        monkeypatch.setattr(ledger.os, "write", lambda file, data: real(file, data[:10]))
        with pytest.raises(RunFailed, match="disk full"):
            book.append(row(1))
        monkeypatch.undo()
        assert parse_rows((tmp_path / "samples.jsonl").read_bytes()) == ([row(0)], 0)


def test_a_folder_of_another_key_is_refused(tmp_path):
    with open_ledger(tmp_path, KEY) as book:
        book.status("running")
    with pytest.raises(RunFailed, match="belongs to another run"), open_ledger(tmp_path, "another"):
        pass


class OutOfMemoryError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (Interrupted("stop"), "interrupted"),
        (SystemExit(-1), "interrupted"),
        (ConfigError("x"), "bad_config"),
        (DataMissing("x"), "data_missing"),
        (FileNotFoundError("x"), "error"),
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
        (RuntimeError("shapes do not match"), "error"),
        (FloatingPointError("logits are not finite"), "error"),
        (OSError(errno.ENOSPC, "x"), "error"),
        (OSError(errno.ENOMEM, "x"), "out_of_memory"),
    ],
)
def test_failures_have_a_class(tmp_path, error, kind):
    assert classify(error) == kind
    with pytest.raises(type(error)), open_ledger(tmp_path, KEY):
        raise error
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["class"]) == ("failed", kind)
    assert (tmp_path / "log.txt").read_text()


def hold(folder, seconds):
    with open_ledger(folder, KEY) as book:
        book.append(row(len(book.rows)))
        time.sleep(seconds)
        book.write("left.json", {"left": True})


def test_a_job_of_submitit_on_slurm_stays_until_it_is_killed(tmp_path, monkeypatch):
    """One that ended by itself would not come back into the queue."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("submitit"))
    try:
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        with open_ledger(tmp_path, KEY):
            signal.raise_signal(signal.SIGTERM)
        assert heard == ["submitit"]
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
        with pytest.raises(Interrupted), open_ledger(tmp_path, KEY):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_process_waits_and_says_for_whom(tmp_path, caplog):
    other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, 0.5))
    other.start()
    while not read_rows(tmp_path):
        time.sleep(0.01)
    assert is_held(tmp_path)
    with open_ledger(tmp_path, KEY) as book:
        assert [r["sample"] for r in book.rows] == [0]
        assert read_json(tmp_path / "left.json") == {"left": True}
    other.join()
    (said,) = caplog.messages
    assert f"process {other.pid}" in said
    assert not is_held(tmp_path)


def test_folder_names_stay_inside_the_runs_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HIPEXP_RUNS", str(tmp_path))
    assert ledger.run_folder("infbench", "org/../model", None, KEY) == tmp_path / "infbench" / "org-..-model_dense_0123456789"


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HIPEXP_RUNS", "~/results")
    assert ledger.runs_root() == tmp_path / "results"


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_its_message_and_its_class(tmp_path, monkeypatch):
    """Neither the log nor the status file may hide the reason; the status goes into the old file's block."""
    with pytest.raises(RunFailed, match=r"disk full: cannot write .*samples\.jsonl"), open_ledger(tmp_path, KEY) as book:
        book.status("running")
        handler = next(one for one in ledger.LOG.handlers if isinstance(one, ledger.LogFile))
        ledger.LOG.info("opens the file")
        monkeypatch.setattr(handler, "flush", full)
        monkeypatch.setattr(ledger.os, "fsync", full)
        book.append(row(0))
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["class"]) == ("failed", "error")
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]
    assert read_rows(tmp_path) == []


def test_a_folder_that_goes_away_is_told_in_one_line(tmp_path):
    with (
        pytest.raises(RunFailed, match=r"cannot use .*samples\.jsonl \(No such file.*HIPEXP_RUNS"),
        open_ledger(tmp_path / "run", KEY) as book,
    ):
        shutil.rmtree(tmp_path / "run")
        book.append(row(0))


def test_a_root_that_is_a_file_is_told_in_one_line(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(RunFailed, match=r"cannot use .*HIPEXP_RUNS is a folder"), open_ledger(tmp_path / "runs" / "run", KEY):
        pass
