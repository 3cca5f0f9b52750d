"""A run folder: samples that survive a kill, one writer at a time, and what became of the run.

``samples.jsonl`` gets one line per finished sample, written at once and fsynced; every other file is replaced in one step.
A process that dies leaves at most one torn last line, which the next one drops and does again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.sample import DataMissing

LOG = logging.getLogger("hipexp")
FAILURES = ("out_of_memory", "data_missing", "bad_config", "interrupted", "error")
LESS_MEMORY = "try a shorter length, task.batch=1, or a smaller model.prefill_chunk_tok"
# What every line of samples.jsonl holds; one without a score is a measurement of times and holds more. What nobody can know of a
# served model is None.
NUMBER, UNKNOWN = (int, float), type(None)
LINE = {
    **dict.fromkeys(("subtask", "prediction", "status"), (str,)),
    **dict.fromkeys(("sample", "context_tok", "new_tok", "removed_tok", "length_tok"), (int,)),
    "peak_bytes": (int, UNKNOWN),
    "references": (list,),
    "traffic": (dict,),
    "prefill_ms": (*NUMBER, UNKNOWN),
    "decode_ms": (*NUMBER, UNKNOWN),
}
# What a finished run's files must hold for its report.
WHOLE = {"summary.json": {"scores", "latency", "protocol", "note", "exact"}, "card.json": {"model", "strategy"}}
SCORED, TIMED = LINE | {"score": NUMBER, "exact": (bool, UNKNOWN)}, LINE | {"impl": (str,), "steps_ms": (list,)}


class RunFailed(Exception):
    """A run that could not be finished; the message is complete and needs no traceback."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop (SIGTERM); what is finished is safe."""


def runs_root() -> Path:
    """Where run folders lie: ``$HIPEXP_RUNS``, or ``runs`` in the working directory."""
    return Path(os.environ.get("HIPEXP_RUNS") or "runs").expanduser()


def file_name(name: str) -> str:
    """``name`` as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "-", name)


def run_folder(task: str, model: str, pipeline: str | None, key: str) -> Path:
    """``<runs>/<task>/<model>_<pipeline or dense>_<first 10 of key>``; other characters in names become ``-``.

    The key decides: where a folder has it under other names, that one is meant.
    """
    names = [file_name(name) for name in (task, model, pipeline or "dense")]
    folder = runs_root() / names[0] / f"{names[1]}_{names[2]}_{key[:10]}"
    with on_disk(folder):
        return folder if folder.exists() else min(folder.parent.glob(f"*_{key[:10]}"), default=folder)


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn what the file system refuses about ``path`` inside the block into ``RunFailed`` with a repair."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            repair = "free some space and run the same command again, finished samples are kept"
            raise RunFailed(f"disk full: cannot write {path}; {repair}") from error
        repair = "run the same command again where HIPEXP_RUNS is a folder that can be read and written"
        raise RunFailed(f"cannot use {path} ({error.strerror or error}); {repair}") from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it."""
    with on_disk(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file that takes the place of ``path`` when the block is done."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with on_disk(path):
            yield scratch
            scratch.replace(path)
    finally:
        with suppress(OSError):
            scratch.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, also after a power failure."""
    with replacing(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, data: Any) -> None:
    """Replace a file by ``data`` as JSON; not-a-number is refused with ``ValueError``."""
    write_text(path, _json(data))


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a run folder holds; empty if there is none yet, or, with a word in the log, if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            return data
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        pass
    LOG.warning("%s is damaged and counts as missing", path)
    return {}


def classify(error: BaseException) -> str:
    """The class of a failure, one of ``FAILURES``."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):  # submitit leaves by SystemExit when the time of a job is over
        return "interrupted"
    if isinstance(error, ConfigError):
        return "bad_config"
    if isinstance(error, DataMissing):
        return "data_missing"
    # torch.OutOfMemoryError on a GPU; a RuntimeError with these words from torch's allocator on a CPU.
    words = str(error).lower()
    on_cpu = isinstance(error, RuntimeError) and ("allocate memory" in words or "not enough memory" in words)
    by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or on_cpu or by_system:
        return "out_of_memory"
    return "error"


def parse_rows(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The first whole line of each sample of a ``samples.jsonl``, and how many torn, damaged or repeated lines there are besides."""
    *lines, torn = data.split(b"\n")
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line, parse_float=_finite, parse_constant=_finite)
            if is_row(row):
                rows.setdefault((row["subtask"], row["sample"]), row)
    return list(rows.values()), len(lines) - len(rows) + bool(torn)


def is_row(row: Any) -> bool:
    """Whether a line holds every field of a finished sample, each of its type."""
    if not isinstance(row, dict) or "score" not in row:
        return False
    kinds = TIMED if row["score"] is None else SCORED
    if not all(name in row and type(row[name]) in kind for name, kind in kinds.items()):
        return False
    return kinds is SCORED or (row["steps_ms"] != [] and all(type(ms) in NUMBER for ms in row["steps_ms"]))


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The finished samples of a run, in the order they were done; safe to call while it runs."""
    try:
        return parse_rows((folder / "samples.jsonl").read_bytes())[0]
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_done(folder: Path, key: str) -> bool:
    """Whether the run of this key is complete in ``folder``: its status says so, its files and every line that it counts are whole."""
    status = read_json(folder / "status.json")
    if status.get("state") != "done" or status.get("run_key") != key or read_json(folder / "summary.json").get("run_key") != key:
        return False
    if not all(fields <= read_json(folder / name).keys() for name, fields in WHOLE.items()) or not (folder / "config.yaml").exists():
        return False
    try:
        rows, damaged = parse_rows((folder / "samples.jsonl").read_bytes())
    except OSError:
        return False
    return len(rows) == status.get("finished") and not damaged


class Ledger:
    """A run folder held by this process; made by ``open_ledger``.

    ``rows`` are the finished samples, of ``of`` (known from :meth:`keep` on); ``dropped`` counts lines that do not count: damaged,
    repeated, or of a sample that the run does not have.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.of: int | None = None
        self._path = folder / "samples.jsonl"
        self._check_key()
        with on_disk(self._path):
            data = self._path.read_bytes() if self._path.exists() else b""
        self.rows, self.dropped = parse_rows(data)
        self._finished = {(row["subtask"], row["sample"]) for row in self.rows}
        if self.dropped:
            self._rewrite()

    def _rewrite(self) -> None:
        write_text(self._path, "".join(map(_line, self.rows)))

    def keep(self, samples: Collection[tuple[str, int]]) -> None:
        """These are the samples of the run: drop the lines of all others."""
        self.of = len(samples)
        strange = self._finished - set(samples)
        if strange:
            self.rows = [row for row in self.rows if (row["subtask"], row["sample"]) not in strange]
            self._finished -= strange
            self.dropped += len(strange)
            self._rewrite()

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
        with on_disk(self._path):
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(file).st_size
                try:
                    if os.write(file, data) < len(data):
                        raise OSError(errno.ENOSPC, "short write")
                    os.fsync(file)
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(file, size)
                    raise
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
        told = {"state": state, "run_key": self.key, "updated": now, "finished": len(self.rows)}
        text = _json(told | ({} if self.of is None else {"of": self.of}) | more)
        path = self.folder / "status.json"
        try:
            write_text(path, text)
        except RunFailed:
            if state != "failed":
                raise
            # A full disk has no room for a new file, but the old one has its block.
            with on_disk(path), open(path, "r+b", buffering=0) as file:
                file.truncate(file.write(text.encode()))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def open_ledger(folder: Path, key: str) -> Iterator[Ledger]:
    """Hold a run folder: other processes wait (and log so) until this one leaves it.

    While it is held, log records go to ``log.txt``, SIGTERM becomes ``Interrupted``, and an error that leaves the block is
    written to ``status.json`` with its class.
    """
    make_folder(folder)
    with stoppable(), locked(folder / ".lock"), logging_to(folder / "log.txt"):
        ledger = Ledger(folder, key)
        try:
            yield ledger
        except BaseException as error:
            _record_failure(ledger, error)
            raise


def _record_failure(ledger: Ledger, error: BaseException) -> None:
    kind = classify(error)
    message = str(error) or type(error).__name__
    message += f"; {LESS_MEMORY}" if kind == "out_of_memory" else ""
    LOG.error("failed (%s): %s", kind, message, exc_info=error if kind == "error" and not isinstance(error, RunFailed) else None)
    try:
        ledger.status("failed", **{"class": kind, "message": message})
    except RunFailed as second:
        LOG.error("could not write status.json: %s", second)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the operating system gives it up when the process dies, however it dies."""
    with on_disk(path):
        file = open(path, "a+b", buffering=0)
    with file:
        with on_disk(path):
            _wait_for(file, path)
        with suppress(OSError):  # who holds it is good to know, and no more
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _wait_for(file: FileIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        LOG.warning("%s is being run by %s; waiting for it", path.parent, holder)
        fcntl.flock(file, fcntl.LOCK_EX)


def is_held(folder: Path) -> bool:
    """Whether some process is running this folder now."""
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM into ``Interrupted`` inside the block (in the main thread; elsewhere signals are not ours to take).

    In a job of submitit on Slurm SIGTERM changes nothing, as submitit has it: a preempted job comes back into the queue if it is killed,
    but not if it ends by itself, and what is finished is safe either way.
    """
    if threading.current_thread() is not threading.main_thread() or os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        yield
        return

    def stop(*_: object) -> None:
        raise Interrupted("asked to stop (SIGTERM); the same command continues with the next sample")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LogFile(logging.FileHandler):
    """A log that cannot break a run: what does not fit on the disk is lost."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append hipexp's log records to ``path`` inside the block."""
    handler = LogFile(path, encoding="utf-8", delay=True)
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
