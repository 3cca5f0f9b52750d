"""The search of ``tune``: draw a point, refuse it as cheaply as can be, ask the model few prompts, and more where it is worth it.

Points come in batches, of which every point passes

1. the checks of the configuration, which cost nothing; so do counted bytes, and points that were drawn before;
2. recall on recorded attention, about a second: a point that clearly holds less than another (of the same positions in the final
   attention) is dropped if that reads no more, where reading is what counts, or answered nothing. When the batch is full, it is looked at
   again, beside the others of the batch;
3. the model, ``task.samples`` prompts of each subtask. Points that no other beats by then are asked ``MORE`` times as many other ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hipexp.config.check import check_experiment, check_layers
from hipexp.config.model import ModelFacts
from hipexp.config.schema import ConfigError, Experiment, Pipeline
from hipexp.report.tables import duration
from hipexp.run.allocation import rules, yaml_of
from hipexp.run.ledger import make_folder, read_rows, write_text
from hipexp.run.methods_table import decode_bytes
from hipexp.tune.launch import Launch, Prompts
from hipexp.tune.objectives import Objective, dominates, front
from hipexp.tune.recall import Recorded, clearly_less
from hipexp.tune.space import Space
from hipexp.tune.study import FOUND, Point, Study, picker

MARGIN = 0.02  # of recall, by which a point has to hold less to be dropped
MORE = 2  # times as many prompts for points that no other beats
RUNGS = (1, MORE)
AGAIN = 50  # points in a row that were drawn before: there are no others
WAIT_S = 1.0  # between looks at what other processes do


@dataclass(frozen=True)
class Aim:
    """What is searched for: ``experiment`` with prompts of ``n_tok`` tokens.

    ``max_bytes``: the most that a decode step may read; None has no limit.
    """

    experiment: Experiment
    words: tuple[str, ...]
    objectives: tuple[Objective, ...]
    space: Space
    facts: ModelFacts
    heads: int
    n_tok: int
    max_bytes: float | None

    @property
    def divisor(self) -> int:
        """How many times the trained length prompts have."""
        return max(1, -(-self.n_tok // self.facts.trained_tok))

    @property
    def asks(self) -> bool:
        """Whether something is wanted that only the model's answers tell."""
        return any(one.needs == "model" for one in self.objectives)

    @property
    def hears(self) -> bool:
        """Whether recall counts: where scores do, it tells which points are hopeless."""
        return any(one.name in ("score", "recall") for one in self.objectives)

    def prompts(self, rung: int) -> Prompts:
        """The prompts of a rung; no prompt is in two of them."""
        experiment = self.experiment
        return Prompts(experiment, self.words, RUNGS[rung] * experiment.task.samples, experiment.seed + rung)

    def bytes_of(self, pipeline: Pipeline | None) -> tuple[float, float]:
        """Bytes attended to, and all that are read, in a mean decode step."""
        return decode_bytes(pipeline, self.facts, self.heads, self.n_tok)


@dataclass
class Search:
    """A search in progress; ``until`` (of ``time.monotonic``) there must be time left for ``reserve_s``."""

    aim: Aim
    study: Study
    launch: Launch
    recorded: Recorded
    name: str
    limit: int
    batch: int
    until: float
    reserve_s: Callable[[], float] = lambda: 0.0
    _again: int = field(default=0, init=False)

    def run(self) -> None:
        """Draw and measure until there are ``limit`` points, no others, or no time; then wait for those of other processes."""
        half = (time.monotonic() + self.until - self.reserve_s()) / 2
        while not self.over():
            batch = list[tuple[object, Point]]()
            while len(batch) < self.batch and not self.over() and not (batch and self._urgent(half)):
                whole = any(point.asked for _, point in batch)  # a batch that was left: nobody joins it
                trial = self.study.next(0 if whole else self.limit)
                if trial is None:
                    break
                if (point := self.considered(trial)) is not None:
                    batch.append((trial, point))
            self.measure(self.kept(batch))
            if not batch and self.study.in_work() == 0:
                return
            if not batch and not self.over():
                time.sleep(WAIT_S)  # what other processes work on may be left to this one

    def over(self) -> bool:
        """Whether the time is up, or the space is exhausted."""
        return self._again >= AGAIN or time.monotonic() + self.reserve_s() >= self.until

    def _urgent(self, half: float) -> bool:
        """Whether half of the time went without a point measured: then those that there are come first."""
        return time.monotonic() >= half and not any(point.kind == "measured" for point in self.study.points())

    def considered(self, trial: object) -> Point | None:
        """A point of which the model has to be asked, or None: the others are decided here, and told."""
        if (begun := self.study.begun(trial)).asked:
            return begun
        pipeline = self.aim.space.draw(picker(trial), self.aim.divisor)
        point = Point(begun.number, pipeline)
        told = self._refused(point)
        if told is None and not self.aim.asks:
            told = "measured", ""
        if told is not None:
            point.kind, point.why = told
            self.study.tell(trial, point)
            if point.kind == "measured":
                self.tell_progress(point)
            return None
        self.study.note(trial, point)
        return point

    def _refused(self, point: Point) -> tuple[str, str] | None:
        """Why a point is not to be measured, cheapest reasons first: its kind and the words. Fills in what is found out on the way."""
        pipeline, aim = point.pipeline, self.aim
        assert pipeline is not None
        try:
            check_experiment(made := dataclasses.replace(aim.experiment, pipeline=pipeline))
            check_layers(made, aim.facts)
        except ConfigError as error:
            return "invalid", str(error)
        point.rules = _name(rules(pipeline, aim.facts.layers))
        known = [other for other in self.study.points() if other.number < point.number or other.kind]
        same = next((other for other in known if other.rules == point.rules and other.number != point.number), None)
        self._again = self._again + 1 if same else 0
        if same is not None:
            for name in FOUND:
                setattr(point, name, getattr(same, name))
            return "repeated", f"the same as point {same.number}"
        point.attended_bytes, point.bytes = aim.bytes_of(pipeline)
        if aim.max_bytes is not None and point.bytes > aim.max_bytes:
            return "bytes", f"a decode step reads {point.bytes / 1e6:.3f} MB, more than {aim.max_bytes / 1e6:.3f}"
        if not aim.hears:
            return None
        try:
            point.recall = self.recorded.of(pipeline)
        except ConfigError as error:
            return "invalid", str(error)
        return hopeless(point, known, aim.objectives)

    def kept(self, batch: Sequence[tuple[object, Point]]) -> list[tuple[object, Point]]:
        """Those of a batch that are not hopeless beside all that are known by now; the others are told."""
        known, left = self.study.points(), list[tuple[object, Point]]()
        for trial, point in batch:
            others = [other for other in known if other.number != point.number]
            told = hopeless(point, others, self.aim.objectives) if self.aim.hears and not point.asked else None
            if told is None:
                left.append((trial, point))
            else:
                point.kind, point.why = told
                self.study.tell(trial, point)
        for trial, point in left:
            point.asked = True
            self.study.note(trial, point)
        return left

    def measure(self, batch: Sequence[tuple[object, Point]]) -> None:
        """Ask the model, rung by rung, and tell what came out, in the order in which points were drawn; leave those that are late."""
        late = {point.number for point in self.ask([point for _, point in batch], 0)}
        for trial, point in batch:
            if point.number in late:
                self.study.leave(trial)
        batch = [(trial, point) for trial, point in batch if point.number not in late]
        known = [point for point in self.study.points() if point.kind == "measured"]
        whole = [point for _, point in batch if point.kind is None]
        self.ask(self._worth(whole, [*known, *whole]), 1)
        for trial, point in batch:
            if point.kind is None and not point.is_known(self.aim.objectives):
                point.kind, point.why = "failed", "its answers were too short to be timed"
            point.kind = point.kind or "measured"
            self.study.tell(trial, point)
            self.tell_progress(point)

    def ask(self, points: Sequence[Point], rung: int) -> Sequence[Point]:
        """Ask the prompts of a rung; a point whose run fails is decided by that. Returns those for whose first ones no time was left."""
        size = self.launch.at_once or len(points) or 1
        for begin in range(0, len(points), size):
            some = points[begin : begin + size]
            if rung == 0 and self.over():
                return points[begin:]
            found = self.launch.run(self.aim.prompts(rung), dict(map(self.write, some)))
            for point in some:
                told = found[str(self.file(point))]
                if isinstance(told, str):
                    point.kind, point.why = "failed", told
                else:
                    take(point, rung, told)
        return []

    def _worth(self, points: Sequence[Point], among: Sequence[Point]) -> list[Point]:
        values = [point.values(self.aim.objectives) for point in among if point.is_known(self.aim.objectives)]
        points = [point for point in points if point.is_known(self.aim.objectives)]
        return [p for p in points if not any(dominates(v, p.values(self.aim.objectives), self.aim.objectives) for v in values)]

    def write(self, point: Point) -> tuple[str, Pipeline]:
        """Write a point as a file that can be run; returns it and what it holds."""
        assert point.pipeline is not None
        make_folder(self.file(point).parent)
        write_text(self.file(point), yaml_of(point.pipeline, [f"point {point.number} of {self.name}"]))
        return str(self.file(point)), point.pipeline

    def file(self, point: Point) -> Path:
        """Where that is."""
        return self.study.folder / "trials" / f"{self.name}_t{point.number:04d}.yaml"

    def best(self) -> list[Point]:
        """The front, every point of it asked all prompts: who falls behind then makes room for others."""
        points = [point for point in self.study.points() if point.kind == "measured"]
        while True:
            found = [points[i] for i in front([point.values(self.aim.objectives) for point in points], self.aim.objectives)]
            short = [point for point in found if self.aim.asks and len(point.scores) < len(RUNGS)]
            if not short:
                return found
            for rung in range(1, len(RUNGS)):
                self.ask([point for point in short if str(rung) not in point.scores], rung)
            points = [point for point in points if point.kind == "measured"]

    def tell_progress(self, point: Point) -> None:
        """A line on a point: how many there are, what it has, how long the search still goes."""
        points = self.study.points()
        measured = sum(other.kind == "measured" for other in points)
        left = max(0.0, self.until - time.monotonic())
        shown = [f"{one.header} {one.show(point.value(one.name))}" for one in self.aim.objectives]
        told = ", ".join(shown) if point.kind == "measured" else f"{point.kind}: {point.why}"
        to_stderr(f"{len(points)} drawn, {measured} measured, {duration(left)} left at most; point {point.number}: {told}")


def hopeless(point: Point, known: Sequence[Point], objectives: Sequence[Objective]) -> tuple[str, str] | None:
    """Whether what is known of others says that a point is not worth asking the model about, by its recall; the kind and the words.

    Others count that see the same positions in the final attention, which recall does not tell. That one of them costs no more is known
    where all costs are counted; times are not.
    """
    assert point.pipeline is not None
    mine, costs = statistics.fmean(point.recall), [one for one in objectives if one.name not in ("score", "recall")]
    counted = costs and all(one.needs == "count" for one in costs)
    for other in known:
        same = other.pipeline is not None and other.pipeline.rope.attend is point.pipeline.rope.attend
        if not same or not other.recall or not clearly_less(point.recall, other.recall, MARGIN):
            continue
        held = f"recall {mine:.3f}, and point {other.number} has {statistics.fmean(other.recall):.3f}"
        pairs = [(point.value(one.name), other.value(one.name), one) for one in costs] if counted else []
        if pairs and not any(a is None or b is None or one.better(a, b) for a, b, one in pairs):
            return "recall", f"{held} and reads no more"
        if other.kind == "measured" and other.value("score") == 0:
            return "recall", f"{held} and answered nothing"
    return None


def take(point: Point, rung: int, folder: Path) -> None:
    """What a run says of a point."""
    rows = sorted(read_rows(folder), key=lambda row: (row["subtask"], row["sample"]))
    point.scores[str(rung)] = [row["score"] for row in rows]
    point.decode_ms[str(rung)] = [row["decode_ms"] for row in rows if row["decode_ms"] is not None]
    point.prefill_ms[str(rung)] = [row["prefill_ms"] for row in rows]


def _name(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def to_stderr(text: str) -> None:
    """Progress, beside what is printed as the result."""
    print(text, file=sys.stderr, flush=True)
