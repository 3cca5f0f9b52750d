"""Benchmarks: samples, prompts, scoring. ``open_suite`` turns a task into one of them."""

from __future__ import annotations

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


def open_suite(task: Task, encode: Encode, trained_tok: int, seed: int) -> Suite:
    """The suite that ``task`` names, ready to make samples for the tokenizer behind ``encode``.

    A length that is not set is twice ``trained_tok``; a grid without lengths takes 1, 2 and 4 times.
    Raises ``ConfigError`` for an unknown subtask or a length below a sample's frame.
    """
    from hipexp.suites.truncation import Truncated

    check_task(task)
    suite = _open(task, encode, trained_tok, seed)
    return suite if task.truncate_tok is None else Truncated(suite, task.truncate_tok)


def _open(task: Task, encode: Encode, trained_tok: int, seed: int) -> Suite:
    from hipexp.suites.infbench import InfBench
    from hipexp.suites.passkey import PasskeyGrid

    if task.name == "infbench":
        length_tok = 2 * trained_tok if task.length_tok is None else task.length_tok
        return InfBench(tuple(task.subtasks or ()), task.samples, length_tok, encode, seed, task.wording)
    depths = list(DEPTHS) if task.depths is None else task.depths
    return PasskeyGrid(lengths_of(task, trained_tok), depths, task.samples, encode, seed, task.wording)
