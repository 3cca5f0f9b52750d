"""Read what lies on disk, strictly: rows that are checked before any is scored, and official prompt files as data, never executed."""

from __future__ import annotations

import ast
import json
import math
import reprlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from hipexp.config.schema import ConfigError

SHOWN = 5  # bad rows that a message lists
T = TypeVar("T")


@dataclass(frozen=True)
class ListOf:
    """A field that is a list of values of these types, with at least so many of them."""

    kinds: tuple[type, ...]
    least: int = 0


Kind = type | ListOf
Schema = Mapping[str, Kind | tuple[Kind, ...]]
"""Field to what its value must be: a type, a list of them, or one of several; other fields are free."""


def read_rows(path: Path, schema: Schema, member: str | None = None) -> list[dict[str, Any]]:
    """The rows of a JSONL file, of a JSON list, or of such a ``member`` of a zip archive.

    Raises ``ConfigError`` naming file and line if a single row is not as ``schema`` says, is no JSON or no UTF-8, or if there is none.
    """
    name = f"{path}:{member}" if member else str(path)
    rows: list[dict[str, Any]] = []
    bad: list[str] = []
    with opened(path, member) as stream:
        for place, row, problem in _json_list(stream, name) if name.endswith(".json") else _json_lines(stream):
            if problem := problem or problem_of(row, schema):
                bad.append(f"{place}: {problem}")
            else:
                rows.append(row)
    if bad:
        listed = "; ".join([*bad[:SHOWN], *([f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else [])])
        raise ConfigError(f"{name} has bad rows ({len(bad)}), so none is used: {listed}; mend them or fetch the file again")
    if not rows:
        raise ConfigError(f"{name} has no rows; fetch it again")
    return rows


def problem_of(row: Any, schema: Schema) -> str | None:
    """What keeps a row from being used, if anything."""
    if not isinstance(row, dict):
        return f"it must be a JSON object, not {reprlib.repr(row)}"
    for field, kind in schema.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if field not in row:
            return f"{field} is missing"
        if not any(fits(row[field], one) for one in kinds):
            return f"{field} must be {' or '.join(map(_said, kinds))}, not {reprlib.repr(row[field])}"
    return None


def fits(value: Any, kind: Kind) -> bool:
    """Whether a value is of a kind. A truth value is no number, infinity neither, and half a character (a lone surrogate) is no text."""
    if isinstance(kind, ListOf):
        return isinstance(value, list) and len(value) >= kind.least and all(any(fits(item, one) for one in kind.kinds) for item in value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    return is_text(value) if isinstance(value, str) else not isinstance(value, float) or math.isfinite(value)


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ``ConfigError`` if it is none."""
    with opened(path) as stream:
        return _parsed(stream.read(), str(path))


def read_mapping(path: Path, kind: type[T]) -> dict[str, T]:
    """A JSON object whose values are all of one type, such as prompts (str) or limits (int) by task. Raises ``ConfigError``."""
    found = read_json(path)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{path} must hold a JSON object of {kind.__name__} by name, not {reprlib.repr(found)}; fetch it again")
    for name, value in found.items():
        if not fits(value, kind):
            raise ConfigError(f"{path}: {name} must be {kind.__name__}, not {reprlib.repr(value)}; fetch it again")
    return found


def read_text(path: Path) -> str:
    """A text file, its line ends as they are. Raises ``ConfigError`` if it is not UTF-8."""
    with opened(path) as stream:
        try:
            return stream.read().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 ({error}); fetch it again") from error


def read_literals(path: Path, *names: str) -> dict[str, Any]:
    """What a Python file assigns to ``names`` at its top level, read without running it.

    Raises ``ConfigError`` if it is no Python, or a name is not assigned exactly once, to a literal.
    """
    try:
        tree = ast.parse(read_text(path), filename=str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path} cannot be read as Python ({error}); fetch it again") from error
    return {name: _literal(tree, name, path) for name in names}


def _literal(tree: ast.Module, name: str, path: Path) -> Any:
    values = [value for node in tree.body for value in _assigned(node, name)]
    if len(values) != 1 or values[0] is None:
        raise ConfigError(f"{path} assigns {name} {len(values)} times, it must do so once; fetch it again")
    try:
        return ast.literal_eval(values[0])
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{path}: {name} is no literal ({error}), and nothing is executed; fetch it again") from error


def _assigned(node: ast.stmt, name: str) -> list[ast.expr | None]:
    """What a statement assigns to a name, if it does; None where it only declares it."""
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [node.value for target in targets if isinstance(target, ast.Name) and target.id == name]


@contextmanager
def opened(path: Path, member: str | None = None) -> Iterator[IO[bytes]]:
    """A file, or a member of a zip archive, to be read inside the block. Raises ``ConfigError`` for one that cannot be."""
    try:
        with open(path, "rb") as file:
            if member is None:
                yield file
            else:
                with _unpacked(file, path, member) as stream:
                    yield stream
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error


@contextmanager
def _unpacked(file: IO[bytes], path: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(file) as archive:
            if member not in archive.namelist():
                raise ConfigError(f"{path} has no member {member}; it has {', '.join(archive.namelist()[:8]) or 'none'}")
            with archive.open(member) as stream:
                yield stream
    # in this order: no archive, damaged content, cut off, a compression that Python has not, encrypted
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"{path} is a damaged archive ({error}); fetch it again") from error


def _json_lines(stream: IO[bytes]) -> Iterator[tuple[str, Any, str | None]]:
    """Place, row, and what is wrong with the line if it is none."""
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield f"line {number}", _loads(line), None
            except (ValueError, RecursionError) as error:
                yield f"line {number}", None, _why(error)


def _json_list(stream: IO[bytes], name: str) -> Iterator[tuple[str, Any, None]]:
    rows = _parsed(stream.read(), name)
    if not isinstance(rows, list):
        raise ConfigError(f"{name} must hold a JSON list of rows, not {reprlib.repr(rows)}; fetch it again")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row, None


def _parsed(content: bytes, name: str) -> Any:
    try:
        return _loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {_why(error)}; fetch it again") from error


def _loads(content: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(content.decode(), parse_constant=refuse)


def _why(error: Exception) -> str:
    return f"it is not UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else f"it is no JSON ({error})"


def _said(kind: Kind) -> str:
    if not isinstance(kind, ListOf):
        return "null" if kind is type(None) else kind.__name__
    return f"a list of {' or '.join(one.__name__ for one in kind.kinds)}" + (f" with at least {kind.least}" if kind.least else "")
