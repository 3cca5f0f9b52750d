"""``python -m hipexp data``: fetch, check and list what the suites read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hipexp.config.convert import unknown
from hipexp.config.schema import ConfigError
from hipexp.report.tables import text_table
from hipexp.run.data_make import ARGUMENTS, PURPOSE, make
from hipexp.suites.data.fetch import Report, fetch
from hipexp.suites.data.registry import SUBTASKS, DataFile, file_named, files_of, is_published, missing, size_text
from hipexp.suites.data.resolve import data_root, digest, place_of, problem_with, read_record, write_record, write_whole
from hipexp.suites.data.rows import opened

UNPUBLISHED = "* nobody publishes its digest: recorded at the first download, which was trusted, and checked from then on"


def main(words: list[str]) -> int:
    """Run one of :data:`COMMANDS` and return its exit code."""
    if not words or words[0] not in COMMANDS:
        usage = "; ".join(f"data {name} {arguments}: {purpose}" for name, (_, arguments, purpose) in COMMANDS.items())
        raise ConfigError(f"data {words[0]} is unknown; {usage}" if words else f"data needs a command; {usage}")
    return COMMANDS[words[0]][0](words[1:])


def pull(words: list[str]) -> int:
    """Fetch the files of the named suites that are not here and whole, small ones first."""
    suites, subtasks = read_words(words)
    if not suites:
        raise ConfigError(f"data pull needs a suite: {', '.join(f'{name} ({total_size(name)})' for name in SUBTASKS)}")
    root, rows = data_root(), []
    for file in chosen(suites, subtasks):
        path = derive(file, root) if file.made_from else _fetch_visibly(file, root)
        record = read_record(path)
        rows.append([f"{file.suite}/{file.name}", size_text(path.stat().st_size), (file.sha256 or record["sha256"]) + _star(file)])
    print(text_table(["file", "size", "sha256"], rows, left=3))
    _explain_stars(suites, subtasks)
    print(root)
    return 0


def verify(words: list[str]) -> int:
    """Read all that is here and compare digests; 1 if anything is damaged."""
    return show(words, deep=True)


def ls(words: list[str]) -> int:
    """Tell what is here, by size and record."""
    show(words, deep=False)
    return 0


Command = Callable[[list[str]], int]
# Name: (function taking the remaining words, which those are, what it does).
COMMANDS: dict[str, tuple[Command, str, str]] = {
    "pull": (pull, "<suite> ... [subtask=a,b]", "fetch published data and official prompts"),
    "verify": (verify, "[suite ...] [subtask=a,b]", "compare the digests of what is here"),
    "make": (make, ARGUMENTS, PURPOSE),
    "ls": (ls, "[suite ...] [subtask=a,b]", "what is here, what is missing and where it comes from"),
}


def read_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Suites and subtasks that a command line names. Raises ``ConfigError`` for what is neither."""
    suites = [word for word in words if "=" not in word]
    settings = [word.partition("=") for word in words if "=" in word]
    for key, _, _ in settings:
        if key != "subtask":
            raise unknown(f"data: {key}=", key, ["subtask"])
    for suite in suites:
        if suite not in SUBTASKS:
            raise unknown(f"data: suite {suite}", suite, SUBTASKS)
    subtasks = [name for _, _, value in settings for name in value.strip("[]").replace(" ", "").split(",") if name]
    if settings and not subtasks:
        raise ConfigError("data: subtask= names nothing; write subtask=a,b or leave it out for all")
    known = [name for suite in suites or SUBTASKS for name in SUBTASKS[suite]]
    for name in subtasks:
        if name not in known:
            raise unknown(f"data: subtask {name}", name, known)
    return suites, subtasks


def chosen(suites: list[str], subtasks: list[str]) -> list[DataFile]:
    """The files that the named subtasks need; all files of the suites if no subtask is named, and of all suites if no suite is."""
    files: list[DataFile] = []
    for suite in suites or SUBTASKS:
        names = [name for name in subtasks if name in SUBTASKS[suite]]
        if names or not subtasks:
            files += files_of(suite, names)
    return files


def total_size(suite: str) -> str:
    """What fetching all of a suite takes."""
    return size_text(sum(file.size_bytes for file in files_of(suite) if not file.made_from))


def show(words: list[str], deep: bool) -> int:
    """Print the state of each file; 1 if one is damaged."""
    root, rows, damaged = data_root(), [], []
    suites, subtasks = read_words(words)
    for file in chosen(suites, subtasks):
        path = place_of(file, root)
        problem = problem_with(file, path, deep)
        state = "missing" if not os.path.isfile(path) else "damaged" if problem else "here"
        where = f"{file.source.name}@{file.source.revision[:12]}" if state == "missing" else str(path)
        rows.append([file.name + _star(file), file.suite, _size(file, path), state, where])
        damaged += [str(missing(file, problem))] if problem and state == "damaged" else []
    print("\n".join([text_table(["file", "suite", "size", "state", "where"], rows, left=5), *damaged]))
    _explain_stars(suites, subtasks)
    if deep and all(row[3] == "missing" for row in rows):
        print("nothing is here, so nothing was verified")
    return 1 if damaged else 0


def derive(file: DataFile, root: Path) -> Path:
    """Have a file that is made from another one: a member of an archive, or the essays as RULER reads them. Raises ``DataMissing``."""
    path, origin = place_of(file, root), place_of(file_named(file.suite, str(file.made_from)), root)
    if problem_with(file, path, deep=True) is None:
        return path
    try:
        content = _essays(origin) if origin.suffix == ".parquet" else _member(origin, file.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        write_record(file, path, digest(path), len(content))
    except OSError as error:
        raise missing(file, f"cannot be written to {path} ({error.strerror or error})") from error
    return path


def _essays(origin: Path) -> bytes:
    """All essays in one text, as lm_eval joins them."""
    from pyarrow import parquet

    texts = parquet.read_table(origin, columns=["text"])["text"].to_pylist()
    return json.dumps({"text": " ".join(texts)}, ensure_ascii=False).encode()


def _member(origin: Path, name: str) -> bytes:
    with opened(origin, name) as stream:
        return stream.read()


def _fetch_visibly(file: DataFile, root: Path) -> Path:
    with byte_bar(file) as report:
        return fetch(file, root, report)


@contextmanager
def byte_bar(file: DataFile) -> Iterator[Report]:
    """A progress bar on stderr; where that is no terminal, a line every ten seconds."""
    from tqdm import tqdm

    every = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(desc=file.name, total=file.size_bytes, unit="B", unit_scale=True, file=sys.stderr, mininterval=every, leave=False) as bar:

        def report(done: int, total: int | None) -> None:
            bar.total = total or bar.total
            bar.update(done - bar.n)

        yield report


def _size(file: DataFile, path: Path) -> str:
    return size_text(path.stat().st_size) if os.path.isfile(path) else file.size


def _star(file: DataFile) -> str:
    return "" if is_published(file) else " *"


def _explain_stars(suites: list[str], subtasks: list[str]) -> None:
    if not all(map(is_published, chosen(suites, subtasks))):
        print(UNPUBLISHED)
