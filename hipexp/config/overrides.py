"""Command line words in every spelling people and sweep agents use, turned into the one that Hydra takes.

``pipeline=``, ``+pipeline=``, ``++pipeline=`` and ``--pipeline=`` are the same; so are ``None`` and ``null``, ``256.0``,
``1e3`` and ``256`` where a whole number is due, and lists and dictionaries as Python prints them. Keys and values are
checked against the schema here, so that most mistakes are answered before Hydra is imported.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hipexp.config.convert import convert, field_type, is_list, is_optional, required, unknown
from hipexp.config.model import PACKAGE
from hipexp.config.schema import ConfigError

GROUPS = ("model", "pipeline", "offload", "task", "track")
ANY_MODEL = ("hf", "openai")  # the model options that leave the model to the user
DENSE = "dense"  # the pipeline option that leaves the pipeline out
NOTHING = ("None", "null")
NO_NAMES = ("null", "true", "false", "nan", "inf")  # beside numbers: words that Hydra does not take for text
LAYER_GROUP = re.compile(r"pipeline\.layers\.\w+")
# Values that Hydra's grammar computes in a sweep, such as range(1,5); they are checked after composition.
SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)


@dataclass
class CommandLine:
    """``overrides`` are ready for Hydra; ``sweep``: several points (``-m``); ``show``: print the config only (``--cfg job``).

    ``files``: pipelines that are files of the user's own, by the name that ``overrides`` call them.
    """

    overrides: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    sweep: bool = False
    show: bool = False


def conf_dir() -> Path:
    """The folder of configuration files: ``$HIPEXP_CONF``, the copy inside an installed package, or the checkout's ``conf/``.

    Raises ConfigError if there is no ``config.yaml`` in it.
    """
    shipped = PACKAGE / "_conf"
    folder = Path(os.environ.get("HIPEXP_CONF") or (shipped if shipped.is_dir() else PACKAGE.parent / "conf")).expanduser().resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"HIPEXP_CONF={folder} must be a folder with a config.yaml in it; unset HIPEXP_CONF to use the one of hipexp")
    return folder


def group_options(folder: Path) -> dict[str, list[str]]:
    """What each configuration group offers: the names of its files."""
    return {group: sorted(path.stem for path in (folder / group).glob("*.yaml")) for group in GROUPS}


def normalise(argv: Iterable[str], options: dict[str, list[str]]) -> CommandLine:
    """Sort and translate command line words; ``options`` lists what each group offers (as ``conf/<group>/*.yaml``).

    Raises ConfigError for an unknown key or option, a value of the wrong kind, a group that is chosen twice, and for
    pipeline keys where no pipeline is chosen.
    """
    line, words = _take_flags(list(argv))
    chosen: dict[str, str] = {}
    for word in words:
        prefix, key, value = _split(word)
        if is_hydra(key):
            line.overrides.append(word)
        elif prefix == "~":
            line.overrides.append(_removal(key))
        elif key in GROUPS:
            if key in chosen:
                raise ConfigError(f"{key}={value} chooses {key} a second time, after {key}={chosen[key]}; leave one of them out")
            chosen[key] = _option(key, value, options[key], line)
            line.overrides.append(f"{'+' if key == 'pipeline' else ''}{key}={chosen[key]}")
        else:
            line.overrides += _assignment(key, value, line.sweep)
    _need_pipeline(line.overrides, chosen.get("pipeline", DENSE), options["pipeline"])
    if line.show and line.sweep:
        raise ConfigError("--cfg job shows one point, and -m asks for several; leave one of them out")
    launch = [word for word in line.overrides if is_hydra(word)]
    if launch and not line.sweep:
        raise ConfigError(f"{launch[0]} is about how a sweep is run; add -m, or leave it out")
    return line


def is_hydra(word: str) -> bool:
    """Whether a word is a setting of Hydra's own, such as ``hydra/launcher=joblib``."""
    return word.lstrip("+~-").startswith(("hydra.", "hydra/"))


def _take_flags(argv: list[str]) -> tuple[CommandLine, list[str]]:
    line, words = CommandLine(), []
    while argv:
        word = argv.pop(0)
        if word in ("-m", "--multirun"):
            line.sweep = True
        elif word in ("--cfg=job", "-c=job") or (word in ("--cfg", "-c") and argv[:1] == ["job"]):
            line.show = True
            if "=" not in word:
                del argv[0]
        elif word.startswith("-") and "=" not in word:
            raise ConfigError(f"{word} is unknown; settings are written key=value, as in seed=1; see --help")
        else:
            words.append(word)
    return line, words


def _split(word: str) -> tuple[str, str, str]:
    """``(prefix, key, value)`` of a word; ``stages[0]`` becomes ``stages.0``, leading hyphens go."""
    match = re.fullmatch(r"-*(\+\+|\+|~|)([^=]+?)(?:=(.*))?", word, re.DOTALL)
    if match is None or (match[3] is None and match[1] != "~"):
        raise ConfigError(f"{word!r} is not key=value; write it like seed=1 or +pipeline=3stage; see --help")
    return match[1], re.sub(r"\[(\w+)\]", r".\1", match[2].strip()), (match[3] or "").strip()


def _removal(key: str) -> str:
    field_type(key)
    if not LAYER_GROUP.fullmatch(key):
        raise ConfigError(f"~{key} cannot be removed; only a layer group can, as in ~pipeline.layers.early")
    return f"~{key}"


def _option(group: str, value: str, options: list[str], line: CommandLine) -> str:
    """The option of a group; in a sweep several, with commas. A pipeline may be a file, which is noted in ``line.files``."""
    sweep = line.sweep
    if sweep and value.startswith("glob("):
        value = ",".join(fnmatch.filter(options, _unquote(value[5:-1]))) or value
    elif sweep and SWEEP_FUNCTION.fullmatch(value):
        return value
    if value.startswith("{"):
        raise ConfigError(f"{group}={value} must name an option ({', '.join(options)}); give fields one by one, as in {group}.name=…")
    names = [_unquote(name) for name in split_commas(value)]
    if len(names) > 1 and not sweep:
        raise ConfigError(f"{group}={value} names several; add -m to run one after the other")
    nothing = {"pipeline": DENSE, "offload": "none"}.get(group)
    names = [nothing if nothing and name in (*NOTHING, "none") else name for name in names]
    for number, name in enumerate(names):
        if group == "pipeline" and name.endswith(".yaml"):
            path = _pipeline_file(name, options, line.files)
            names[number], line.files[path.stem] = path.stem, path
        elif name not in options:
            raise unknown(f"{group}={name}", name, options)
    return ",".join(names)


def _pipeline_file(name: str, options: list[str], files: dict[str, Path]) -> Path:
    """The file ``name`` of a pipeline; its name without ``.yaml`` is what the pipeline is called, so no other may have it."""
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"pipeline={name} must be a file, and there is none; check the path, or choose one of {', '.join(options)}")
    check_pipeline_name(f"pipeline={name}", path.stem, options)
    if files.get(path.stem, path) != path:
        raise ConfigError(f"pipeline={name} has the name of another pipeline, {path.stem}; rename the file")
    return path


def check_pipeline_name(word: str, name: str, options: list[str]) -> None:
    """Refuse what a file of a pipeline cannot be called, without ``.yaml``; ``word`` names it so. Raises ConfigError."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise ConfigError(f"{word} must be called by letters, digits, '_' and '-', before .yaml in a file's name; rename it")
    if not isinstance(_parse_literal(name), str) or name.lstrip("-").lower() in NO_NAMES:
        raise ConfigError(f"{word} must be called by a word, and {name} is a value; rename it, as in my_{name.lstrip('-')}")
    if name in options:
        raise ConfigError(f"{word} has the name of another pipeline, {name}; rename it")


def _need_pipeline(overrides: list[str], chosen: str, options: list[str]) -> None:
    keys = [word.lstrip("+~") for word in overrides if word.lstrip("+~").startswith("pipeline.")]
    if keys and chosen != DENSE and DENSE in chosen.split(","):
        raise ConfigError(f"{keys[0]} changes a pipeline, and pipeline={chosen} has a point without; run {DENSE} by itself")
    if keys and chosen == DENSE:
        named = ", ".join(name for name in options if name != DENSE)
        raise ConfigError(f"{keys[0]} changes a pipeline, but none is chosen; choose one, as in +pipeline=3stage (there are {named})")


def _assignment(key: str, value: str, sweep: bool) -> list[str]:
    """Hydra overrides for ``key=value``: one, or several for a dictionary."""
    if "." not in key and key != "seed":
        raise unknown(key, key, [*GROUPS, "seed"])
    kind = field_type(key)
    if value in (*NOTHING, "{}") and (key == "pipeline.layers" or LAYER_GROUP.fullmatch(key)):
        raise ConfigError(f"{key}={value} would change nothing; remove a layer group by its name, as in ~pipeline.layers.early")
    if "${" in value or (sweep and SWEEP_FUNCTION.fullmatch(value)):
        return [f"++{key}={value}"]
    choices = split_commas(value)
    if sweep and len(choices) > 1:
        return [f"++{key}={','.join(_emit(convert(_parse(choice, kind), kind, key)) for choice in choices)}"]
    if len(choices) > 1 and required(kind) is not str and not is_list(kind):
        raise ConfigError(f"{key}={value} holds several values where one is due; add -m to run one after the other")
    return [f"++{dotted}={_emit(leaf)}" for dotted, leaf in _leaves(key, convert(_parse(value, kind), kind, key))]


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """A dictionary as dotted keys: Hydra would make numbers of keys such as ``2``."""
    if isinstance(value, dict) and value:
        return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]
    return [(key, value)]


def _parse(text: str, kind: Any) -> Any:
    """A command line value as a Python value; what cannot be one stays text, as does every value of a text field."""
    if text in NOTHING and is_optional(kind):
        return None
    if required(kind) is str:
        return _unquote(text)
    if is_list(kind) and not text.startswith(("[", "(")):
        text = f"[{text}]"
    return _parse_literal(text)


def _parse_literal(text: str) -> Any:
    """A value as Python or YAML writes it; in lists and dictionaries words need no quotes."""
    if text in NOTHING:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if text[:1] + text[-1:] in ("[]", "()"):
        return [_parse_literal(part) for part in split_commas(text[1:-1])]
    if text[:1] + text[-1:] == "{}":
        pairs = [part.partition(":")[::2] for part in split_commas(text[1:-1])]
        return {_unquote(name.strip()): _parse_literal(inner.strip()) for name, inner in pairs}
    return text


def _emit(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return "[" + ",".join(map(_emit, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_emit(entry)}" for name, entry in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    # Inside quotes Hydra reads a backslash as an escape only where a run of them stands before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda run: run[1] * 2 + ("\\'" if run[2] else ""), value) + "'"


def split_commas(text: str) -> list[str]:
    """The parts of a text between commas outside brackets and quotes; empty text has none or one empty part."""
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
