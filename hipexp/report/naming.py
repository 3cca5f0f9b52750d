"""Names that tell runs apart by what was configured, and the command lines that make a run."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.report.gather import Run, groups_of

MOST = 3  # settings in a name
CUT = " (prompts cut)"
ALSO = ("model", "task", "pipeline", "offload", "seed")


def name_runs(runs: Sequence[Run]) -> None:
    """Set every run's ``label``: its attention, with the settings in which it differs from most others of the same name."""
    for attention, mine in groups_of(runs, lambda run: run.attention).items():
        leaves = [dict(_attention_leaves(run)) for run in mine]
        usual = {key: _usual([one.get(key) for one in leaves]) for key in dict.fromkeys(key for one in leaves for key in one)}
        for run, one in zip(mine, leaves, strict=True):
            own = [f"{_short(key)}={_word(value)}" for key, value in one.items() if value != usual[key]]
            offload = f" + {run.offload}" if run.offload != "none" else ""
            key = f", {run.folder.name.rpartition('_')[2][:6]}" if len(own) > MOST else ""
            run.label = ", ".join([attention + offload, *own[:MOST]]) + key + (CUT if _is_cut(run) else "")


def _attention_leaves(run: Run) -> Iterator[tuple[str, Any]]:
    yield from leaves_of(run.config.get("pipeline") or {}, "pipeline")
    if run.offload != "none":
        yield from (
            (key, value) for key, value in leaves_of(run.config["offload"], "offload") if key not in ("offload.name", "offload.disk_dir")
        )


def _is_cut(run: Run) -> bool:
    """Whether truncation removed tokens from prompts of a run."""
    return any(((run.card.get("truncation") or {}).get("removed_tok") or {}).values())


def _usual(values: Sequence[Any]) -> Any:
    told = Counter(map(repr, (value for value in values if value is not None))).most_common(1)
    return next((value for value in values if told and repr(value) == told[0][0]), None)


def _short(key: str) -> str:
    return key.partition(".")[2]


def leaves_of(data: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a configuration; stages are counted, other lists are values."""
    if isinstance(data, dict):
        for name, inner in data.items():
            yield from leaves_of(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list) and data and isinstance(data[0], dict):
        for number, inner in enumerate(data):
            yield from leaves_of(inner, f"{key}.{number}")
    else:
        yield key, data


def command_of(config: dict[str, Any], dense: bool = False) -> str | None:
    """The command line of a resolved configuration, or with ``dense`` that of the dense run of the same samples.

    None where words cannot say it: a preset that is not there any more, or a pipeline from a file.
    """
    told = dict(config)
    if dense:
        told |= {"pipeline": None, "offload": {"name": "none"}}
    try:
        words = _chosen(told)
        usual = dict(_composed(tuple(words)))
    except ConfigError:
        return None
    wanted = dict(leaf for name in ALSO for leaf in leaves_of(told.get(name), name))
    wanted = {key: value for key, value in wanted.items() if not (dense and key.startswith("offload"))}
    if any(key.startswith("pipeline.") and key not in wanted for key in usual):
        return None
    own = [
        f"{key}={_word(value)}" for key, value in wanted.items() if usual.get(key, None) != value and key not in ("pipeline", "model.name")
    ]
    return shlex.join(["python", "-m", "hipexp", *words, *(word for word in own if word not in words)])


def _chosen(config: dict[str, Any]) -> list[str]:
    from hipexp.config.overrides import conf_dir, group_options

    options, model = group_options(conf_dir()), config["model"]
    pipeline, offload = config.get("pipeline"), (config.get("offload") or {}).get("name", "none")
    words = [f"+pipeline={pipeline.get('name') or pipeline.get('method')}"] if pipeline else []
    words.append(f"task={config['task']['name']}")
    served = model.get("base_url") is not None
    if served:
        words += ["model=openai", f"model.base_url={model['base_url']}", f"model.path={model['path']}"]
    elif model.get("name") not in options["model"] or model["name"] in ("hf", "openai"):
        words += ["model=hf", f"model.path={model['path']}"]
    elif model["name"] != "needle":
        words.append(f"model={model['name']}")
    return words + ([f"offload={offload}"] if offload != "none" else [])


@cache
def _composed(words: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """What a few words configure by themselves, as leaves. Raises ``ConfigError`` for a word that chooses nothing."""
    from hipexp.config.compose import compose
    from hipexp.config.convert import to_plain

    plain = to_plain(compose(list(words)))
    return tuple(leaf for name in ALSO for leaf in leaves_of(plain[name], name))


def _word(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
