"""``python -m hipexp data make``: rows of generated tasks in the official schema, for any tokenizer, to be used anywhere.

Also stand-ins for the files that RULER's rows are made of, for machines without a network.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hipexp.config.convert import unknown
from hipexp.config.model import model_folder
from hipexp.config.schema import ConfigError, Model
from hipexp.report.tables import text_table
from hipexp.run.tokenizer_file import read_tokenizer
from hipexp.suites.sample import DataMissing

SUITES = ("ruler", "infbench")
STAND_INS = "stand-ins"
DEFAULTS = {"subtask": "", "length_tok": "", "samples": "5", "seed": "42", "tokenizer": "", "resources": "", "out": ""}
ROWS = "<ruler|infbench> subtask=... length_tok=... out=rows.jsonl [samples=5] [seed=42] [tokenizer=folder or id] [resources=folder]"
ARGUMENTS = f"{ROWS} | {STAND_INS} out=folder [seed=42]"
PURPOSE = f"rows of generated tasks in the official schema; {STAND_INS}: files by hipexp in place of RULER's essays, questions and words"


def make(words: list[str]) -> int:
    """Write what the words ask for. Raises ``ConfigError`` for bad words, ``DataMissing`` for resources that are not here."""
    return make_stand_ins(words[1:]) if words[:1] == [STAND_INS] else make_rows(words)


def make_stand_ins(words: list[str]) -> int:
    """Write stand-ins for the files of RULER into a folder, and say how they are used and what a score on them is not."""
    from hipexp.suites.data.registry import size_text
    from hipexp.suites.data.resolve import digest
    from hipexp.suites.ruler.resources import STAND_IN
    from hipexp.suites.ruler.stand_ins import write_stand_ins

    asked = settings(words, {"seed": DEFAULTS["seed"], "out": ""})
    if not asked["out"]:
        raise ConfigError(f"data make {STAND_INS} needs out=<folder>: data make {ARGUMENTS}")
    folder, seed = Path(asked["out"]), number(asked, "seed", 0)
    paths = write_stand_ins(folder, seed)
    rows = [[str(path.relative_to(folder)), size_text(path.stat().st_size), digest(path)] for path in paths]
    print(text_table(["file", "size", "sha256"], rows, left=3))
    print(f"each is a {STAND_IN} (seed {seed}): no score on them is an official RULER score, and cards and tables say so")
    print(shlex.join(["python", "-m", "hipexp", "+pipeline=3stage", "task=ruler", f"task.data={folder}"]))
    print(folder)
    return 0


def make_rows(words: list[str]) -> int:
    """Write the rows of a generated task. Raises as :func:`make`."""
    suite, asked = read_words(words)
    count_tok = counter(asked["tokenizer"])
    out, length_tok, samples, seed = Path(asked["out"]), number(asked, "length_tok"), number(asked, "samples"), number(asked, "seed", 0)
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"data make: out={asked['out']} must be a file in a folder that is there; choose another path")
    if asked["resources"] and not Path(asked["resources"]).is_dir():
        raise ConfigError(f"data make: resources={asked['resources']} must be a folder; check the path")
    rows: Iterable[dict[str, Any]]
    made_of = ""
    if suite == "ruler":
        from hipexp.suites.data.resolve import folder_for
        from hipexp.suites.ruler import check_subtasks
        from hipexp.suites.ruler import make_rows as make_ruler_rows
        from hipexp.suites.ruler import resources as files
        from hipexp.suites.ruler.tasks import resources_of

        (subtask,) = check_subtasks([asked["subtask"]])
        resources = folder_for("ruler", [subtask], Path(asked["resources"]) if asked["resources"] else None)
        rows = make_ruler_rows(subtask, length_tok, samples, seed, count_tok, resources)
        if found := files.stand_ins(resources, resources_of([subtask])):
            made_of = f"\nno official rows: {', '.join(found)}, each a {files.STAND_IN}"
            rows = [row | {"stand_ins": found} for row in rows]
        if own := files.unknown(resources, resources_of([subtask])):
            made_of += f"\nno official rows: {', '.join(own)}, not known to be the published data"
            rows = [row | {"own_data": own} for row in rows]
    else:
        from hipexp.suites.infbench_rows import make_rows as make_infbench_rows

        rows = make_infbench_rows(asked["subtask"], length_tok, samples, seed, count_tok)
    by = asked["tokenizer"] or "the embedded model"
    print(f"{write(out, rows)} rows of {suite} {asked['subtask']}, at most {length_tok} tokens by {by}{made_of}")
    print(out)
    return 0


def read_words(words: list[str]) -> tuple[str, dict[str, str]]:
    """The suite and the settings of a command line. Raises ``ConfigError`` for what is unknown or missing."""
    if not words or words[0] not in SUITES:
        raise ConfigError(f"data make needs a suite whose samples are generated, or {STAND_INS}: data make {ARGUMENTS}")
    asked = settings(words[1:], DEFAULTS)
    for key in ("subtask", "length_tok", "out"):
        if not asked[key]:
            raise ConfigError(f"data make {words[0]} needs {key}=...: data make {ARGUMENTS}")
    return words[0], asked


def settings(words: list[str], defaults: dict[str, str]) -> dict[str, str]:
    """The settings of a command line. Raises ``ConfigError`` for a key without default."""
    asked = dict(defaults)
    for word in words:
        key, _, value = word.partition("=")
        if key not in asked:
            raise unknown(f"data make: {word}", key, list(asked))
        asked[key] = value
    return asked


def number(asked: dict[str, str], key: str, least: int = 1) -> int:
    """A whole number among the settings. Raises ``ConfigError`` for anything else, or less than ``least``."""
    try:
        value = int(asked[key])
    except ValueError:
        value = least - 1
    if value < least:
        raise ConfigError(f"data make: {key}={asked[key]} must be a whole number from {least} on")
    return value


def counter(name: str) -> Any:
    """Counts tokens, special ones left out, by the tokenizer of a folder or of a model on the hub; empty: of the embedded model."""
    model = Model(path=name or "hipexp/needle/model")
    try:
        folder = model_folder(model)
    except ConfigError:
        raise ConfigError(f"data make: tokenizer={name} is no folder here and no hub id like 'org/model'; check the path") from None
    if folder is not None and (folder / "tokenizer.json").is_file():
        tokenizer: Any = read_tokenizer(folder / "tokenizer.json")
    elif folder is not None and not (folder / "config.json").is_file():
        raise ConfigError(f"data make: tokenizer={name} must be a folder with tokenizer.json, or a hub id; {folder} has none")
    else:
        from hipexp.run.point import load_tokenizer

        try:
            tokenizer = load_tokenizer(model)
        except DataMissing as error:
            raise DataMissing(str(error).replace("model.path=", "data make: tokenizer=")) from error
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL, whole or not at all; returns how many. Raises ``ConfigError`` for a path that cannot be written."""
    scratch, count = path.with_name(f".{path.name}.{os.getpid()}"), 0
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            for count, row in enumerate(rows, start=1):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                print(f"\r{count} rows", end="", file=sys.stderr)
        scratch.replace(path)
    except OSError as error:
        raise ConfigError(f"data make: out={path} cannot be written ({error.strerror or error}); choose another path") from error
    finally:
        print(file=sys.stderr)
        scratch.unlink(missing_ok=True)
    return count
