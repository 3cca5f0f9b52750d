"""What RULER's samples are made of besides words: essays, questions with documents, a second word list, and where sentences end.

Everything lies in one folder, in the official formats and under the official generator's names. Nothing is fetched here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.suites.data.registry import PUNKT_ENGLISH, file_named
from hipexp.suites.data.resolve import read_record
from hipexp.suites.lm_eval import REPAIR, suite_module
from hipexp.suites.sample import DataMissing

PULL = "python -m hipexp data pull ruler"
MAKE = "python -m hipexp data make stand-ins"
STAND_IN = "stand-in made by hipexp"  # the mark of all files that hipexp.suites.ruler.stand_ins makes
PUNKT = "punkt_tab/english"  # as punkt_tab.zip of nltk unpacks
SAME_AGAIN = 3  # sentences before the end of a shorter text that may end elsewhere than in the longer one

Split = Callable[[str], list[str]]
Questions = tuple[list[dict[str, Any]], list[str]]
"""Questions (``query, outputs, context``: numbers of documents, in SQuAD also ``more_context``) and documents."""


@dataclass(frozen=True)
class Source:
    """A file of the folder: its name, as in ``hipexp.suites.data.registry``, and what it is."""

    file: str
    what: str

    @property
    def origin(self) -> str:
        """Where it comes from."""
        file = file_named("ruler", self.file)
        return f"{file.source.name}, revision {file.source.revision[:12]}, {file.size}"


SOURCES = {
    "essays": Source("PaulGrahamEssays.json", 'Paul Graham\'s essays as one JSON object {"text": ...}'),
    "squad": Source("squad.json", "the questions of SQuAD 2.0 dev, as rajpurkar.github.io has them"),
    "hotpotqa": Source("hotpotqa.json", "the questions of HotpotQA dev, distractor"),
    "more_words": Source("english_words.json", "a second list of English words, as a JSON list or the values of an object"),
}


def find(folder: Path, name: str) -> Path:
    """The file of a resource. Raises ``DataMissing`` saying what is missing, where it is from and how to get it."""
    source = SOURCES[name]
    path = folder / source.file
    if not path.is_file():
        raise DataMissing(
            f"{path} is missing: {source.what}, from {source.origin}; run: {PULL} (to try the task without a network: {MAKE} out=<folder>)"
        )
    return path


def has(folder: Path, name: str) -> bool:
    """Whether the file of a resource is there."""
    return (folder / SOURCES[name].file).is_file()


def essay_words(folder: Path) -> list[str]:
    """The words of the essays, cut at white space. Raises ``DataMissing``, and ``ConfigError`` for a file that is not as it must be."""
    return _essay_words(*_state(find(folder, "essays")))


def questions(folder: Path, name: str) -> Questions:
    """Questions and documents of ``squad`` (answerable ones only) or ``hotpotqa``, as lm_eval reads them. Raises as ``essay_words``."""
    return _questions(name, *_state(find(folder, name)))


def check(folder: Path, name: str, samples: int) -> None:
    """Read a resource, the second word list if it is there; refuse more ``samples`` than it has questions. Raises as ``essay_words``."""
    if name == "essays":
        essay_words(folder)
    elif name == "more_words":
        if has(folder, name):
            more_words(folder)
    elif samples > (there := len(questions(folder, name)[0])):
        raise ConfigError(f"task.samples={samples} must be at most {there}, the questions of {find(folder, name)}")


def more_words(folder: Path) -> list[str]:
    """The second word list, for samples of more words than ``wonderwords`` has. Raises as ``essay_words``."""
    return _more_words(*_state(find(folder, "more_words")))


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of the named resources, by file; of those that are there."""
    paths = [folder / SOURCES[name].file for name in names]
    return {str(path.relative_to(folder)): _digest(*_state(path)) for path in paths if path.is_file()}


def stand_ins(folder: Path, names: list[str]) -> list[str]:
    """Which of the named resources are stand-ins made by hipexp, by file, and whether their sentences end as one of them says."""
    found = [SOURCES[name].file for name in names if is_stand_in(folder / SOURCES[name].file)]
    return [*found, *([PUNKT] if "essays" in names and STAND_IN in sentences(folder).name else [])]


def is_stand_in(path: Path) -> bool:
    """Whether a file was made by hipexp in place of a published one: it holds the mark, whatever its name and its form are."""
    return path.is_file() and _is_marked(*_state(path))


def unknown(folder: Path, names: list[str]) -> list[str]:
    """Which of the named resources are neither stand-ins nor the published files, by file; of essays also what says where sentences end.

    Published is what has the published digest or, where nobody publishes one, the record of its download beside it.
    """
    read = [SOURCES[name].file for name in names] + ([f"{PUNKT}/{name}" for name in PUNKT_ENGLISH] if "essays" in names else [])
    return [name for name in read if (folder / name).is_file() and not (is_stand_in(folder / name) or _is_fetched(folder, name))]


def _is_fetched(folder: Path, name: str) -> bool:
    file, record = file_named("ruler", name), read_record(folder / name)
    published = file.sha256 or (record.get("sha256") if record.get("revision") == file.source.revision else None)
    return _digest(*_state(folder / name)) == published


def words_version() -> str:
    """The version of ``wonderwords``, whose lists decide the keys and the common words."""
    try:
        return importlib.metadata.version("wonderwords")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"RULER's words come from wonderwords, which is not installed; run: {REPAIR}") from None


@contextmanager
def replaced(module: ModuleType, **values: Any) -> Iterator[None]:
    """``module`` with other values of some of its names, for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        vars(module).update(values)
        yield
    finally:
        vars(module).update(before)


@dataclass
class Sentences:
    """Cuts text into sentences by ``split``, and knows those of the longest text so far.

    A text that this one begins with gets its sentences from there: ``split`` is called for the last few alone, which may end otherwise
    because the word after them is not there. Right for every ``split`` that looks at a sentence end and at the words beside it, as
    nltk's do. ``name`` is for the protocol card.
    """

    name: str
    split: Split
    _text: str = field(default="", repr=False)
    _sentences: list[str] = field(default_factory=list, repr=False)
    _starts: list[int] = field(default_factory=list, repr=False)

    def __call__(self, text: str) -> list[str]:
        if not self._text.startswith(text):
            self._remember(text)
        if len(text) == len(self._text):
            return list(self._sentences)
        kept = max(0, bisect_left(self._starts, len(text)) - SAME_AGAIN)
        return self._sentences[:kept] + self.split(text[self._starts[kept] :])

    def _remember(self, text: str) -> None:
        self._text, self._sentences, self._starts = text, self.split(text), []
        end = 0
        for sentence in self._sentences:
            self._starts.append(text.index(sentence, end))
            end = self._starts[-1] + len(sentence)


def sentences(folder: Path) -> Sentences:
    """How essays are cut: by ``punkt_tab`` in the folder, else in nltk's own path, else by nltk's rules without any training.

    Depths of needles are numbers of sentences, so the name of it is part of the protocol. Raises ``ConfigError`` for damaged data.
    """
    inside = folder / PUNKT
    return _sentences(inside if inside.is_dir() else None)


@lru_cache(maxsize=4)
def _sentences(inside: Path | None) -> Sentences:
    import nltk
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer, load_punkt_params

    if inside is not None:
        try:
            trained = load_punkt_params(SimpleNamespace(join=inside.joinpath))
        except (OSError, LookupError, ValueError) as error:
            needed = ", ".join(PUNKT_ENGLISH)
            raise ConfigError(
                f"{inside} must hold the files {needed} of nltk's punkt_tab, but: {error}; remove it or run: {PULL}"
            ) from error
        return Sentences(_name_of(inside), PunktSentenceTokenizer(trained).tokenize)
    try:
        found = Path(str(nltk.data.find("tokenizers/punkt_tab/english/")))
        return Sentences(_name_of(found), PunktTokenizer("english").tokenize)
    except (LookupError, OSError):
        return Sentences(f"untrained Punkt (no punkt_tab), nltk {nltk.__version__}", PunktSentenceTokenizer().tokenize)


def _name_of(inside: Path) -> str:
    tables = b"".join((inside / name).read_bytes() for name in PUNKT_ENGLISH)
    what = f"punkt_tab, a {STAND_IN}" if STAND_IN.encode() in tables else "punkt_tab"
    return f"{what} ({hashlib.sha256(tables).hexdigest()[:12]}), nltk {importlib.metadata.version('nltk')}"


def _state(path: Path) -> tuple[Path, int]:
    return path, path.stat().st_mtime_ns  # a file is read again if it changed


@lru_cache(maxsize=16)
def _digest(path: Path, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=16)
def _is_marked(path: Path, _changed: int) -> bool:
    return STAND_IN.encode() in path.read_bytes()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad(path, f"it cannot be read as JSON: {error}") from error


def bad(path: Path, problem: str) -> ConfigError:
    """The refusal of a file of the folder."""
    what = next(source.what for source in SOURCES.values() if source.file == path.name)
    return ConfigError(f"{path} must hold {what}, but {problem}; remove it and run: {PULL}")


@lru_cache(maxsize=1)
def _essay_words(path: Path, _changed: int) -> list[str]:
    data = _read(path)
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise bad(path, 'it is no object with a string "text"')
    if not data["text"].strip():
        raise bad(path, 'its "text" is empty')
    return re.sub(r"\s+", " ", data["text"]).split(" ")


@lru_cache(maxsize=2)
def _questions(name: str, path: Path, _changed: int) -> Questions:
    data = _read(path)
    module = suite_module("ruler.qa_utils")
    reader = module.read_squad if name == "squad" else module.read_hotpotqa
    try:
        with replaced(module, download_json=lambda _: data):
            asked, documents = reader.__wrapped__(str(path))  # without its cache, which would outlive a change of the file
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad(path, f"its form is another one ({type(error).__name__}: {error})") from error
    _check_questions(path, asked)
    return asked, documents


def _check_questions(path: Path, asked: list[dict[str, Any]]) -> None:
    if not asked:
        raise bad(path, "no question in it can be answered")
    for number, question in enumerate(asked):
        texts = [question["query"], *question["outputs"]]
        if not question["outputs"] or not all(isinstance(text, str) and text.strip() for text in texts):
            raise bad(path, f"question {number} of those that can be answered ({question['query']!r}) has an answer without text")


@lru_cache(maxsize=1)
def _more_words(path: Path, _changed: int) -> list[str]:
    data = _read(path)
    words = list(data.values()) if isinstance(data, dict) else data
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise bad(path, "it has no words, or something that is none")
    return words
