"""Command line words in every spelling people and sweep agents use, turned into the one that Hydra takes.

``pipeline=``, ``+pipeline=``, ``++pipeline=`` and ``--pipeline=`` are the same; so are ``None`` and ``null``, ``256.0``,
``1e3`` and ``256`` where a whole number is due, and lists and dictionaries as Python prints them. Keys and values are
checked against the schema here, so that a mistake is answered in our own words and before Hydra is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

from hipexp.config.schema import ConfigError, Experiment

GROUPS = ("model", "pipeline", "offload", "task", "track")
DENSE = "dense"  # the pipeline option that leaves the pipeline out
NOTHING = ("None", "null", "none")
FLAGS = {"-m": 0, "--multirun": 0, "--resolve": 0, "--hydra-help": 0, "--cfg": 1, "-c": 1, "--package": 1, "-p": 1, "--info": 1, "-i": 1}
SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|extend_list|str|int|float|bool|json_str)\(.*\)", re.DOTALL)
# `interval(0,1)` and the like are Hydra's; a value that is computed or swept by one is checked after composition.


@dataclass
class CommandLine:
    """``flags`` are options of Hydra; ``overrides`` are ready for it; ``sweep`` says that Hydra runs several points."""

    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    @property
    def sweep(self) -> bool:
        return "-m" in self.flags or "--multirun" in self.flags


def normalise(argv: Iterable[str], options: dict[str, list[str]]) -> CommandLine:
    """Sort and translate command line words; ``options`` lists what each group offers (as ``conf/<group>/*.yaml``).

    Raises ConfigError for an unknown key or option, a value of the wrong kind, a group that is chosen twice, and for
    pipeline keys where no pipeline is chosen.
    """
    line, words = _split_flags(list(argv))
    chosen: dict[str, str] = {}
    for word in words:
        prefix, key, value = _split(word)
        if key.split(".")[0].split("/")[0] == "hydra":
            line.overrides.append(word)
        elif prefix == "~":
            line.overrides.append(_removal(key))
        elif key in GROUPS:
            if key in chosen:
                raise ConfigError(f"{key}={value} chooses {key} a second time, after {key}={chosen[key]}; leave one of them out")
            chosen[key] = _option(key, value, options[key], line.sweep)
            line.overrides.append(f"{'+' if key == 'pipeline' else ''}{key}={chosen[key]}")
        else:
            line.overrides += _assignment(key, value, line.sweep)
    _need_pipeline(line, chosen.get("pipeline", DENSE), options["pipeline"])
    return line


def unknown(key: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for ``name``, which is not among ``known``, with a guess at what was meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return ConfigError(f"{key} is unknown; {guess}known here: {', '.join(known)}")


@cache
def fields_of(schema: type) -> dict[str, Any]:
    """Field names of a schema class with their types."""
    hints = typing.get_type_hints(schema)
    return {item.name: hints[item.name] for item in dataclasses.fields(schema)}


def field_type(key: str) -> Any:
    """The type of a dotted key as in ``pipeline.stages.0.chunk_tok``; raises ConfigError for an unknown one."""
    kind: Any = Experiment
    parts = key.split(".")
    for depth, part in enumerate(parts):
        here, owner = ".".join(parts[: depth + 1]), _required(kind)
        if dataclasses.is_dataclass(owner):
            if part not in fields_of(typing.cast(type, owner)):
                raise unknown(here, part, fields_of(typing.cast(type, owner)))
            kind = fields_of(typing.cast(type, owner))[part]
        elif typing.get_origin(owner) is list and part.isdecimal():
            kind = typing.get_args(owner)[0]
        elif typing.get_origin(owner) is dict and part:
            kind = typing.get_args(owner)[1]
        elif typing.get_origin(owner) is list:
            raise ConfigError(f"{here} must number an entry of {'.'.join(parts[:depth])} from 0; try {'.'.join(parts[:depth])}.0")
        else:
            raise ConfigError(f"{here} is unknown; {'.'.join(parts[:depth])} is a single value and has no parts")
    return kind


def _split_flags(argv: list[str]) -> tuple[CommandLine, list[str]]:
    line, words = CommandLine(), []
    while argv:
        word = argv.pop(0)
        name, has_value, _ = word.partition("=")
        if name in FLAGS:
            line.flags.append(word)
            if FLAGS[name] and not has_value and argv and "=" not in argv[0]:
                line.flags.append(argv.pop(0))
        elif word.startswith("-") and not has_value:
            raise ConfigError(f"{word} is unknown; write settings as key=value, as in {word.strip('-') or 'key'}=value; see --help")
        else:
            words.append(word)
    return line, words


def _split(word: str) -> tuple[str, str, str]:
    """``(prefix, key, value)`` of a word; ``stages[0]`` becomes ``stages.0`` and leading hyphens and pluses go."""
    match = re.fullmatch(r"(-*)(\+\+|\+|~|)([^=]+?)(?:=(.*))?", word, re.DOTALL)
    if match is None or (match[4] is None and match[2] != "~"):
        raise ConfigError(f"{word!r} is not key=value; write it like seed=1 or +pipeline=3stage; see --help")
    key = re.sub(r"\[(\w+)\]", r".\1", match[3].strip())
    return match[2], key, (match[4] or "").strip()


def _removal(key: str) -> str:
    field_type(key)
    if not re.fullmatch(r"pipeline\.layers\.\w+", key):
        raise ConfigError(f"~{key} cannot be removed; only a layer group can, as in ~pipeline.layers.early")
    return f"~{key}"


def _option(group: str, value: str, options: list[str], sweep: bool) -> str:
    """The option of a group, or several with commas in a sweep."""
    if SWEEP_FUNCTION.fullmatch(value) and sweep:
        return value
    names = [_unquote(name) for name in _split_commas(value)]
    if len(names) > 1 and not sweep:
        raise ConfigError(f"{group}={value} names several; add -m to run one after the other")
    default = {"pipeline": DENSE, "offload": "none"}.get(group)
    names = [default if default and name in NOTHING else name for name in names]
    for name in names:
        if name not in options:
            raise unknown(f"{group}={name}", name, options)
    return ",".join(names)


def _need_pipeline(line: CommandLine, chosen: str, options: list[str]) -> None:
    keys = [word.lstrip("+~") for word in line.overrides if word.lstrip("+~").startswith("pipeline.")]
    if keys and chosen == DENSE:
        named = [name for name in options if name != DENSE]
        raise ConfigError(f"{keys[0]} changes a pipeline, but none is chosen; add one, as in +pipeline=3stage (there are {', '.join(named)})")


def _assignment(key: str, value: str, sweep: bool) -> list[str]:
    """Hydra overrides for ``key=value``: one, or several for a dictionary."""
    try:
        kind = field_type(key)
    except ConfigError:
        if "." in key:
            raise
        raise unknown(key, key, [*GROUPS, "seed"]) from None
    if "${" in value or (sweep and SWEEP_FUNCTION.fullmatch(value)):
        return [f"++{key}={value}"]
    choices = _split_commas(value) if sweep else [value]
    if len(choices) > 1:
        return [f"++{key}={','.join(_emit(_convert(_parse(choice, kind), kind, key)) for choice in choices)}"]
    if not sweep and len(_split_commas(value)) > 1 and _required(kind) not in (str,) and typing.get_origin(_required(kind)) is not list:
        raise ConfigError(f"{key}={value} holds several values where one is due; add -m to run one after the other")
    return [f"++{dotted}={_emit(leaf)}" for dotted, leaf in _leaves(key, _convert(_parse(value, kind), kind, key))]


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]
    return [(key, value)]


def _parse(text: str, kind: Any) -> Any:
    """A command line value as a Python value; what is no Python literal stays text, and so does anything for a text field."""
    if text in NOTHING[:2] or text == "~":
        return None if _optional(kind) or text != "~" else text
    if _required(kind) is str:
        return _unquote(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if text[:1] + text[-1:] in ("[]", "{}"):
        return _parse_bare(text)
    return [_unquote(part) for part in _split_commas(text)] if typing.get_origin(_required(kind)) is list else _unquote(text)


def _parse_bare(text: str) -> Any:
    """A list or dictionary as YAML writes it, words without quotes."""
    if text.startswith("["):
        return [_parse_bare(part) for part in _split_commas(text[1:-1]) if part]
    if text.startswith("{"):
        pairs = [part.partition(":")[::2] for part in _split_commas(text[1:-1]) if part]
        return {_unquote(name.strip()): _parse_bare(inner.strip()) for name, inner in pairs}
    if text in NOTHING[:2]:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(value: Any, kind: Any, key: str) -> Any:
    """``value`` as the schema wants it, or ConfigError in words."""
    if value is None:
        if _optional(kind):
            return None
        raise ConfigError(f"{key}=null must have a value: {_words(kind)}")
    kind = _required(kind)
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        return _convert_dict(value, kind, key)
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        values = list(value) if isinstance(value, list | tuple) else [value]
        return [_convert(entry, inner, f"{key}[{number}]") for number, entry in enumerate(values)]
    if issubclass(kind, Enum):
        if value not in kind.__members__:
            raise unknown(f"{key}={value}", str(value), kind.__members__)
        return value
    return _convert_scalar(value, kind, key)


def _convert_dict(value: Any, kind: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value} must be set field by field, as in {key}.{_example(kind)}")
    types = fields_of(kind) if dataclasses.is_dataclass(kind) else None
    inner = None if types is not None else typing.get_args(kind)[1]
    converted = {}
    for name, entry in value.items():
        if types is not None and name not in types:
            raise unknown(f"{key}.{name}", str(name), types)
        converted[str(name)] = _convert(entry, inner if types is None else types[name], f"{key}.{name}")
    return converted


def _convert_scalar(value: Any, kind: type, key: str) -> Any:
    if kind is str:
        return str(value)
    wrong = ConfigError(f"{key}={value} must be {_words(kind)}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = value if isinstance(value, int) else float(value)
        if kind is int and number != int(number):
            raise wrong
        return int(number) if kind is int else float(number)
    except (ValueError, OverflowError) as error:
        raise wrong from error


def _emit(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ",".join(map(_emit, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_emit(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, str):
        return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + ("\\" * (len(value) - len(value.rstrip("\\")))) + "'"
    return repr(value)


def _split_commas(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _required(kind: Any) -> Any:
    """The type without ``Optional``."""
    return next(arg for arg in typing.get_args(kind) if arg is not type(None)) if _optional(kind) else kind


def _words(kind: Any) -> str:
    kind = _required(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    if typing.get_origin(kind) is list:
        return "a list, as in [" + _example(kind) + "]"
    return {int: "a whole number", float: "a number", str: "text"}.get(kind, "fields")


def _example(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return f"{next(iter(fields_of(typing.cast(type, kind))))}=…"
    return "<name>.<field>=…" if typing.get_origin(kind) is dict else "…"
