"""What ``--dry-run``, ``--quiet`` and ``--json`` mean on every command line: what goes to stdout, and what does not."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

DRY, QUIET, JSON = "--dry-run", "--quiet", "--json"
Flags = frozenset[str]


def split_flags(words: Sequence[str]) -> tuple[Flags, list[str]]:
    """The flags among ``words``, and the other words; the command line has refused those that a command does not take."""
    flags = frozenset(words) & {DRY, QUIET, JSON}
    return flags, [word for word in words if word not in flags]


@contextmanager
def aside(flags: Flags) -> Iterator[None]:
    """Keep what is said inside the block off stdout: with ``--quiet`` it goes nowhere (a run's log has it), with ``--json`` to stderr."""
    if QUIET in flags:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    elif JSON in flags:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def answer(flags: Flags, text: str, data: Any, short: str) -> None:
    """Print what a command has found: ``text``, with ``--json`` ``data``, with ``--quiet`` the lines of ``short``."""
    said = to_json(data, indent=2) if JSON in flags else short if QUIET in flags else text
    if said:
        print(said, flush=True)


def to_json(data: Any, indent: int | None = None) -> str:
    """``data`` as JSON that every reader takes: a number that is none, or has no end, is null."""
    return json.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data
