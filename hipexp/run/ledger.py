"""A run folder: samples that survive a kill, one writer at a time, and what became of the run.

``samples.jsonl`` gets one line per finished sample, written at once and fsynced; every other file is replaced in one step.
A process that dies leaves at most one torn last line, which the next one drops and does again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.sample import DataMissing

LOG = logging.getLogger("hipexp")
FAILURES = ("out_of_memory", "data_missing", "bad_config", "interrupted", "error")
Say = Callable[[str], None]


class RunFailed(Exception):
    """A run that could not be finished; the message is complete and needs no traceback."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop (SIGTERM); what is finished is safe."""


def runs_root() -> Path:
    """Where run folders lie: ``$HIPEXP_RUNS``, or ``runs`` in the working directory."""
    return Path(os.environ.get("HIPEXP_RUNS") or "runs")


def run_folder(task: str, model: str, pipeline: str | None, key: str) -> Path:
    """``<runs>/<task>/<model>_<pipeline or dense>_<first 10 of key>``; other characters in names become ``-``."""
    names = [re.sub(r"[^\w.+-]+", "-", name) for name in (task, model, pipeline or "dense")]
    return runs_root() / names[0] / f"{names[1]}_{names[2]}_{key[:10]}"


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, also after a power failure."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_json(path: Path, data: Any) -> None:
    """Replace a file by ``data`` as JSON; not-a-number is refused with ``ValueError``."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run folder holds; empty if there is none yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def disk_error(error: OSError, path: Path) -> Exception:
    """A full disk in words; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailed(f"disk full: cannot write {path}; free some space and run the same command again, finished samples are kept")
    return error


def classify(error: BaseException) -> str:
    """The class of a failure, one of ``FAILURES``."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ConfigError):
        return "bad_config"
    if isinstance(error, DataMissing | FileNotFoundError):
        return "data_missing"
    # torch.OutOfMemoryError on a GPU; a RuntimeError with these words from torch's allocator on a CPU.
    words = str(error).lower()
    on_cpu = isinstance(error, RuntimeError) and ("allocate memory" in words or "not enough memory" in words)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or on_cpu:
        return "out_of_memory"
    return "error"


def parse_rows(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a ``samples.jsonl`` and how many damaged or torn ones there are besides."""
    *lines, torn = data.split(b"\n")
    rows, damaged = [], int(bool(torn))
    for line in lines:
        try:
            row = json.loads(line)
            row["subtask"], row["sample"]
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            damaged += 1
    return rows, damaged


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The finished samples of a run, in the order they were done; safe to call while it runs."""
    try:
        return parse_rows((folder / "samples.jsonl").read_bytes())[0]
    except FileNotFoundError:
        return []


def is_done(folder: Path, key: str) -> bool:
    """Whether the run of this key is complete in ``folder``."""
    status = read_json(folder / "status.json")
    return status.get("state") == "done" and status.get("run_key") == key and (folder / "summary.json").exists()


class Ledger:
    """A run folder held by this process; made by ``open_ledger``.

    ``rows`` are the finished samples; ``dropped`` counts lines that an earlier stop damaged and that are to be done again.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self._path = folder / "samples.jsonl"
        self._check_key()
        data = self._path.read_bytes() if self._path.exists() else b""
        self.rows, self.dropped = parse_rows(data)
        self._finished = {(row["subtask"], row["sample"]) for row in self.rows}
        if self.dropped:
            write_text(self._path, "".join(map(_line, self.rows)))

    def _check_key(self) -> None:
        found = read_json(self.folder / "status.json").get("run_key", self.key)
        if found != self.key:
            raise RunFailed(f"{self.folder} belongs to another run (key {found}, not {self.key}); move it away and try again")

    @property
    def done(self) -> bool:
        """Whether the run is complete."""
        return is_done(self.folder, self.key)

    def has(self, subtask: str, sample: int) -> bool:
        """Whether a sample is finished."""
        return (subtask, sample) in self._finished

    def append(self, row: dict[str, Any]) -> None:
        """Store a finished sample; when this returns it is on the disk. Raises ``RunFailed`` when the disk is full."""
        data = _line(row).encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                if os.write(file, data) < len(data):
                    raise OSError(errno.ENOSPC, "short write")
                os.fsync(file)
            except OSError as error:
                with suppress(OSError):
                    os.ftruncate(file, size)
                raise disk_error(error, self._path) from error
        finally:
            os.close(file)
        self.rows.append(row)
        self._finished.add((row["subtask"], row["sample"]))

    def write(self, name: str, data: Any) -> None:
        """Replace ``<name>`` in the folder by ``data``: text as it is, anything else as JSON."""
        (write_text if isinstance(data, str) else write_json)(self.folder / name, data)

    def status(self, state: str, **more: Any) -> None:
        """Replace ``status.json``: ``state`` is running, done or failed; ``more`` holds class and message of a failure."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(self.folder / "status.json", {"state": state, "run_key": self.key, "updated": now, "finished": len(self.rows), **more})


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def open_ledger(folder: Path, key: str, say: Say) -> Iterator[Ledger]:
    """Hold a run folder: other processes wait (and ``say`` so) until this one leaves it.

    While it is held, log records go to ``log.txt``, SIGTERM becomes ``Interrupted``, and an error that leaves the block is
    written to ``status.json`` with its class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with stoppable(), locked(folder / ".lock", say), logging_to(folder / "log.txt"):
        ledger = Ledger(folder, key)
        try:
            yield ledger
        except BaseException as error:
            _record_failure(ledger, error)
            raise


def _record_failure(ledger: Ledger, error: BaseException) -> None:
    kind = classify(error)
    message = str(error) or type(error).__name__
    LOG.error("failed (%s): %s", kind, message, exc_info=error if kind == "error" and not isinstance(error, RunFailed) else None)
    try:
        ledger.status("failed", **{"class": kind, "message": message})
    except (OSError, RunFailed) as second:
        LOG.error("could not write status.json: %s", second)


@contextmanager
def locked(path: Path, say: Say) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the operating system gives it up when the process dies, however it dies."""
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"{path.parent} is being run by {file.read().strip() or 'another process'}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether some process is running this folder now."""
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM into ``Interrupted`` inside the block (in the main thread; elsewhere signals are not ours to take)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Interrupted("asked to stop (SIGTERM); the same command continues with the next sample")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append hipexp's log records to ``path`` inside the block."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before)
        handler.close()
