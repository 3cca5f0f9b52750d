"""Benchmarks: samples, prompts, scoring. ``open_suite`` turns a task into one of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ConfigError, Task
from hipexp.suites.sample import DataMissing, LineEncoder, Suite

if TYPE_CHECKING:
    from hipexp.suites.published import Rules

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = ("infbench", "passkey", "ruler", "longbench", "longbench2")
OWN = "hipexp"  # the protocol of prompts in our own words


def check_task(task: Task) -> None:
    """Refuse what can be refused without a tokenizer: unknown suites, subtasks, editions and wordings. Raises ``ConfigError``."""
    from hipexp.suites import infbench

    if task.name not in NAMES:
        raise ConfigError(f"task={task.name or 'nothing'} has no samples; use {', '.join(NAMES)}")
    infbench.check_wording(task.wording)
    if task.truncate_tok is not None and task.truncate_tok < 2:
        raise ConfigError(f"task.truncate_tok={task.truncate_tok} must leave a beginning and an end; use 2 or more")
    _check_own(task)
    subtasks_of(task)


def _check_own(task: Task) -> None:
    """Refuse what only our own words of ∞Bench have, or only the official ones."""
    if task.name != "infbench":
        return
    from hipexp.suites.scoring.infbench import EDITIONS, MINFERENCE

    if task.edition is not None and task.edition not in EDITIONS:
        raise ConfigError(f"task.edition={task.edition} is no edition of the official scorer; use {' or '.join(EDITIONS)}")
    own = task.protocol == OWN
    fields = {"edition": None, "data": None} if own else {"length_tok": None, "wording": "default"}
    for name, default in fields.items():
        if getattr(task, name) != default:
            whose = (
                "official prompts and rows; choose a task.protocol of them" if own else "prompts in our own words (task.protocol=hipexp)"
            )
            raise ConfigError(f"task.{name}={getattr(task, name)} is for {whose}, or leave it out")
    if task.edition is not None and (task.edition == MINFERENCE) != (task.protocol == "minference"):
        raise ConfigError(
            f"task.edition={task.edition} does not go with task.protocol={task.protocol}: edition minference is for protocol minference, "
            "which has no other; leave task.edition out"
        )


def subtasks_of(task: Task) -> tuple[str, ...]:
    """The subtasks of a task, all that it has if it names none. Raises ``ConfigError`` for an unknown one."""
    named = list(dict.fromkeys(task.subtasks or []))
    if task.name == "infbench" and task.protocol != OWN:
        from hipexp.suites import infbench_official as official

        for name in named:
            official.check_subtask(name, task.protocol)
        return tuple(named) or official.subtasks_of(task.protocol)
    if task.name == "infbench":
        from hipexp.suites.infbench import check_subtasks

        return check_subtasks(named)
    if task.name == "ruler":
        from hipexp.suites.ruler import check_subtasks as check_ruler

        return check_ruler(named)
    if task.name == "longbench":
        from hipexp.suites.longbench import check_subtasks as check_longbench

        return check_longbench(named)
    return ("longbench2",) if task.name == "longbench2" else ("passkey",)


def lengths_of(task: Task, trained_tok: int) -> dict[str, int]:
    """The prompt lengths of a task that has several, by the key that sets each: 1, 2 and 4 times the trained length if none is named."""
    if task.length_tok is not None:
        return {"task.length_tok": task.length_tok}
    lengths_tok = task.lengths_tok or [times * trained_tok for times in (1, 2, 4)]
    return {f"task.lengths_tok[{number}]": length_tok for number, length_tok in enumerate(lengths_tok)}


def filled(task: Task, trained_tok: int) -> Task:
    """The task with everything that it leaves open said: two tasks that come out equal are the same task."""
    if task.name in ("passkey", "latency"):
        depths = list(DEPTHS) if task.depths is None and task.name == "passkey" else task.depths
        return dataclasses.replace(task, length_tok=None, lengths_tok=list(lengths_of(task, trained_tok).values()), depths=depths)
    full = dataclasses.replace(task, subtasks=list(subtasks_of(task)))
    if task.name == "ruler" or (task.name == "infbench" and task.protocol == OWN):
        full.length_tok = 2 * trained_tok if task.length_tok is None else task.length_tok
    elif task.name == "infbench" and task.edition is None:
        from hipexp.suites.infbench_official import edition_of

        full.edition = edition_of(task.protocol)
    return full


def origins(task: Task) -> dict[str, str]:
    """What decides the samples and scores of an official task besides its configuration: data, prompts, limits, versions of packages.

    Part of what makes two runs the same. Raises ``DataMissing`` and, for packages that are not installed, ``ConfigError``.
    """
    from hipexp.suites.lm_eval import versions

    folder = None if task.data is None else Path(task.data)
    if task.name == "ruler":
        return _origins_of_ruler(task)
    rules = rules_of(task, folder)
    if rules is None:
        return {}
    told: dict[str, str] = {}
    for name in subtasks_of(task):
        told |= {name: rules.origin(name), f"{name} prompt": rules.template(name), f"{name} new_tok": str(rules.new_tok(name))}
        told |= versions(rules.packages(name))
    return told | {"cut": str(rules.cut()), "note": rules.note}


def lacking(task: Task) -> list[str]:
    """What a task needs besides the model and is not here, in words: packages, data."""
    from hipexp.suites.lm_eval import versions

    found = dict[str, None]()
    if task.name in ("latency", "recall"):
        return []
    for check in (lambda: versions(packages_of(task)), lambda: origins(task), lambda: _check_ruler(task)):
        try:
            check()
        except (ConfigError, DataMissing) as error:
            found[str(error)] = None
    return list(found)


def _check_ruler(task: Task) -> None:
    """Read what RULER's rows are made of, as a run does. Raises as it does."""
    from hipexp.suites.ruler import resources
    from hipexp.suites.ruler.tasks import resources_of

    if task.name == "ruler":
        for name in resources_of(subtasks_of(task)):
            resources.check(_resources(task), name, task.samples)


def packages_of(task: Task) -> list[str]:
    """What has to be installed for the samples and scores of a task besides what hipexp itself needs, by its name on the package index."""
    names = subtasks_of(task)
    if task.name == "ruler":
        return ["lm_eval", "wonderwords", "numpy", *(["scipy"] if "fwe" in names else [])]
    rules = rules_of(task, None if task.data is None else Path(task.data))
    return [] if rules is None else list(dict.fromkeys(package for name in names for package in rules.packages(name)))


def rules_of(task: Task, folder: Path | None) -> Rules | None:
    """The rules of a task with published rows; None for the others."""
    if task.name == "longbench":
        from hipexp.suites.longbench import LongBench

        return LongBench(folder)
    if task.name == "longbench2":
        from hipexp.suites.longbench2 import LongBench2

        return LongBench2(folder)
    if task.name == "infbench" and task.protocol != OWN:
        from hipexp.suites.infbench_official import InfBenchOfficial

        return InfBenchOfficial(task.protocol, task.edition, folder)
    return None


def open_suite(task: Task, tokenizer: Any, trained_tok: int, seed: int) -> Suite:
    """The suite that ``task`` names, ready to make samples for a tokenizer.

    A length that is not set is twice ``trained_tok``; a grid without lengths takes 1, 2 and 4 times.
    Raises ``ConfigError`` for an unknown subtask, and for a length or a truncation below a sample's frame, ``DataMissing`` for data that
    are not here.
    """
    from hipexp.suites.infbench import InfBench, check_length
    from hipexp.suites.passkey import PasskeyGrid
    from hipexp.suites.truncation import Truncated

    check_task(task)
    full, encode = filled(task, trained_tok), LineEncoder(tokenizer)
    if rules := rules_of(task, None if task.data is None else Path(task.data)):
        from hipexp.suites.published import Published

        origins(task)
        return Published(rules, subtasks_of(task), task.samples, tokenizer, task.truncate_tok)
    suite: Suite
    if task.name == "ruler":
        return _open_ruler(full, tokenizer, seed)
    if task.name == "infbench":
        assert full.subtasks is not None and full.length_tok is not None
        suite = InfBench(tuple(full.subtasks), task.samples, full.length_tok, encode, seed, task.wording)
    else:
        suite = PasskeyGrid(lengths_of(task, trained_tok), full.depths or [], task.samples, encode, seed, task.wording)
    if task.truncate_tok is None:
        return suite
    for subtask in full.subtasks or ["passkey"]:
        check_length(subtask, task.truncate_tok, encode, task.wording, "task.truncate_tok")
    return Truncated(suite, task.truncate_tok)


def _open_ruler(task: Task, tokenizer: Any, seed: int) -> Suite:
    from hipexp.suites.framing import template_of
    from hipexp.suites.ruler import Ruler

    assert task.subtasks is not None and task.length_tok is not None
    before, after, special = template_of(tokenizer)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special).input_ids)

    def count_tok(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    return Ruler(tuple(task.subtasks), task.samples, task.length_tok, encode, count_tok, seed, _resources(task), (before, after))


def _origins_of_ruler(task: Task) -> dict[str, str]:
    """Versions and digests of all that decides RULER's rows besides the configuration."""
    from hipexp.suites import lm_eval
    from hipexp.suites.ruler import EDITION, resources
    from hipexp.suites.ruler.tasks import resources_of

    names = subtasks_of(task)
    folder, needs = _resources(task), resources_of(names)
    told = {"generator": EDITION} | lm_eval.versions(packages_of(task))
    if "essays" in needs:
        told["sentences"] = resources.sentences(folder).name
    if unknown := resources.unknown(folder, needs):
        told["own data"] = ", ".join(unknown)
    return told | resources.digests(folder, needs)


def _resources(task: Task) -> Path:
    """The folder of what RULER's rows are made of."""
    from hipexp.suites.data.resolve import folder_for

    return folder_for("ruler", subtasks_of(task), None if task.data is None else Path(task.data))
