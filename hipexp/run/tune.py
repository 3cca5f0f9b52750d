"""``python -m hipexp tune``: search for pipelines that no other beats, from nothing, and hand them over as files that run.

What is searched is a file (``space=``, ``conf/tune/default.yaml``), what for are objectives. Stopped or killed, the same command goes on;
the same command elsewhere, with the same runs folder, shares the work.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hipexp.config.compose import compose
from hipexp.config.convert import to_plain
from hipexp.config.model import model_folder, read_facts
from hipexp.config.overrides import is_hydra
from hipexp.config.schema import ConfigError, Experiment
from hipexp.report.tables import duration, text_table
from hipexp.run.identity import model_revision
from hipexp.run.ledger import locked, make_folder, read_json, runs_root, stoppable, write_json, write_text
from hipexp.run.point import check_point
from hipexp.run.several import load_once, model_line, split_jobs, trained_length
from hipexp.run.tune_launch import Launch, Prompts
from hipexp.run.tune_objectives import dominates, read_objectives
from hipexp.run.tune_recall import Recorded
from hipexp.run.tune_report import Result, as_data, counts, picture, reasons, table, verdicts, write_pipelines
from hipexp.run.tune_search import MORE, RUNGS, Aim, Search, take, to_stderr
from hipexp.run.tune_space import read_space
from hipexp.run.tune_study import RANDOM_FIRST, SAMPLERS, Point, Study, open_study, optuna
from hipexp.suites import filled, rules_of, subtasks_of

VERSION = 1  # raise it when the same words search otherwise
USAGE = "tune task=infbench objective=[score,bytes] [key=value …] [max_bytes=3stage] [trials=1000] [hours=1] [space=FILE] [--dry-run]"
DEFAULTS = {
    "objective": "[score,bytes]", "trials": "1000", "hours": "1", "name": "", "space": "", "baseline": "3stage", "max_bytes": "",
    "held_out": "20", "checked": "5", "sampler": "tpe", "batch": "",
}  # fmt: skip
FLAGS = ("--dry-run", "--quiet", "--json")
SAMPLES = 4  # prompts of each subtask that every point is asked
HELD_OUT_SEED = 1000  # added to the seed: prompts that the search has not seen
MADE = ("infbench", "passkey", "ruler")  # tasks whose prompts a seed makes


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    aim: Aim
    own: dict[str, str]
    hydra: tuple[str, ...]
    jobs: int
    flags: frozenset[str]
    base: Experiment
    name: str
    command: str

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return runs_root() / "tune" / self.name

    def number(self, name: str) -> int:
        """A whole number of the command's own words."""
        return int(self.own[name])

    @property
    def identity(self) -> dict[str, str]:
        """What makes two calls the same search, in words; how long and by whom does not."""
        aim = self.aim
        said = {
            "prompts": shlex.join(aim.words), "samples": str(aim.experiment.task.samples), "seed": str(aim.experiment.seed),
            "model": f"{aim.experiment.model.path} {model_revision(aim.experiment.model)}",
            "objective": ",".join(one.name for one in aim.objectives), "sampler": self.own["sampler"],
            "max_bytes": str(aim.max_bytes), "space": json.dumps(asdict(aim.space)), "version": str(VERSION),
        }  # fmt: skip
        return said


def read_words(argv: Sequence[str]) -> Order:
    """The order of a command line, checked. Raises ``ConfigError``."""
    jobs, words = split_jobs([word for word in argv if word not in FLAGS])
    if stray := [word for word in words if word.startswith("--") and "=" not in word]:
        raise ConfigError(f"tune takes no {stray[0]}: {USAGE}")
    own = DEFAULTS | {word.split("=")[0]: word.split("=", 1)[1] for word in words if word.split("=")[0] in DEFAULTS}
    hydra = tuple(word for word in words if is_hydra(word))
    words = [word for word in words if word.split("=")[0] not in DEFAULTS and word not in hydra]
    _check_words(words, own)
    base = _baseline(own["baseline"], words)
    experiment = compose([*words, *_samples(words)])
    task, objectives = experiment.task, tuple(read_objectives(own["objective"]))
    if task.name not in MADE or rules_of(task, None):
        raise ConfigError(f"task={task.name} has one set of prompts, and tune needs others to check by; use task={' or '.join(MADE)}, in own words")
    trained_tok = trained_length(experiment.model)
    folder, facts = model_folder(experiment.model), read_facts(experiment.model)
    assert facts is not None and folder is not None and base.pipeline is not None, "refused by trained_length"
    full = filled(task, trained_tok)
    n_tok = min(max([full.length_tok or 0, *(full.lengths_tok or [])]), task.truncate_tok or 2**31)
    heads = read_json(folder / "config.json")["num_attention_heads"]
    kept = tuple(word for word in words if _key(word) not in ("task.samples", "seed"))
    space = read_space(Path(own["space"]).expanduser() if own["space"] else None)
    aim = Aim(experiment, kept, objectives, space, facts, heads, n_tok, None)
    aim = Aim(experiment, kept, objectives, space, facts, heads, n_tok, _most(own["max_bytes"], aim, words))
    check_point(base)
    draft = Order(aim, own, hydra, jobs, frozenset(argv) & set(FLAGS), base, "", shlex.join(["python", "-m", "hipexp", "tune", *argv]))
    digest = hashlib.sha256(json.dumps(draft.identity).encode()).hexdigest()[:6]
    name = own["name"] or re.sub(r"[^\w-]+", "-", f"{experiment.model.name}_{'_'.join([task.name, *(task.subtasks or [])[:1]])}_{digest}")
    return Order(aim, own, hydra, jobs, draft.flags, base, name, draft.command)


def _check_words(words: Sequence[str], own: dict[str, str]) -> None:
    for word in words:
        if _key(word).split(".")[0] in ("pipeline", "track"):
            raise ConfigError(f"{word} cannot be said in `tune`, which chooses pipelines itself and tracks nothing; leave it out")
    for name, least in (("trials", 1), ("held_out", 2), ("checked", 1), *([("batch", 1)] if own["batch"] else [])):
        if not own[name].isascii() or not own[name].isdecimal() or int(own[name]) < least:
            raise ConfigError(f"{name}={own[name]} must be a whole number from {least}; try {name}={DEFAULTS[name] or 4}")
    try:
        hours = float(own["hours"])
    except ValueError:
        hours = 0.0
    if not 0 < hours < 10_000:
        raise ConfigError(f"hours={own['hours']} must be a number of hours above 0, as in hours=0.5")
    if own["sampler"] not in SAMPLERS:
        raise ConfigError(f"sampler={own['sampler']} is unknown; use {' or '.join(SAMPLERS)}")
    if own["name"] and not re.fullmatch(r"[A-Za-z][\w-]*", own["name"], re.ASCII):
        raise ConfigError(f"name={own['name']} must be a letter and then letters, digits, '_' and '-': files are called so")


def _key(word: str) -> str:
    return word.lstrip("+~-").split("=")[0]


def _samples(words: Sequence[str]) -> list[str]:
    return [] if any(_key(word) == "task.samples" for word in words) else [f"task.samples={SAMPLES}"]


def _baseline(name: str, words: Sequence[str]) -> Experiment:
    return compose([f"+pipeline={name}", *words, *_samples(words)])


def _most(text: str, aim: Aim, words: Sequence[str]) -> float | None:
    """``max_bytes``: a number, the name of a pipeline that reads as many, or nothing."""
    if not text:
        return None
    try:
        most = float(text)
    except ValueError:
        pipeline = _baseline(text, words).pipeline
        assert pipeline is not None, "composed with one"
        return aim.bytes_of(pipeline)[1]
    if not most > 0:
        raise ConfigError(f"max_bytes={text} must be a number above 0, or the name of a pipeline that reads as many, as in max_bytes=3stage")
    return most


def tell_plan(order: Order) -> None:
    """Print what would be searched and how; loads no model."""
    aim, task = order.aim, order.aim.experiment.task
    subtasks = len(subtasks_of(task)) if task.name != "passkey" else len(filled(task, aim.facts.trained_tok).depths or [1])
    print(text_table(["parameter", "values"], aim.space.lines(), left=2))
    most = "" if aim.max_bytes is None else f", at most {aim.max_bytes / 1e6:.3f} MB"
    assert order.base.pipeline is not None
    print(
        f"some {aim.space.size:.1e} pipelines; {order.own['sampler']} draws {order.own['trials']} points at most, "
        f"the first {RANDOM_FIRST} at random, in {order.own['hours']} h at most\n"
        f"objectives: {', '.join(f'{one.name} ({one.direction}, {one.needs})' for one in aim.objectives)}\n"
        f"a decode step behind {aim.n_tok} tokens: {order.base.pipeline.name} reads {aim.bytes_of(order.base.pipeline)[1] / 1e6:.3f} MB{most}"
    )
    if aim.hears:
        print(f"first recall on recorded attention at {aim.facts.trained_tok} tokens, with 1/{aim.divisor} of the budgets")
    if aim.asks:
        samples = task.samples
        print(
            f"then the model: {samples} prompts of each of {subtasks} subtask(s) for every point that is left, {MORE * samples} more for one "
            f"that no other beats\nin the end up to {order.own['checked']} of the front and {order.base.pipeline.name} answer "
            f"{order.own['held_out']} other prompts each"
        )
    print(order.folder)


def main(argv: list[str]) -> int:
    """Search, check what was found, and write it; ``--dry-run`` tells the space and the plan. Returns 0, or 1 where nothing was found."""
    order = read_words(argv)
    if "--dry-run" in order.flags:
        tell_plan(order)
        return 0
    optuna()
    begun = time.monotonic()
    with stoppable():
        _claim(order)
        with open_study(order.folder, order.aim.objectives, order.own["sampler"], order.aim.experiment.seed) as study:
            return search(order, study, begun)


def _claim(order: Order) -> None:
    """Take the folder, or refuse one of another search. Raises ``ConfigError``."""
    make_folder(order.folder)
    with locked(order.folder / ".lock"):
        before = read_json(order.folder / "study.json").get("search", {})
        differing = [name for name, value in order.identity.items() if before and before.get(name) != value]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"name={order.name} is another search, by its {name}: {str(before.get(name))[:80]}, not {order.identity[name][:80]}; choose another name"
            )
        write_json(order.folder / "study.json", {"search": order.identity, "command": order.command})


def search(order: Order, study: Study, begun: float) -> int:
    """The whole of it, in a study that is open."""
    aim, loud = order.aim, "--quiet" not in order.flags
    say = to_stderr if loud else _quiet
    load = load_once()
    launch = Launch(order.hydra, order.jobs, order.folder, load, loud)
    recorded = Recorded(aim.experiment, order.folder / "activations", load, aim.facts.trained_tok, aim.divisor)
    base, final = Point(-1, order.base.pipeline), Final(order, launch)
    assert base.pipeline is not None
    base.attended_bytes, base.bytes = aim.bytes_of(base.pipeline)
    base.recall = recorded.of(base.pipeline) if aim.hears else []
    batch = int(order.own["batch"] or (2 * order.jobs if order.jobs > 1 else 8 if order.hydra else 1))
    until = begun + 3600 * float(order.own["hours"])
    if aim.asks:
        final.ask(base, order.own["baseline"], aim.prompts(0), 0)
    going = Search(aim, study, launch, recorded, order.name, order.number("trials"), batch, until, say)
    going.reserve_s = lambda: final.expected_s(base, study.points())
    say(f"{order.folder}: {len(study.points())} points so far; {counts(study.points())}" if study.points() else f"{order.folder}: a new search")
    going.run()
    best = sorted(going.best(), key=lambda point: point.values(aim.objectives)[0], reverse=aim.objectives[0].more)
    if not best:
        print(f"nothing was measured in {duration(time.monotonic() - begun)}: {counts(study.points())}; give it more hours= or trials=")
        return 1
    results = final.check(base, best)
    points = study.points()
    named = write_pipelines(order.folder, order.name, results[1:], results[0], final.held_out.own if aim.asks else aim.prompts(0).own, order.command)
    results = [results[0], *named]
    drawn = picture(order.folder / "front.png", aim, points, results)
    text = report(order, points, results)
    write_text(order.folder / "table.txt", text + "\n")
    write_json(order.folder / "result.json", as_data(aim, points, results, order.folder))
    if "--json" in order.flags:
        print(json.dumps(as_data(aim, points, results, order.folder), ensure_ascii=False))
    elif loud:
        print(text)
        print(f"pipelines: {order.folder / 'pipelines'}\ntable:     {order.folder / 'table.txt'}")
        if drawn:
            print(f"picture:   {order.folder / 'front.png'}")
    if "--json" not in order.flags:
        print(order.folder)
    return 0


def _quiet(text: str) -> None:
    pass


def report(order: Order, points: Sequence[Point], results: Sequence[Result]) -> str:
    """Everything there is to say in the end."""
    aim = order.aim
    head = f"{model_line(aim.experiment.model)}; {aim.experiment.task.name}, prompts of {aim.n_tok} tokens; bytes: of a mean decode step"
    first = next((result for result in results[1:] if result.file is not None), None)
    run = [] if first is None else [shlex.join(["python", "-m", "hipexp", f"+pipeline={first.file}", *Final(order, None).held_out.own])]
    parts = [head, "\n".join([counts(points), *reasons(points)]), table(aim, results), "\n".join(verdicts(aim, results)), *run]
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Final:
    """The last check: the best points and the baseline, on prompts that chose neither."""

    order: Order
    launch: Launch | None

    @property
    def held_out(self) -> Prompts:
        """Prompts that the search has not seen."""
        aim = self.order.aim
        return Prompts(aim.words, self.order.number("held_out"), aim.experiment.seed + HELD_OUT_SEED)

    def ask(self, point: Point, pipeline: str, prompts: Prompts, rung: int) -> None:
        """Ask prompts of a pipeline by name or file. Raises ``ConfigError`` where its run fails."""
        assert self.launch is not None
        told = self.launch.run(prompts, [pipeline])[pipeline]
        if isinstance(told, str):
            raise ConfigError(f"{pipeline} cannot be compared with, its run failed: {told}")
        take(point, rung, told)

    def chosen(self, base: Point, best: Sequence[Point]) -> list[Point]:
        """The points that are checked: those that beat the baseline so far first, then in order."""
        objectives, most = self.order.aim.objectives, self.order.number("checked")
        theirs = base.values(objectives)
        return sorted(best, key=lambda point: not dominates(point.values(objectives), theirs, objectives))[:most]

    def check(self, base: Point, best: Sequence[Point]) -> list[Result]:
        """The baseline and the front, with what they answer to other prompts."""
        aim, baseline = self.order.aim, self.order.own["baseline"]
        if not aim.asks:
            return [Result(baseline, None, base, None), *(Result(f"t{point.number:04d}", point, point, None) for point in best)]
        assert self.launch is not None
        for rung in range(1, len(RUNGS)):
            self.ask(base, baseline, aim.prompts(rung), rung)
        chosen = self.chosen(base, best)
        files = {point.number: str(self.order.folder / "trials" / f"{self.order.name}_t{point.number:04d}.yaml") for point in chosen}
        other = Point(-1, base.pipeline, bytes=base.bytes, attended_bytes=base.attended_bytes)
        told = self.launch.run(self.held_out, [*files.values(), baseline])
        if isinstance(told[baseline], Path):
            take(other, 0, told[baseline])  # type: ignore[arg-type]
        results = [Result(baseline, None, base, other)]
        for point in best:
            found, place = Point(point.number, point.pipeline, bytes=point.bytes, attended_bytes=point.attended_bytes), None
            place = told.get(files.get(point.number, ""))
            if isinstance(place, Path):
                take(found, 0, place)
            results.append(Result(f"t{point.number:04d}", point, point, found if isinstance(place, Path) else None))
        return results

    def expected_s(self, base: Point, points: Sequence[Point]) -> float:
        """What the last check will take, by what prompts took so far."""
        aim = self.order.aim
        measured = [point for point in points if point.kind == "measured"]
        if not aim.asks or not measured:
            return 0.0
        best = sorted(measured, key=lambda point: point.values(aim.objectives)[0], reverse=aim.objectives[0].more)[: self.order.number("checked")]
        subtasks = len(base.scores["0"]) / max(1, aim.experiment.task.samples)
        each = [sum(ms) / len(ms) / 1e3 for point in best for ms in [[x for rung in point.prefill_ms.values() for x in rung]]]
        theirs = sum(base.prefill_ms["0"]) / len(base.prefill_ms["0"]) / 1e3
        prompts = self.order.number("held_out") * subtasks
        return SLACK * (sum(each) * prompts + theirs * (prompts + RUNGS[1] * len(base.scores["0"]))) / self.order.jobs


SLACK = 1.15  # of a prompt's time over its prefill: decode steps, and making it
