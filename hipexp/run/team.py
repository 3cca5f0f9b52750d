"""A run whose model is split over processes: the first one owns the run folder and the terminal, the others compute with it.

All do the same things in the same order, each with a ledger; those of the others lie in scratch folders, begin as the first one's, and go
with the process. A process that fails ends, and torchrun ends those that wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hipexp.config.processes import Processes, check_started, started
from hipexp.config.schema import Model
from hipexp.run.ledger import RunFailed


@dataclass(frozen=True)
class Team:
    """The processes of a run; ``group``: how they talk, None for one alone."""

    processes: Processes
    group: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.processes.number == 0

    def share(self, what: Any = None) -> Any:
        """What the first process hands over, to all of them. Raises as :meth:`together`."""
        if self.group is None:
            return what
        from hipexp.hf import parallel

        with self.together():
            return parallel.told(what, self.group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn the end of another process inside the block into ``RunFailed``: that one says itself what went wrong."""
        try:
            yield
        except RuntimeError as error:
            if self.group is None:
                raise
            from hipexp.hf import parallel

            if not parallel.lost(error):
                raise
            raise RunFailed(
                f"another of the {self.processes.count} processes ended or does not answer, and the reason is what it says itself; "
                f"finished samples are kept ({str(error).splitlines()[0]})"
            ) from error


ALONE = Team(Processes())


@contextmanager
def team_of(model: Model) -> Iterator[Team]:
    """The processes that a run with this model has. Raises ``ConfigError`` where it is to be split and there is only one."""
    check_started(model)
    if model.tp_plan is None:
        yield ALONE
        return
    from hipexp.hf import parallel

    yield Team(started(), parallel.join())
    parallel.leave()  # after an error nobody can wait for the others
