"""Fetch one file over HTTP, so that a broken connection, a full disk, a kill or a second process costs nothing but time.

Bytes go into ``.<name>.part``, which the next try continues; the file takes its name only when all of it is there and its digest is right.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from hipexp.suites.data.registry import DataFile, missing
from hipexp.suites.data.resolve import digest, place_of, problem_with, read_record, record_of, write_record
from hipexp.suites.sample import DataMissing

LOG = logging.getLogger("hipexp")
TIMEOUT_S = 30.0
BLOCK_BYTES = 1 << 20
RETRIES, PAUSE_S = 3, 2.0  # tries without a new byte before giving up
RETRY = (408, 416, 425, 429, 500, 502, 503, 504)
NETWORK = (OSError, HTTPException)

Report = Callable[[int, int | None], None]
"""Told how many bytes are here, and of how many, as they come."""


class Broken(Exception):
    """A try that failed; ``final`` if another one would fail as well."""

    def __init__(self, why: str, final: bool = False):
        super().__init__(why)
        self.final = final


def fetch(file: DataFile, root: Path, report: Report = lambda done, total: None) -> Path:
    """Have ``file`` under ``root``, whole; nothing is fetched if it is. Two processes may do so at once: one fetches, one waits.

    The digest must be the published one, or the recorded one, or else the one that the server names; where there is none of them the
    first download is trusted. What came is recorded beside the file. Raises ``DataMissing``: no connection, no such file, other bytes, a
    folder or a disk that takes nothing; what came so far is kept unless its bytes are wrong.
    """
    target = place_of(file, root)
    part = target.with_name(f".{target.name}.part")
    if problem_with(file, target, deep=True) is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with claimed(part) as stream:
            if problem_with(file, target, deep=True):  # nobody else fetched it meanwhile
                named = download(file, stream, report)
                finish(file, stream, part, target, named)
    except OSError as error:
        raise _unwritable(file, target, part, error) from error
    return target


def _unwritable(file: DataFile, target: Path, part: Path, error: OSError) -> DataMissing:
    kept = f"; {size_of(part)} bytes are kept" if part.is_file() else ""
    repair = "free some space, or set HIPEXP_DATA to a folder that can be written"
    return missing(file, f"cannot be written to {target} ({error.strerror or error}){kept}; {repair}")


@contextmanager
def claimed(part: Path) -> Iterator[FileIO]:
    """The partial file, open for appending and held by this process alone; removed afterwards if nothing is in it."""
    while True:
        stream = open(part, "a+b", buffering=0)
        try:
            _hold(stream, part)
            if _is_at(stream, part):  # whoever held it before may have finished and renamed it
                yield stream
                return
        finally:
            if _is_at(stream, part) and not size_of(part):
                part.unlink()
            stream.close()


def _hold(stream: FileIO, part: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        LOG.warning("another process is fetching %s; waiting for it", part)
        fcntl.flock(stream, fcntl.LOCK_EX)


def _is_at(stream: FileIO, part: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), part.stat())
    return False


def size_of(part: Path | FileIO) -> int:
    """Bytes in a file."""
    return (part.stat() if isinstance(part, Path) else os.fstat(part.fileno())).st_size


def download(file: DataFile, part: FileIO, report: Report) -> str | None:
    """Append to ``part`` until all of ``file`` is in it; the SHA-256 that the server names, if any. Raises ``DataMissing``."""
    left = RETRIES
    while True:
        before = size_of(part)
        try:
            return attempt(file, part, report)
        except Broken as broken:
            left = RETRIES if size_of(part) > before else left - 1
            if broken.final or left < 0:
                kept = f"; {size_of(part)} bytes are kept, the same command continues" if size_of(part) else ""
                raise missing(file, f"cannot be fetched from {file.url} ({broken}){kept}") from broken
        time.sleep(PAUSE_S)


def attempt(file: DataFile, part: FileIO, report: Report) -> str | None:
    """One request for what ``part`` lacks. Raises ``Broken``, and ``OSError`` where the disk refuses."""
    have = size_of(part)
    redirects = Redirects()
    headers = {"User-Agent": "hipexp"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.build_opener(redirects).open(urllib.request.Request(file.url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        error.close()
        if error.code == 416 and _total(error.headers) == have:
            return redirects.sha256
        if error.code == 416:
            part.truncate(0)
        raise Broken(f"the server answers {error.code} {error.reason}", final=error.code not in RETRY) from error
    except NETWORK as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise Broken(f"no connection: {reason}", final=not have) from error
    with response:
        total = _check_answer(file, response, part, have)
        if total is None and not (file.sha256 or redirects.sha256):
            raise Broken("the server does not say how long it is, so a broken connection could not be told", final=True)
        _receive(response, part, total, report)
    return redirects.sha256


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections and keeps the SHA-256 that the Hugging Face hub names in the first one."""

    sha256: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        named = headers.get("X-Linked-Etag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", named):
            self.sha256 = named
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_answer(file: DataFile, response: HTTPResponse, part: FileIO, have: int) -> int | None:
    """Make ``part`` end where the answer begins; the size of the whole file if the server says it."""
    if response.status == 206:
        start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        total = _total(response.headers)
        if start is None or int(start[1]) != have:
            part.truncate(0)
            raise Broken("the server answers with another part than was asked for")
    else:
        part.truncate(0)
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
    if file.exact and total not in (None, file.size_bytes):
        part.truncate(0)
        raise Broken(f"the server has {total} bytes instead of {file.size_bytes}", final=True)
    return total


def _total(headers: Any) -> int | None:
    found = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _receive(response: HTTPResponse, part: FileIO, total: int | None, report: Report) -> None:
    report(size_of(part), total)
    while block := _read(response):
        append(part, block)
        report(size_of(part), total)
    if total is not None and size_of(part) != total:
        raise Broken(f"the connection ended after {size_of(part)} of {total} bytes")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK_BYTES)
    except NETWORK as error:
        raise Broken(f"the connection broke: {error}") from error


def append(part: FileIO, block: bytes) -> None:
    """Write all of ``block`` at the end of a file."""
    left = memoryview(block)
    while left:
        left = left[part.write(left) :]


def finish(file: DataFile, stream: FileIO, part: Path, target: Path, named: str | None) -> None:
    """Check the digest of a complete download, record it, and give it its name. Raises ``DataMissing`` for other bytes."""
    os.fsync(stream.fileno())
    sha256, record = digest(part), read_record(target)
    recorded = record.get("sha256") if record.get("revision") == file.source.revision else None
    expected = file.sha256 or recorded or named
    if expected not in (None, sha256):
        stream.truncate(0)
        first = f"that of the first download ({record_of(target)})" if recorded else "the one it names"
        who = "the published one" if file.sha256 else first
        raise missing(file, f"came from {file.url} with SHA-256 {sha256} instead of {expected}, {who}; what came was thrown away")
    write_record(file, target, sha256, size_of(stream))  # first: without its record a file may not be trusted
    part.replace(target)
