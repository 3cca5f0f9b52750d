"""Where a suite's files lie, and whether they are what they should be.

One folder per suite under :func:`data_root`. Beside each downloaded file lies a record (``<name>.lock.json``): revision, size and SHA-256
of what came. A file is whole if it agrees with the published digest, or, where none is published, with its record: so an environment
variable can move files, but not change a result. Files of a folder that the user names are taken as they are, under their own digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.data.registry import GENERATED, SUBTASKS, DataFile, file_named, files_of, missing


@dataclass(frozen=True)
class Found:
    """A file on this machine; ``member`` names the rows inside an archive, ``origin`` says what it is, for protocol cards and run keys."""

    path: Path
    sha256: str
    origin: str
    member: str | None = None


def data_root() -> Path:
    """Where data lies: ``$HIPEXP_DATA``, or ``hipexp/data`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if named := os.environ.get("HIPEXP_DATA"):
        return Path(named).expanduser().absolute()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "hipexp" / "data"


def place_of(file: DataFile, root: Path) -> Path:
    """Where a file lies under ``root``."""
    return root / file.suite / file.name


def find(suite: str, name: str, folder: Path | None = None) -> Found:
    """A file of a suite: from ``folder`` if it is there, else from :func:`data_root`.

    A file of the root must be whole, which is checked once per process: by its size, and by its digest if it holds prompts or no size is
    known (``python -m hipexp data verify`` reads everything). Raises ``DataMissing`` if it is not there or damaged, ``ConfigError`` for a
    folder that is none or holds nothing of the suite.
    """
    file = file_named(suite, name)
    if folder is not None and (path := _in_folder(suite, [name], folder)):
        return _own(file, path)
    return _whole(file, place_of(file, data_root()))


def find_rows(suite: str, subtask: str, folder: Path | None = None) -> Found:
    """The rows of a subtask: a file, or a member of an archive; in ``folder`` the archive may be unpacked. Raises as :func:`find`."""
    if suite in GENERATED:
        raise ConfigError(f"{suite} has no rows to be found: its samples are generated")
    file = next(file for file in files_of(suite, [subtask]) if not file.prompts)
    if folder is not None and file.member and (path := _in_folder(suite, _unpacked(file, subtask), folder)):
        return _own(file, path)
    found = find(suite, file.name, folder)
    return Found(found.path, found.sha256, found.origin, file.member and file.member.format(subtask=subtask))


def folder_for(suite: str, subtasks: Iterable[str], folder: Path | None = None) -> Path:
    """The folder of files that samples are made of: ``folder`` or its part for the suite, else the suite's in :func:`data_root`.

    Whatever is there must be whole, as :func:`find` says; who reads the files says what is missing.
    """
    if folder is not None:
        _in_folder(suite, [], folder)
        return folder / suite if (folder / suite).is_dir() else folder
    for file in files_of(suite, subtasks):
        if os.path.isfile(place_of(file, data_root())):
            find(suite, file.name)
    return data_root() / suite


def problem_with(file: DataFile, path: Path, deep: bool) -> str | None:
    """What is wrong with a file of the root, if anything; ``deep`` reads all of it, otherwise size and record decide where they can."""
    if not os.path.isfile(path):
        return f"is not there ({path})"
    record = read_record(path)
    if file.sha256 is None and record.get("revision") != file.source.revision:
        return f"is of revision {record['revision'][:12]} ({path})" if record else f"has no record of its download ({path})"
    expected = file.sha256 or record["sha256"]
    size_bytes = file.size_bytes if file.exact else record["size_bytes"] if record.get("sha256") == expected else None
    try:
        actual = path.stat().st_size
        if size_bytes is not None and actual != size_bytes:
            return f"has {actual} bytes instead of {size_bytes} ({path})"
        if (deep or size_bytes is None or file.prompts) and (sha256 := digest(path)) != expected:
            return f"has SHA-256 {sha256} instead of {expected} ({path})"
    except OSError as error:
        return f"cannot be read ({path}: {error.strerror or error})"
    return None


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(path: Path) -> Path:
    """Where the record of a downloaded file lies."""
    return path.with_name(f"{path.name}.lock.json")


def read_record(path: Path) -> dict[str, Any]:
    """The record of a file; empty if there is none or it is damaged."""
    try:
        record = json.loads(record_of(path).read_bytes())
        whole = isinstance(record, dict) and isinstance(record["size_bytes"], int)
        return record if whole and all(isinstance(record[key], str) for key in ("sha256", "revision")) else {}
    except (OSError, ValueError, KeyError):
        return {}


def write_record(file: DataFile, path: Path, sha256: str, size_bytes: int) -> None:
    """Record what a file was when it came."""
    digest_is = "published" if file.sha256 else "recorded at the first download"
    record = {"file": f"{file.suite}/{file.name}", "url": file.url, "source": file.source.name, "revision": file.source.revision}
    record |= {"licence": file.source.licence}
    text = json.dumps(record | {"size_bytes": size_bytes, "sha256": sha256, "digest": digest_is}, indent=2)
    write_whole(record_of(path), text.encode() + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        with suppress(OSError):
            scratch.unlink()


@cache
def _whole(file: DataFile, path: Path) -> Found:
    if problem := problem_with(file, path, deep=False):
        named = os.environ.get("HIPEXP_DATA")
        hint = f", and HIPEXP_DATA={named} is no folder" if named and not data_root().is_dir() else ""
        raise missing(file, problem + hint)
    return Found(path, sha256 := file.sha256 or read_record(path)["sha256"], _origin(file, sha256))


def _own(file: DataFile, path: Path) -> Found:
    status = path.stat()
    sha256 = _digest_of(path, status.st_size, status.st_mtime_ns)
    return Found(path, sha256, _origin(file, sha256) if sha256 == file.sha256 else f"own file {path.name}, sha256 {sha256[:12]}")


@cache
def _digest_of(path: Path, size_bytes: int, mtime_ns: int) -> str:
    return digest(path)


def _origin(file: DataFile, sha256: str) -> str:
    return f"{file.source.name}@{file.source.revision[:12]} {file.name}, sha256 {sha256[:12]}"


def _in_folder(suite: str, names: list[str], folder: Path) -> Path | None:
    """The first of ``names`` in a folder of the user's, or in its part for the suite."""
    if not folder.is_dir():
        raise ConfigError(f"the data folder {folder} is no folder")
    roots = (folder, folder / suite)
    if not any((root / name).is_file() for root in roots for name in _names(suite)):
        raise ConfigError(f"the data folder {folder} holds nothing of {suite}; it would hold {', '.join(_names(suite)[:4])} or others")
    return next((root / name for root in roots for name in names if (root / name).is_file()), None)


def _names(suite: str) -> list[str]:
    files = files_of(suite)
    unpacked = [name for file in files if file.member for subtask in SUBTASKS[suite] for name in _unpacked(file, subtask)]
    return [file.name for file in files if not file.prompts] + [file.name for file in files if file.prompts] + unpacked


def _unpacked(file: DataFile, subtask: str) -> list[str]:
    member = (file.member or "").format(subtask=subtask)
    return [member, Path(member).name]
