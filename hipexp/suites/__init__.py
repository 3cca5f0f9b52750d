"""Benchmarks: samples, prompts, scoring. ``open_suite`` turns a task into one of them."""

from __future__ import annotations

import dataclasses

from hipexp.config.schema import ConfigError, Task
from hipexp.suites.sample import Encode, Suite

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def check_task(task: Task) -> None:
    """Refuse what can be refused without a tokenizer: unknown suites, subtasks and wordings. Raises ``ConfigError``."""
    from hipexp.suites import infbench

    if task.name not in ("infbench", "passkey"):
        raise ConfigError(f"task={task.name or 'nothing'} has no samples; use infbench or passkey")
    infbench.check_wording(task.wording)
    if task.name == "infbench":
        infbench.check_subtasks(task.subtasks or [])


def lengths_of(task: Task, trained_tok: int) -> dict[str, int]:
    """The prompt lengths of a task that has several, by the key that sets each: 1, 2 and 4 times the trained length if none is named."""
    if task.length_tok is not None:
        return {"task.length_tok": task.length_tok}
    lengths_tok = task.lengths_tok or [times * trained_tok for times in (1, 2, 4)]
    return {f"task.lengths_tok[{number}]": length_tok for number, length_tok in enumerate(lengths_tok)}


def filled(task: Task, trained_tok: int) -> Task:
    """The task with everything that it leaves open said: two tasks that come out equal are the same task."""
    from hipexp.suites.infbench import check_subtasks

    if task.name == "infbench":
        length_tok = 2 * trained_tok if task.length_tok is None else task.length_tok
        return dataclasses.replace(task, subtasks=list(check_subtasks(task.subtasks or [])), length_tok=length_tok)
    depths = list(DEPTHS) if task.depths is None and task.name == "passkey" else task.depths
    return dataclasses.replace(task, length_tok=None, lengths_tok=list(lengths_of(task, trained_tok).values()), depths=depths)


def open_suite(task: Task, encode: Encode, trained_tok: int, seed: int) -> Suite:
    """The suite that ``task`` names, ready to make samples for the tokenizer behind ``encode``.

    A length that is not set is twice ``trained_tok``; a grid without lengths takes 1, 2 and 4 times.
    Raises ``ConfigError`` for an unknown subtask, and for a length or a truncation below a sample's frame.
    """
    from hipexp.suites.infbench import InfBench, check_length
    from hipexp.suites.passkey import PasskeyGrid
    from hipexp.suites.truncation import Truncated

    check_task(task)
    full = filled(task, trained_tok)
    suite: Suite
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
