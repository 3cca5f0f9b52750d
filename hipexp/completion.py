"""``python -m hipexp completion bash|zsh|fish``: a script for the shell, which asks ``completion words`` what may stand where.

It is fast: no torch, no Hydra.
Hydra has a completion of its own, but it knows neither sub-commands nor the spellings that ``hipexp.config.overrides`` takes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hipexp.config.convert import field_type, fields_of, is_list, is_plain, required, unknown
from hipexp.config.overrides import DENSE, GROUPS, conf_dir, group_options
from hipexp.config.schema import ConfigError, Experiment

SCRIPTS = {
    "bash": """_hipexp() {
  local line=${COMP_LINE:0:COMP_POINT} cut
  local current=${line##* }
  mapfile -t COMPREPLY < <("$1" completion words "$line" 2>/dev/null)
  cut=${current%"${current##*[=:]}"}  # bash takes = and : for the ends of words
  COMPREPLY=("${COMPREPLY[@]#"$cut"}")
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[=./] ]] && COMPREPLY[0]+=" "
  return 0
}
complete -o nospace -F _hipexp hipexp""",
    "zsh": """#compdef hipexp
_hipexp() {
  local -a found
  found=(${(f)"$(${words[1]} completion words "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
  compadd -S '' -Q -a found
}
compdef _hipexp hipexp""",
    "fish": "complete -c hipexp -f -a '(hipexp completion words (commandline -cp | string collect) 2>/dev/null)'",
}
FLAGS = ("-m", "--cfg", "--dry-run", "--quiet", "--json", "--help", "--version")
STAGES = 4  # numbers of stages that are offered
FILTERS = ("task=", "model=", "pipeline=", "state=", "class=", "protocol=")
OF_RUNS = ("compare", "retry")  # commands whose words are runs
OF_POINTS = ("demo", "methods", "calibrate", "table", "sweep", "tune", "repro", "doctor")  # commands that take overrides
OWN: dict[
    str, dict[str, Any]
] = {  # words of commands besides their flags; behind =, what completes them: a kind of path, or names
    "compare": {"--anyway": (), "all=": ("true", "false")},
    "retry": dict.fromkeys(FILTERS, ()),
    "ls": dict.fromkeys(FILTERS, ()),
    "report": {"out=": "/", "runs=": "/"},
    "sweep": {"": ".yaml", "jobs=": (), "count=": (), "sweep_seed=": ()},
    "methods": {"jobs=": (), "of=": "conf/comparison", "fast=": ("true",)},
    "tune": {"space=": ".yaml", "sampler=": ("tpe", "random")}
    | dict.fromkeys(("max_bytes=", "baseline="), "conf/pipeline")
    | dict.fromkeys(("objective=", "trials=", "hours=", "name=", "held_out=", "checked=", "jobs=", "batch="), ()),
    "repro": {"": "conf/experiment", "jobs=": (), "size=": ("full", "needle", "quick"), "stored=": ("true",), "all": ()},
    "calibrate": {"name=": (), "out=": "/", "texts=": ()},
    "data": {"": ("pull", "verify", "ls", "make")},
    "replay": {"": ("record",), "policies=": (), "sizes=": (), "out=": "/", "steps=": (), "phases=": ("decode", "prefill")},
    "score": {"": ("infbench", "ruler", "longbench", "longbench2"), "edition=": (), "drop_first_number=": ("true", "false")},
    "completion": {"": tuple(SCRIPTS)},
}
LAUNCHERS = {"joblib": ("joblib",), "submitit": ("submitit_local", "submitit_slurm")}


def main(words: list[str]) -> int:
    """Print a shell's script, or what may complete the last word of a line. Raises ``ConfigError`` for other words."""
    if len(words) == 2 and words[0] == "words":
        print("\n".join(candidates(words[1])))
        return 0
    if len(words) != 1:
        raise ConfigError("completion takes the name of a shell: source <(hipexp completion bash), or zsh; hipexp completion fish | source")
    if words[0] not in SCRIPTS:
        raise unknown(f"completion {words[0]}", words[0], SCRIPTS)
    print(SCRIPTS[words[0]])
    return 0


def candidates(line: str) -> list[str]:
    """What the last word of ``line`` may become; ``line`` begins with the program and ends at the cursor."""
    from hipexp.cli import COMMANDS

    *before, current = line.lstrip().split(" ")
    typed = [word for word in before[1:] if word]
    command = typed[0] if typed and typed[0] in COMMANDS else None
    if command is not None and current.startswith("-") and "=" not in current:
        return starting(current, (*COMMANDS[command][2], *(word for word in OWN.get(command, {}) if word.startswith("-")), "--help"))
    if command is not None:
        return [*own_words(command, current), *(overrides(current) if command in OF_POINTS else ())]
    if current.startswith("-") and "=" not in current:
        return starting(current, FLAGS)
    launchers = launcher_words(current) if {"-m", "--multirun"} & set(typed) else []
    return [*(starting(current, COMMANDS) if not typed else ()), *launchers, *overrides(current)]


def own_words(command: str, current: str) -> list[str]:
    """What the last word may become of the words that only ``command`` has."""
    words = OWN.get(command, {})
    key, equals, value = current.partition("=")
    if not equals:
        bare = completed(words[""], current) if "" in words else []
        return [
            *bare,
            *starting(current, [word for word in words if word]),
            *(starting(current, run_names()) if command in OF_RUNS else ()),
        ]
    if f"{key}=" not in words:
        return []
    known = filter_values(key) if f"{key}=" in FILTERS and command in ("ls", "retry") else words[f"{key}="]
    done = value[: value.rfind(",") + 1]
    return [f"{key}={done}{one}" for one in completed(known, value[len(done) :])]


def completed(known: str | Sequence[str], current: str) -> list[str]:
    """What a word may become: one of the names that are ``known``, of a folder of ``conf/``, or a path: ``/`` for folders, or an ending."""
    if not isinstance(known, str):
        return starting(current, known)
    if known.startswith("conf/"):
        return starting(current, sorted(path.stem for path in (conf_dir() / known.removeprefix("conf/")).glob("*.yaml")))
    parent, _, begun = current.rpartition("/")
    folder = Path(f"{parent}/" if "/" in current else ".").expanduser()
    found = sorted(path for path in folder.glob("*") if path.name.startswith(begun) and (begun or not path.name.startswith(".")))
    before = current[: len(current) - len(begun)]
    return [f"{before}{path.name}{'/' if path.is_dir() else ''}" for path in found if path.is_dir() or path.name.endswith(known)]


def filter_values(name: str) -> list[str]:
    """The values of a filter of runs that are known."""
    from hipexp.report.runs import STATES
    from hipexp.run.ledger import FAILURES

    return {"state": list(STATES), "class": list(FAILURES), "protocol": []}.get(name) or (values(name) if name in GROUPS else [])


def launcher_words(current: str) -> list[str]:
    """Hydra's launchers that are installed."""
    here = [name for package, names in LAUNCHERS.items() if _installed(f"hydra-{package}-launcher") for name in names]
    return starting(current, [f"hydra/launcher={name}" for name in here] if "=" in current else ["hydra/launcher="])


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def starting(current: str, words: Any) -> list[str]:
    """The ``words`` that begin with ``current``."""
    return [word for word in words if word.startswith(current)]


def run_names() -> list[str]:
    """The names of the stored runs."""
    from hipexp.report.runs import load_runs

    return [run.name for run in load_runs()]


def overrides(current: str) -> list[str]:
    """What an override may become: the next part of its key, or its value; behind a comma another value."""
    match = re.fullmatch(r"([+~-]*)([^=]*)(=?)(.*)", current)
    assert match is not None, "every text without line ends matches"
    prefix, key, equals, value = match.groups()
    if not equals:
        return [prefix + word for word in keys(key)]
    done = value[: value.rfind(",") + 1]
    return [f"{prefix}{key}={done}{one}" for one in starting(value[len(done) :], values(key))]


def keys(begun: str) -> list[str]:
    """Keys that begin so, up to the next dot: ``task=`` and ``task.``, ``task.samples=``, ``pipeline.stages.0.``."""
    parent = begun.rpartition(".")[0]
    if not parent:
        groups = [f"{group}{end}" for group in GROUPS for end in ("=", ".")]
        return starting(begun, [*groups, *(word for word in parts(Experiment) if word.endswith("="))])
    try:
        kind = field_type(parent)
    except ConfigError:
        return []
    return starting(begun, [f"{parent}.{word}" for word in parts(required(kind))])


def parts(kind: Any) -> list[str]:
    """The next parts of a key of this type, with ``=`` where it ends, with a dot where it goes on."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [name + ("=" if ends(inner) else ".") for name, inner in fields_of(kind).items()]
    return [f"{number}." for number in range(STAGES)] if is_list(kind) else []


def ends(kind: Any) -> bool:
    """Whether a key of this type takes a value."""
    return is_plain(kind) or (isinstance(required(kind), type) and issubclass(required(kind), Enum))


def values(key: str) -> list[str]:
    """The values of a key that are known: options of a group, names of a choice, true and false."""
    if key in GROUPS:
        options = group_options(conf_dir())[key]
        return sorted({*options, DENSE}) if key == "pipeline" else options
    try:
        kind = required(field_type(key))
    except ConfigError:
        return []
    if kind is bool:
        return ["true", "false"]
    return list(kind.__members__) if isinstance(kind, type) and issubclass(kind, Enum) else []
