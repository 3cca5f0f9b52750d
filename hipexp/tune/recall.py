"""What a pipeline holds of the attention of recorded prompts: told in moments, where answers take minutes.

Prompts have the model's trained length, and the pipeline keeps as much less as they are shorter than those of the task
(:mod:`hipexp.run.judged`).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ConfigError, Experiment, Pipeline, Stage, Task
from hipexp.run import judged, recall
from hipexp.run.budgets import divided
from hipexp.run.ledger import make_folder, replacing
from hipexp.run.point import Load
from hipexp.suites import infbench
from hipexp.suites.sample import LineEncoder

if TYPE_CHECKING:
    from hipexp.hf import Loaded

TEXTS, BLOCKS = 3, 3  # prompts, and query blocks of each; the last block of a prompt is one of them
SMALL = Pipeline(method="hip", sink_tok=64, window_tok=64, stages=[Stage(64, 64)])  # blocks are chosen by it, whatever is judged
NOTHING = 1e-4  # mass of a head that counts as none


@dataclasses.dataclass
class Recorded:
    """Queries and keys of a model that read prompts like those of ``experiment``; they lie in ``folder``.

    ``divisor``: how much longer the task's prompts are. ``offset``: of the seed, for other prompts.
    """

    experiment: Experiment
    folder: Path
    load: Load
    trained_tok: int
    divisor: int
    offset: int = 0

    @cached_property
    def loaded(self) -> Loaded:
        """The model."""
        return self.load(self.experiment.model)

    @cached_property
    def sources(self) -> list[str]:
        """Whose prompts are read: those of the task where they can be made at any length, else ``kv_retrieval``."""
        task = self.experiment.task
        known = [name for name in infbench.SUBTASKS if name in (task.subtasks or (["passkey"] if task.name == "passkey" else []))]
        return known or (list(infbench.SUBTASKS) if task.name == "infbench" else ["kv_retrieval"])

    @cached_property
    def recall_experiment(self) -> Experiment:
        """As ``task=recall`` would have it."""
        task = recall.filled(Task(name="recall", samples=BLOCKS, divisors=[1], subtasks=self.sources), self.trained_tok)
        return dataclasses.replace(self.experiment, task=task, pipeline=SMALL, seed=self.experiment.seed + self.offset)

    @cached_property
    def texts(self) -> list[dict[int, tuple[Any, Any]]]:
        """Of every prompt the raw queries and keys by layer; read once, then taken from the folder."""
        import torch

        from hipexp import hf

        made, encode = [], LineEncoder(self.loaded.tokenizer)
        for source in self.sources:
            for number in range(-(-TEXTS // len(self.sources))):
                path = self.folder / f"{source}-{self.recall_experiment.seed}-{number}.pt"
                if not path.exists():
                    sample = infbench.make_sample(source, number, TEXTS, self.trained_tok, encode, self.recall_experiment.seed, "default")
                    make_folder(self.folder)
                    with replacing(path) as scratch:
                        torch.save(hf.activations(self.loaded, sample.tokens), scratch)
                made.append(torch.load(path, mmap=True, map_location=self.loaded.model.device))
        return made

    @cached_property
    def outside(self) -> list[dict[int, list[float]]]:
        """By prompt and block, of every layer and head, the attention outside the first and last tokens of ``SMALL``."""
        return [{i: [1 - x for x in stages[-1]["fixed"]] for i, stages in layers.items()} for layers in self._judged(SMALL)]

    def of(self, pipeline: Pipeline) -> list[float]:
        """The share of the attention outside the first and last 64 tokens that a pipeline still sees, by prompt and block.

        So pipelines of different sinks and windows can be compared. Means over heads and layers. Raises ``ConfigError`` where stages
        cannot keep so much less.
        """
        return [_held(layers, outside) for layers, outside in zip(self._judged(divided(pipeline, self.divisor)), self.outside, strict=True)]

    def _judged(self, pipeline: Pipeline) -> Iterator[dict[int, judged.Stages]]:
        import torch

        with torch.inference_mode():
            layers = judged.attentions(self.loaded, {"": pipeline}, self.trained_tok)
            for heard in self.texts:
                text = judged.heard_text(self.recall_experiment, heard, self.loaded.n_layers, layers, last=True)
                yield from (text("", block) for block in range(BLOCKS))


def check_recall(name: str, baseline: Experiment, divisor: int) -> None:
    """Refuse a baseline called ``name`` whose recall cannot be told on prompts ``divisor`` times shorter. Raises ``ConfigError``."""

    def refused(by: int) -> ConfigError | None:
        try:
            recall.check_budgets(dataclasses.replace(baseline, task=Task(name="recall", divisors=[by])))
        except ConfigError as error:
            return error
        return None

    if baseline.pipeline is None or (refused(divisor) and refused(1)):
        raise ConfigError(
            f"objective=recall: baseline={name} selects nothing, so it has no recall; choose another baseline=, as in baseline=3stage"
        )
    if refused(divisor):
        fits = ", ".join(str(by) for by in range(1, 65) if not refused(by))
        raise ConfigError(
            f"objective=recall: prompts are {divisor} times as long as the model was trained for, and baseline={name} cannot keep "
            f"1/{divisor} of its budget in whole chunks (but 1/n for n = {fits}); choose another task.length_tok= or baseline="
        )


def _held(layers: dict[int, judged.Stages], outside: dict[int, list[float]]) -> float:
    """A head with nothing outside misses nothing."""
    pairs = [pair for i, stages in layers.items() for pair in zip(stages[-1]["missing"], outside[i], strict=True)]
    return round(statistics.fmean(1 - missing / max(left, NOTHING) for missing, left in pairs), 5)


def clearly_less(ours: Sequence[float], theirs: Sequence[float], margin: float) -> bool:
    """Whether we hold less than they by ``margin`` at least, and by more than two standard errors of the difference over blocks."""
    gaps = [b - a for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    return statistics.fmean(gaps) >= margin and statistics.fmean(gaps) > 2 * error
