"""The recipe of ``needle``: three runs of the optimizer, each on longer and longer prompts, each from the weights of the one before.

The first learns to look up numbers. The second adds named values and chains of assignments: looking up by words, from other words away, is
learned much sooner by a model that looks up numbers than by one that looks up nothing. The third drills answers of several values, mostly
at the longest lengths.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

TRAINED_LENGTH = 6144
SHORTER = 0.3  # share of steps drawn from an earlier length
MOST_SEQUENCES = 64  # of a step
LENGTH_THAT_DOUBLES = 4500  # a token in a sequence of this length takes twice as long as one in a very short one

Mixture = dict[str, float]  # the share of each kind of prompt (corpus.PromptMaker.kinds)


@dataclass(frozen=True)
class Phase:
    """A run of the optimizer, from a warm-up to a learning rate of nothing.

    ``lengths``: (steps, sequence length) one after the other; ``longer``: share of steps drawn from a later length, so that what the phase
    before learned at it is not lost; ``step_tok``: tokens of a step, of one sequence at least; ``peak``: learning rate; ``decay``: share of
    the steps, at the end, over which it falls; ``mixtures``: from which length on, and what; ``fast``: multiply matrices in bfloat16 on a
    CPU and in TF32 on a GPU.
    """

    lengths: tuple[tuple[int, int], ...]
    step_tok: int
    peak: float
    warm_up_steps: int
    decay: float
    mixtures: tuple[tuple[int, Mixture], ...]
    longer: float = 0.0
    fast: bool = False

    @property
    def steps(self) -> int:
        """How many there are."""
        return sum(steps for steps, _ in self.lengths)

    def mixture(self, length: int) -> Mixture:
        """That of prompts of ``length`` tokens."""
        return next(mixture for least, mixture in reversed(self.mixtures) if length >= least)

    def length(self, step: int, rng: random.Random) -> int:
        """Sequence length of a step: the curriculum's, or with probability ``SHORTER`` an earlier one, or a later one."""
        reached = 0
        while step >= self.lengths[reached][0]:
            step -= self.lengths[reached][0]
            reached += 1
        if reached and rng.random() < SHORTER:
            reached = rng.randrange(max(0, reached - 3), reached)
        elif reached + 1 < len(self.lengths) and rng.random() < self.longer:
            reached = rng.randrange(reached + 1, len(self.lengths))
        return self.lengths[reached][1]

    def learning_rate(self, step: int) -> float:
        """It rises, stays and falls to nothing."""
        return self.peak * min(1.0, (step + 1) / self.warm_up_steps, (1 - step / self.steps) / self.decay)


PHASES = (
    Phase(
        lengths=((280, 96), (140, 128), (160, 192), (240, 384), (300, 768), (280, 1536), (400, 3072), (1500, TRAINED_LENGTH)),
        step_tok=6144,
        peak=4e-3,
        warm_up_steps=100,
        decay=0.25,
        # First repeats and short pairs only: looking up what followed a token before is learned there in minutes, while the varied prompts
        # alone leave the model guessing for long. After that variety decides whether it generalises.
        mixtures=(
            (0, {"repeats": 0.6, "pairs": 0.4}),
            (128, {"snippets": 0.6, "pairs": 0.4}),
            (192, {"snippets": 0.3, "pairs": 0.35, "digits": 0.35}),
            (1024, {"snippets": 0.05, "pairs": 0.6, "digits": 0.35}),
        ),
    ),
    Phase(
        lengths=((125, 128), (205, 192), (510, 384), (465, 768), (470, 1536), (555, 3072), (735, TRAINED_LENGTH)),
        step_tok=12288,
        peak=3.5e-3,
        warm_up_steps=100,
        decay=0.5,
        mixtures=((0, {"named": 0.46, "chains": 0.24, "pairs": 0.15, "digits": 0.08, "snippets": 0.07}),),
        longer=0.12,
        fast=True,
    ),
    Phase(
        lengths=((70, 128), (30, 192), (60, 384), (85, 768), (85, 1536), (190, 3072), (380, TRAINED_LENGTH)),
        step_tok=24576,
        peak=1.5e-3,
        warm_up_steps=40,
        decay=0.5,
        mixtures=(
            (0, {"values": 0.5, "queries": 0.12, "named": 0.08, "chains": 0.1, "pairs": 0.15, "snippets": 0.05}),
            (256, {"values": 0.38, "queries": 0.14, "named": 0.1, "chains": 0.15, "pairs": 0.14, "digits": 0.04, "snippets": 0.05}),
            (1024, {"values": 0.26, "queries": 0.12, "named": 0.14, "chains": 0.17, "pairs": 0.18, "digits": 0.08, "snippets": 0.05}),
            (3072, {"values": 0.21, "queries": 0.11, "named": 0.14, "chains": 0.17, "pairs": 0.26, "digits": 0.08, "snippets": 0.03}),
        ),
        longer=0.2,
        fast=True,
    ),
)
STEPS = sum(phase.steps for phase in PHASES)


class Step(NamedTuple):
    """What decides the batch of a step: its number, and the length of its sequences, how many there are and what they are of."""

    number: int
    length: int
    sequences: int
    mixture: Mixture

    @property
    def cost(self) -> int:
        """How long it takes, in units that only compare."""
        return (LENGTH_THAT_DOUBLES + self.length) * self.length * self.sequences


def phase_of(number: int) -> tuple[Phase, int]:
    """The phase of a step, and the number of the step in it."""
    for phase in PHASES:
        if number < phase.steps:
            return phase, number
        number -= phase.steps
    raise IndexError(f"the recipe has {STEPS} steps")


def step_of(number: int) -> Step:
    """What is to be done in a step; of short sequences fewer tokens do."""
    phase, in_phase = phase_of(number)
    length = phase.length(in_phase, random.Random(f"needle-length/{number}"))
    return Step(number, length, max(1, min(phase.step_tok // length, MOST_SEQUENCES)), phase.mixture(length))
