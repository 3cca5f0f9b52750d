"""Plain data to the schema's types and back, with errors that name the key.

Hydra composes untyped data here and the schema is applied once, by ``to_schema``: OmegaConf's own typed nodes accept
unknown keys inside lists and refuse new layer groups.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from hipexp.config.schema import ConfigError, Experiment

MISSING = "???"  # how a YAML file says that a value must be given
EXAMPLES = {int: "1024", float: "0.5", str: "text", bool: "true"}
T = TypeVar("T")


def unknown(key: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for ``key``, because ``name`` is not among ``known``, with a guess at what was meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return ConfigError(f"{key} is unknown; {guess}known here: {', '.join(known)}")


@cache
def fields_of(schema: type) -> dict[str, Any]:
    """Field names of a schema class with their types."""
    hints = typing.get_type_hints(schema)
    return {item.name: hints[item.name] for item in dataclasses.fields(schema)}


def is_optional(kind: Any) -> bool:
    """Whether a type admits None."""
    return type(None) in typing.get_args(kind)


def required(kind: Any) -> Any:
    """The type without ``Optional``."""
    return next(arg for arg in typing.get_args(kind) if arg is not type(None)) if is_optional(kind) else kind


def is_list(kind: Any) -> bool:
    """Whether a type is a list, perhaps an optional one."""
    return typing.get_origin(required(kind)) is list


def is_plain(kind: Any) -> bool:
    """Whether a type is a number, text, truth value, or a list of such, perhaps an optional one."""
    kind = required(kind)
    return (typing.get_args(kind)[0] if is_list(kind) else kind) in EXAMPLES


def field_type(key: str) -> Any:
    """The type of a dotted key such as ``pipeline.stages.0.chunk_tok``; raises ConfigError for an unknown one."""
    kind: Any = Experiment
    parts = key.split(".")
    for depth, part in enumerate(parts):
        kind = _part_type(required(kind), part, ".".join(parts[: depth + 1]), ".".join(parts[:depth]))
    return kind


def _part_type(owner: Any, part: str, key: str, parent: str) -> Any:
    if dataclasses.is_dataclass(owner):
        types = fields_of(typing.cast(type, owner))
        if part not in types:
            raise unknown(key, part, types)
        return types[part]
    if is_list(owner):
        if not part.isdecimal():
            raise ConfigError(f"{key} must number an entry of {parent} from 0, as in {parent}.0")
        return typing.get_args(owner)[0]
    if typing.get_origin(owner) is not dict:
        raise ConfigError(f"{key} is unknown; {parent} is a single value without parts")
    if not re.fullmatch(r"[A-Za-z_]\w*|\d+", part, re.ASCII):
        raise ConfigError(f"{key} names {part!r}, which must be letters, digits and '_', not beginning with a digit; try {parent}.late")
    return typing.get_args(owner)[1]


def convert(value: Any, kind: Any, key: str) -> Any:
    """``value`` as plain data of the type ``kind``: whole floats become integers, one value a list of one.

    Enums stay names, dataclasses dictionaries of the fields that are given. Raises ConfigError, naming ``key``.
    """
    if value is None:
        if is_optional(kind):
            return None
        raise ConfigError(f"{key}=null must be {_words(kind)}")
    kind = required(kind)
    if kind is Any:  # a sweep agent prints whole numbers as 256.0
        return int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"{key} is not set and must be {_words(kind)}; give it, as in {key}=…")
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        return _convert_dict(value, kind, key)
    if is_list(kind):
        return _convert_list(value, typing.get_args(kind)[0], key)
    if issubclass(kind, Enum):
        if value not in list(kind.__members__):
            raise unknown(f"{key}={value}", str(value), kind.__members__)
        return str(value)
    return _convert_scalar(value, kind, key)


def _convert_dict(value: Any, kind: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value} must be given field by field, as in {key}.<field>=…")
    if dataclasses.is_dataclass(kind):
        types = fields_of(typing.cast(type, kind))
        for name in value:
            if name not in types:
                raise unknown(f"{key}.{name}".lstrip("."), str(name), types)
        return {name: convert(entry, types[name], f"{key}.{name}".lstrip(".")) for name, entry in value.items()}
    return {str(name): convert(entry, typing.get_args(kind)[1], f"{key}.{name}") for name, entry in value.items()}


def _convert_list(value: Any, kind: Any, key: str) -> list[Any]:
    if isinstance(value, dict):
        raise ConfigError(f"{key} is not set, so that {key}.{next(iter(value), 0)} does not exist; give the whole list first: {key}=[…]")
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [convert(entry, kind, f"{key}[{number}]") for number, entry in enumerate(values)]


def _convert_scalar(value: Any, kind: type, key: str) -> Any:
    example = f"'{','.join(map(str, value))}'" if key.endswith(".range") and isinstance(value, list) else EXAMPLES[kind]
    wrong = ConfigError(f"{key}={value} must be {_words(kind)}, as in {key}={example}")
    if kind is str:
        if isinstance(value, str | int | float):
            return str(value)
        raise wrong
    if kind is bool:
        found = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
        if found is None:
            raise wrong
        return found
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = value if isinstance(value, int) else float(value)
        whole = int(number)
    except (ValueError, OverflowError) as error:
        raise wrong from error
    if kind is int and whole != number:
        raise wrong
    return whole if kind is int else float(number)


def to_schema(data: dict[str, Any], kind: type[T], key: str = "") -> T:
    """An instance of a schema class from plain data; raises ConfigError for what is unknown, missing or of the wrong kind."""
    return _build(convert(data, kind, key), kind, key)


def _build(value: Any, kind: Any, key: str) -> Any:
    if value is None or kind is Any:
        return value
    kind = required(kind)
    if is_list(kind):
        return [_build(entry, typing.get_args(kind)[0], f"{key}[{number}]") for number, entry in enumerate(value)]
    if typing.get_origin(kind) is dict:
        return {name: _build(entry, typing.get_args(kind)[1], f"{key}.{name}") for name, entry in value.items()}
    if not dataclasses.is_dataclass(kind):
        return kind[value] if issubclass(kind, Enum) else value
    types = fields_of(typing.cast(type, kind))
    for item in dataclasses.fields(kind):
        if item.name not in value and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            dotted = f"{key}.{item.name}".lstrip(".")
            raise ConfigError(f"{dotted} is not set and must be {_words(types[item.name])}; give it, as in {dotted}=…")
    return kind(**{name: _build(entry, types[name], f"{key}.{name}".lstrip(".")) for name, entry in value.items()})  # type: ignore[operator]


def to_plain(value: Any) -> Any:
    """Dictionaries, lists, numbers and text from an instance of the schema; enums become their names."""
    if dataclasses.is_dataclass(value):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: to_plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [to_plain(entry) for entry in value]
    return value.name if isinstance(value, Enum) else value


def _words(kind: Any) -> str:
    kind = required(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
        kind, "a value" if kind is Any else "a list" if is_list(kind) else "given field by field"
    )
