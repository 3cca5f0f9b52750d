"""``python -m hipexp completion bash|zsh|fish``: a script for the shell, which asks ``completion words`` what may stand where.

It is fast: no torch, no Hydra.
Hydra has a completion of its own, but it knows neither sub-commands nor the spellings that ``hipexp.config.overrides`` takes.
"""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
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
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} != *[=.] ]] && COMPREPLY[0]+=" "
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
OF_RUNS = {"compare": ("--anyway", "--json", "all=true"), "retry": ("--dry-run", "class=", "task=")}  # commands whose words are runs
TUNE = (
    "objective=",
    "max_bytes=",
    "trials=",
    "hours=",
    "name=",
    "space=",
    "baseline=",
    "held_out=",
    "checked=",
    "sampler=",
    "jobs=",
    "batch=",
)
FILTERS = ("task=", "model=", "pipeline=", "state=", "class=", "protocol=", "--json")


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
    if command in OF_RUNS:
        return starting(current, [*run_names(), *OF_RUNS[command]])
    if command == "ls":
        return starting(current, FILTERS)
    if command == "tune":
        return starting(current, ["--dry-run", *TUNE]) + overrides(current)
    if command == "completion":
        return starting(current, SCRIPTS)
    if current.startswith("-") and "=" not in current:
        return starting(current, FLAGS)
    return [*(starting(current, COMMANDS) if not typed else ()), *overrides(current)]


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
