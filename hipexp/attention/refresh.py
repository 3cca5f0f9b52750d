"""When a stage is run again in decode, and what is kept between two runs. Belongs to one sequence and one layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hipexp_kernels import Held
from torch import Tensor

from hipexp.config.schema import Representative, Stage

Candidates = tuple[Tensor, Tensor]  # starts [S, N or 1, C] and counts [S, N]; one block in decode


@dataclass
class Memory:
    """Refresh state of one sequence in one layer: decode steps done, and what each stage was given by the one before.

    ``lists[i]``: the candidates of stage ``i`` (those of the first are not kept); ``lists[len(stages)]``: the final selection. A stage
    that runs again writes over its last result where that has the right size. ``late``: a final selection for the next step.
    ``asked[i]``: the query ``[H, D]`` of the last run of stage ``i``, where somebody looks at it.
    ``held``: what attention made of window, sinks and final selection, for the steps that follow; None if there will be none.
    """

    step: int = 0
    lists: dict[int, Candidates] = field(default_factory=dict)
    late: Candidates | None = None
    asked: dict[int, Tensor] = field(default_factory=dict, compare=False)
    held: Held | None = field(default_factory=Held, compare=False)

    def catch_up(self, n_stages: int) -> None:
        """The selection that the last step made too late for itself becomes the final one."""
        if self.late is not None:
            self.remember(n_stages, self.late, final=True)
            self.late = None

    def remember(self, stage: int, candidates: Candidates, final: bool) -> None:
        """Keep what stage ``stage`` is given, or the ``final`` selection; what was made of an earlier one is of no use then."""
        self.lists[stage] = candidates
        if final and self.held:
            self.held.clear()

    def expected(self, stages: list[Stage], shift_steps: int = 0) -> tuple[Candidates, int] | None:
        """Chunks whose keys this step will probably read, all of them, and the tokens of a chunk; None if that is not known.

        They are the candidates of the first stage from the one that is due on that scores by all keys: if it is due itself they are just
        those, else those that it had the last time.
        """
        due = self.first_stage_due(stages, shift_steps)
        for number in range(max(1, due), len(stages)):
            if stages[number].representative is Representative.exact and number in self.lists:
                return self.lists[number], stages[number].chunk_tok
        return None

    def first_stage_due(self, stages: list[Stage], shift_steps: int = 0) -> int:
        """The first stage that this decode step runs again (later ones follow); ``len(stages)`` if the selection is reused.

        A stage is due every ``refresh_steps`` steps, ``shift_steps`` before multiples of it; all are as long as nothing is remembered.
        """
        if len(stages) not in self.lists:
            return 0
        return next((i for i, stage in enumerate(stages) if (self.step + shift_steps) % stage.refresh_steps == 0), len(stages))

    def first_stage_turned(self, q: Tensor, below: float, n_stages: int) -> int:
        """The first of ``n_stages`` stages from whose last query ``q`` ``[H, D]`` has turned away: the mean of the cosines of all heads is
        below ``below``. ``n_stages`` if there is none. On a GPU this waits for it.
        """
        for i in range(n_stages):
            if i in self.asked and float(torch.nn.functional.cosine_similarity(q.float(), self.asked[i].float(), dim=-1).mean()) < below:
                return i
        return n_stages

    def ran(self, due: int, n_stages: int, q: Tensor) -> None:
        """Stages from ``due`` on run for ``q`` ``[H, D]``."""
        if due < n_stages:
            self.asked |= dict.fromkeys(range(due, n_stages), q.clone())
