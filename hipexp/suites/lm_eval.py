"""The one place that imports ``lm_eval``: single functions of its suites, never its task objects (which change scores, docs/protocols.md).

It is part of ``hipexp[suites]``, loaded when something first asks for it. Nothing is fetched while it is imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from hipexp.config.schema import ConfigError

VERSION = "0.4.13"  # whose functions were read beside the official ones
PACKAGES = ("lm_eval", "jieba", "rouge", "rouge_score")  # that scores depend on
REPAIR = "python -m pip install 'hipexp[suites]'"  # in a checkout as beside an installed wheel


def check_installed() -> None:
    """Raise ``ConfigError`` unless that version is here."""
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the official suites need lm_eval {VERSION}, which is not installed; run: {REPAIR}") from None
    if found != VERSION:
        raise ConfigError(f"the official suites need lm_eval {VERSION}, whose functions were checked; {found} is installed; run: {REPAIR}")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of packages, which decide scores. Raises ``ConfigError`` for one that is not installed, as :func:`check_installed`."""
    found = {}
    for name in packages:
        if name == "lm_eval":
            check_installed()
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"the official suites need {name}, which is not installed; run: {REPAIR}") from None
    return found


@cache
def suite_module(name: str) -> ModuleType:
    """``lm_eval.tasks.<name>``, such as ``longbench.metrics``. Raises as :func:`check_installed`."""
    check_installed()
    if "fuzzywuzzy" not in sys.modules:  # LongBench imports it for a score that we make otherwise; it is under the GPL
        sys.modules["fuzzywuzzy"] = empty = types.ModuleType("fuzzywuzzy")
        vars(empty)["fuzz"] = None
    handlers = list(logging.root.handlers)
    try:
        return import_module(f"lm_eval.tasks.{name}")
    except ImportError as error:
        raise ConfigError(f"a package that the official suites need is missing ({error}); run: {REPAIR}") from error
    finally:
        logging.root.handlers[:] = handlers  # some of what it imports prints all logs from then on


@cache
def needles() -> ModuleType:
    """The samples of RULER's needle tasks: ``generate_input_output``. Takes 15 s and 1 GB on first use: it lists all pairs of words."""
    check_installed()
    with _offline():
        return suite_module("ruler.prepare_niah")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Without nltk's data it would try to fetch them; who needs sentences sets ``sent_tokenize`` (:func:`set_sentences`)."""
    import nltk

    fetch = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it has fetched them all the same
            yield
    finally:
        nltk.download = fetch


def set_sentences(split: Callable[[str], list[str]]) -> None:
    """How needle tasks cut essays into sentences."""
    module: Any = needles()
    module.sent_tokenize = split
    module.cached_sent_tokenize.cache_clear()
