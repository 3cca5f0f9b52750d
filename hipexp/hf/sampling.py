"""Which token comes next: the most likely one, or one by lot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hipexp.config.schema import ConfigError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0: the most likely token. Else by lot: of the ``top_k`` most likely ones (0: all) the fewest that hold ``top_p``.

    The same ``seed`` gives a prompt the same tokens, alone and in a batch. Raises ConfigError for values that are none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, holds, rule in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "finite and not negative; 0 takes the most likely token"),
            ("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "a number of tokens; 0 takes all"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1, which takes all"),
            ("seed", self.seed, isinstance(self.seed, int) and 0 <= self.seed < 1 << 63, "a whole number from 0"),
        ):
            if not holds:
                raise ConfigError(f"{name}={value} must be {rule}")


GREEDY = Sampling()


class Chooser:
    """Draws the tokens of one sequence, one after the other."""

    def __init__(self, sampling: Sampling):
        self.sampling, self._lot = sampling, torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """A token by ``logits`` ``[vocabulary]``; those of -inf are never drawn.

        One number is drawn, on the CPU, and shares are added up by token, not by rank: rounding, which differs between a prompt alone and
        in a batch, then hardly ever gives another token.
        """
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu()
        ranked, order = ((logits - logits.max()) / self.sampling.temperature).sort(descending=True, stable=True)
        if self.sampling.top_k:
            ranked[self.sampling.top_k :] = -torch.inf
        share = ranked.softmax(-1)
        share[share.cumsum(-1) - share >= self.sampling.top_p] = 0.0  # what is before them is enough
        below = torch.empty_like(share).scatter_(0, order, share).cumsum(-1)
        lot = torch.rand((), generator=self._lot, dtype=torch.float64) * below[-1]
        return int(torch.searchsorted(below, lot, right=True))
