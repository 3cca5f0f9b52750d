"""The last check of ``tune``: what was found and the baseline, on prompts that chose neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hipexp.run.ledger import RunFailed
from hipexp.tune.launch import Launch, Prompts
from hipexp.tune.objectives import OBJECTIVES, Objective, dominates, front
from hipexp.tune.recall import Recorded
from hipexp.tune.search import RUNGS, Aim, take
from hipexp.tune.study import Point

SEED = 1000  # added to that of the search: prompts that it has not seen
SLACK = 1.15  # of a prompt's time over that of its prefill: decode steps, and making it


@dataclass(frozen=True)
class Result:
    """A point of the front, or the baseline, with its values on the prompts of the search, and on others if it was asked them.

    ``file``: the pipeline, as it is handed over. ``why``: the run on the others failed, and how.
    """

    name: str
    searched: Point
    checked: Point | None = None
    file: Path | None = None
    why: str = ""

    def known(self, objective: Objective) -> float | None:
        """The value that counts: what was counted, or what other prompts than the search's said; None where they were not asked."""
        if objective.needs == "count":
            return self.searched.value(objective.name)
        return None if self.checked is None else self.checked.value(objective.name)


@dataclass(frozen=True)
class Final:
    """``prompts`` are those of the check, ``recorded`` is of others of the same kind.

    ``most`` points are asked; ``file`` gives that of a point.
    """

    aim: Aim
    launch: Launch
    recorded: Recorded
    baseline: str
    prompts: Prompts
    most: int
    file: Callable[[Point], Path]

    def ask(self, base: Point, rung: int) -> None:
        """Ask the baseline the prompts of a rung. Raises ``RunFailed`` if it cannot answer: there is nothing to compare with then."""
        told = self.launch.run(self.aim.prompts(rung), {self.baseline: base.pipeline})[self.baseline]
        take(base, rung, self._answered(told))

    def _answered(self, told: Path | str) -> Path:
        """The baseline's run. Raises ``RunFailed`` if it failed."""
        if isinstance(told, str):
            raise RunFailed(f"baseline={self.baseline} cannot be compared with, its run failed: {told}; mend that, or choose another")
        return told

    def chosen(self, base: Point, best: Sequence[Point], measured: Sequence[Point]) -> list[Point]:
        """Which points are asked: of those that beat the baseline so far, from that of most recall on; then the front in order.

        A few prompts answered alike do not make the one that reads less the better one: of points that beat the baseline also those
        stay that no other beats if more recall is better too. They are taken evenly, with that of most recall and that of least bytes.
        """
        objectives = self.aim.objectives
        rivals = [point for point in measured if dominates(point.values(objectives), base.values(objectives), objectives)]
        held = (OBJECTIVES["recall"],) if self.aim.hears and OBJECTIVES["recall"] not in objectives else ()
        kept = [rivals[i] for i in front([point.values([*objectives, *held]) for point in rivals], [*objectives, *held])]
        kept.sort(key=lambda point: (-(point.value("recall") or 0.0), point.bytes))
        last = max(1, self.most - 1)
        found = kept if len(kept) <= self.most else [kept[i * (len(kept) - 1) // last] for i in range(self.most)]
        return [*found, *(point for point in best if point not in found)][: self.most]

    def check(self, base: Point, best: Sequence[Point], measured: Sequence[Point]) -> list[Result]:
        """The baseline, the front, and what is asked besides; the baseline also what it was not yet of the search's prompts."""
        if self.aim.asks:
            for rung in range(1, len(RUNGS)):
                self.ask(base, rung)
        chosen = self.chosen(base, best, measured)
        heard = best if OBJECTIVES["recall"] in self.aim.objectives else ()  # that takes a second, so all of them
        others = {
            one.number: Point(one.number, one.pipeline, bytes=one.bytes, attended_bytes=one.attended_bytes)
            for one in (base, *chosen, *heard)
        }
        failed: dict[int, str] = {}
        if self.aim.asks:
            names = {base.number: self.baseline, **{point.number: str(self.file(point)) for point in chosen}}
            ran = self.launch.run(self.prompts, {name: others[n].pipeline for n, name in names.items()})
            take(others[base.number], 0, self._answered(ran[self.baseline]))
            for point in chosen:
                if isinstance(told := ran[names[point.number]], str):
                    failed[point.number] = told
                else:
                    take(others[point.number], 0, told)
        if heard:
            for other in others.values():
                assert other.pipeline is not None, "refused by check_recall"
                other.recall = self.recorded.of(other.pipeline)
        handed = sorted([*best, *(point for point in chosen if point not in best)], key=lambda point: point.bytes, reverse=True)
        return [
            Result(self.baseline, base, others[base.number]),
            *(Result(f"t{one.number:04d}", one, others.get(one.number), why=failed.get(one.number, "")) for one in handed),
        ]

    def expected_s(self, base: Point, points: Sequence[Point]) -> float:
        """How long the check will take, by what prompts took so far; as long as nothing is measured, by those of the baseline."""
        aim = self.aim
        if not aim.asks:
            return 0.0
        measured = [point for point in points if point.kind == "measured"]
        times = sorted((point.value("prefill_ms") or 0.0 for point in measured or [base] * self.most), reverse=True)[: self.most]
        theirs, known = base.value("prefill_ms") or 0.0, len(base.prefill_ms["0"])
        asked = self.prompts.samples * known / aim.experiment.task.samples
        left = RUNGS[1] * known if len(base.prefill_ms) == 1 else 0
        return SLACK * (asked * (sum(times) + theirs) + left * theirs) / 1e3 / self.launch.jobs
