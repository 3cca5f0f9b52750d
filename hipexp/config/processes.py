"""The processes that torchrun started, of which this is one."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hipexp.config.schema import ConfigError, Model

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """``count`` processes, of which this is number ``number``, from 0 on, and number ``local`` on its machine."""

    number: int = 0
    count: int = 1
    local: int = 0


def started() -> Processes:
    """The processes that torchrun started; one alone without it."""
    if not all(os.environ.get(name) for name in SET_BY_TORCHRUN):
        return Processes()
    return Processes(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def check_shared(model: Model) -> None:
    """Refuse to do the same in several processes; raises ConfigError."""
    if model.tp_plan is None and started().count > 1:
        raise ConfigError(
            f"torchrun started {started().count} processes, and without model.tp_plan=auto each would do the whole run; add it, or start "
            "one with `python -m hipexp …`"
        )


def check_started(model: Model) -> None:
    """Refuse to split a model over one process; raises ConfigError."""
    if model.tp_plan is not None and started().count == 1:
        raise ConfigError(
            f"model.tp_plan={model.tp_plan} splits a model over processes, and there must be two or more, but this is the only one; start "
            "them with `torchrun --nproc-per-node 2 -m hipexp …`, or leave it out"
        )
