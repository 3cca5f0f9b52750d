"""Names that tell runs apart by what was configured, and the command lines that make a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.report.gather import Entry, groups_of

MOST = 3  # settings in a name
CUT = " (prompts cut)"
# Settings outside pipeline and offload that change results or times: told where runs of one task, model and attention differ in them.
TELLING = ("seed", "model.dtype", "model.prefill_chunk_tok", "task.wording")
ALSO = ("model", "task", "pipeline", "offload", "seed")


def name_runs(runs: Sequence[Entry]) -> None:
    """Set every run's ``label``: its attention, with the settings that its presets do not have, and what else tells namesakes apart."""
    labels = [_label(run) for run in runs]
    for (*_, label), mine in groups_of(zip(runs, labels, strict=True), lambda pair: (pair[0].task, pair[0].model, pair[1])).items():
        apart = [{key: _other(run, key) for key in TELLING} for run, _ in mine]
        keys = [key for key in TELLING if len({repr(values[key]) for values in apart}) > 1]
        for (run, _), values in zip(mine, apart, strict=True):
            told = [f"{key.rpartition('.')[2]}={_word(values[key])}" for key in keys if values[key] != _usual(run).get(key)]
            run.label = ", ".join([label, *told]) + (CUT if _is_cut(run) else "")


def _label(run: Entry) -> str:
    """The attention of a run, with the settings in which it differs from its presets; the first ``MOST``, and of more the run's key."""
    offload = f" + {run.offload}" if run.offload != "none" else ""
    usual, leaves = _presets(run), dict(_attention_leaves(run))
    own = [f"{_short(key)}={_word(leaves.get(key))}" for key in dict.fromkeys([*usual, *leaves]) if leaves.get(key) != usual.get(key)]
    key = f", {run.folder.name.rpartition('_')[2][:6]}" if len(own) > MOST else ""
    return ", ".join([run.attention + offload, *own[:MOST]]) + key


def _presets(run: Entry) -> dict[str, Any]:
    """What the presets of a run's pipeline and offload say by themselves; where they are not there any more, what the run has."""
    leaves = dict(_attention_leaves(run))
    usual = _usual(run) or leaves
    return {key: value for key, value in usual.items() if key in leaves or (leaves and key.startswith("pipeline."))}


def _usual(run: Entry) -> dict[str, Any]:
    """What the presets that a run names configure by themselves; empty where one is not there any more."""
    try:
        return dict(_composed(tuple(_chosen(run.config)))) if run.config else {}
    except ConfigError:
        return {}


def _other(run: Entry, key: str) -> Any:
    """A setting outside pipeline and offload."""
    found: Any = run.config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _attention_leaves(run: Entry) -> Iterator[tuple[str, Any]]:
    yield from leaves_of(run.config.get("pipeline") or {}, "pipeline")
    if run.offload != "none":
        yield from (
            (key, value) for key, value in leaves_of(run.config["offload"], "offload") if key not in ("offload.name", "offload.disk_dir")
        )


def _is_cut(run: Entry) -> bool:
    """Whether truncation removed tokens from prompts of a run."""
    return any(((run.card.get("truncation") or {}).get("removed_tok") or {}).values())


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
