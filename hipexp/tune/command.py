"""``python -m hipexp tune``: search for pipelines that no other beats, from nothing, and hand them over as files that run.

What is searched is a file (``space=``, ``conf/tune/default.yaml``), what for are objectives. Stopped or killed, the same command goes on;
the same command elsewhere, with the same runs folder, shares the work.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

from hipexp.config.compose import compose, compose_point
from hipexp.config.model import model_folder, read_config, read_facts
from hipexp.config.overrides import is_hydra
from hipexp.config.schema import ConfigError, Experiment
from hipexp.output import DRY, QUIET, Flags, answer, split_flags
from hipexp.report.tables import duration, text_table
from hipexp.run.identity import model_revision
from hipexp.run.ledger import RunFailed, locked, make_folder, read_json, runs_root, stoppable, write_json, write_text
from hipexp.run.point import check_point
from hipexp.run.several import load_once, model_line, split_jobs, trained_length
from hipexp.suites import filled, rules_of, subtasks_of
from hipexp.tune.final import SEED, Final, Result
from hipexp.tune.launch import Launch, Prompts
from hipexp.tune.objectives import OBJECTIVES, read_objectives
from hipexp.tune.recall import Recorded, check_recall
from hipexp.tune.report import as_data, counts, picture, reasons, table, verdicts, write_pipelines
from hipexp.tune.search import MORE, Aim, Search, to_stderr
from hipexp.tune.space import read_space
from hipexp.tune.study import MOVE, RANDOM_FIRST, SAMPLERS, Point, Study, open_study, optuna

VERSION = 2  # raise it when the same words search otherwise
DEFAULTS = {
    "objective": "[score,bytes]", "trials": "1000", "hours": "1", "name": "", "space": "", "baseline": "3stage", "max_bytes": "",
    "held_out": "20", "checked": "5", "sampler": "tpe", "batch": "16",
}  # fmt: skip
SAMPLES = 4  # prompts of each subtask that every point is asked
MADE = ("infbench", "passkey", "ruler")  # tasks whose prompts a seed makes


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    aim: Aim
    own: dict[str, str]
    hydra: tuple[str, ...]
    jobs: int
    flags: Flags
    base: Experiment
    name: str
    command: str

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return runs_root() / "tune" / self.name

    @property
    def held_out(self) -> Prompts:
        """Prompts that the search does not see."""
        return Prompts(self.aim.experiment, self.aim.words, int(self.own["held_out"]), self.aim.experiment.seed + SEED)

    @property
    def identity(self) -> dict[str, str]:
        """What makes two calls the same search, in words; how long and by whom does not."""
        aim = self.aim
        return {
            "prompts": shlex.join(aim.words), "samples": str(aim.experiment.task.samples), "seed": str(aim.experiment.seed),
            "model": f"{aim.experiment.model.path} {model_revision(aim.experiment.model)}",
            "objective": ",".join(one.name for one in aim.objectives), "sampler": self.own["sampler"],
            "max_bytes": str(aim.max_bytes), "space": json.dumps(asdict(aim.space)), "version": str(VERSION),
        }  # fmt: skip


def read_words(argv: Sequence[str]) -> Order:
    """The order of a command line, checked. Raises ``ConfigError``."""
    flags, words = split_flags(argv)
    jobs, words = split_jobs(words)
    _check_once(words)
    own = DEFAULTS | {word.split("=")[0]: word.split("=", 1)[1] for word in words if word.split("=")[0] in DEFAULTS}
    hydra = tuple(word for word in words if is_hydra(word))
    words = [word for word in words if word.split("=")[0] not in DEFAULTS and word not in hydra]
    _check_words(words, own)
    if hydra:
        compose_point(hydra)  # refuses a launcher that is not there
    base = experiment = _baseline(own["baseline"], words)
    task, objectives = experiment.task, tuple(read_objectives(own["objective"]))
    if task.name not in MADE or rules_of(task, None):
        raise ConfigError(
            f"tune needs prompts to search by and others to check by, which task={task.name} cannot make in these words; "
            f"use task={' or '.join(MADE)}, in own words"
        )
    trained_tok = trained_length(experiment.model)
    folder, facts = model_folder(experiment.model), read_facts(experiment.model)
    assert facts is not None and folder is not None, "refused by trained_length"
    full = filled(task, trained_tok)
    n_tok = min(max([full.length_tok or 0, *(full.lengths_tok or [])]), task.truncate_tok or 2**31)
    config = read_config(folder / "config.json", experiment.model)
    heads = config.get("text_config", config)["num_attention_heads"]
    kept = tuple(word for word in words if _key(word) not in ("task.samples", "seed"))
    space = read_space(Path(own["space"]).expanduser() if own["space"] else None)
    aim = Aim(experiment, kept, objectives, space, facts, heads, n_tok, None)
    aim = Aim(experiment, kept, objectives, space, facts, heads, n_tok, _most(own["max_bytes"], aim, words))
    check_point(base)
    if OBJECTIVES["recall"] in objectives:
        check_recall(own["baseline"], base, aim.divisor)
    draft = Order(aim, own, hydra, jobs, flags, base, "", shlex.join(["python", "-m", "hipexp", "tune", *argv]))
    digest = hashlib.sha256(json.dumps(draft.identity).encode()).hexdigest()[:6]
    name = own["name"] or re.sub(r"[^\w-]+", "-", f"{experiment.model.name}_{'_'.join([task.name, *(task.subtasks or [])[:1]])}_{digest}")
    return Order(aim, own, hydra, jobs, flags, base, name, draft.command)


def _check_words(words: Sequence[str], own: dict[str, str]) -> None:
    for word in words:
        if _key(word).split(".")[0] in ("pipeline", "track"):
            raise ConfigError(f"{word} cannot be said in `tune`, which chooses pipelines itself and tracks nothing; leave it out")
    for name, least in (("trials", 1), ("held_out", 2), ("checked", 1), ("batch", 1)):
        if not own[name].isascii() or not own[name].isdecimal() or int(own[name]) < least:
            raise ConfigError(f"{name}={own[name]} must be a whole number from {least}; try {name}={DEFAULTS[name]}")
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


def _check_once(words: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for word in words:
        if (name := _key(word)) in seen:
            raise ConfigError(f"{name}= is said twice, in {seen[name]} and {word}; leave one of them out")
        seen[name] = word


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
        return aim.bytes_of(_baseline(text, words).pipeline)[1]
    if not 0 < most < math.inf:
        raise ConfigError(
            f"max_bytes={text} must be a number above 0, or the name of a pipeline that reads as many, as in max_bytes=3stage"
        )
    ends = min(min(aim.space.sink_tok) + min(aim.space.window_tok), aim.n_tok)
    least = 2 * aim.facts.layers * aim.facts.kv_heads * ends * aim.facts.head_dim * aim.facts.itemsize
    if most <= least:
        raise ConfigError(
            f"max_bytes={text} is a number of bytes, and the smallest sinks and window alone are {least / 1e6:.3f} MB, {least:.2e} bytes; "
            "say more, as in max_bytes=20e6 or max_bytes=3stage"
        )
    return most


def plan_text(order: Order) -> str:
    """What would be searched and how; loads no model."""
    aim, own, task, base = order.aim, order.own, order.aim.experiment.task, order.own["baseline"]
    most = "" if aim.max_bytes is None else f"; at most {aim.max_bytes / 1e6:.3f} MB"
    lines = [
        text_table(["parameter", "values"], aim.space.lines(), left=2),
        f"some {aim.space.size:.1e} pipelines, of which {own['sampler']} draws {own['trials']} in {own['hours']} h, at most; "
        f"the first {RANDOM_FIRST} at random",
        f"objectives: {', '.join(f'{one.name} ({one.direction}, {one.needs})' for one in aim.objectives)}",
        f"a decode step behind {aim.n_tok} tokens: {base} reads {aim.bytes_of(order.base.pipeline)[1] / 1e6:.3f} MB{most}",
    ]
    if aim.hears:
        lines.append(f"first: recall on recorded attention at {aim.facts.trained_tok} tokens, with 1/{aim.divisor} of the budgets")
    if aim.asks:
        cells = len(filled(task, aim.facts.trained_tok).depths or subtasks_of(task)) * len(task.lengths_tok or [1])
        lines += [
            f"then: {cells * task.samples} prompts for a point that is left, {cells * MORE * task.samples} more for one that none beats",
            f"in the end: {cells * int(own['held_out'])} other prompts for {base} and each of up to {own['checked']} of the front",
        ]
    return "\n".join([*lines, str(order.folder)])


def main(argv: list[str]) -> int:
    """Search, check what was found, and write it; ``--dry-run`` tells the space and the plan. Raises ``ConfigError`` and ``RunFailed``."""
    order = read_words(argv)
    if DRY in order.flags:
        plan = order.identity | {"folder": str(order.folder), "pipelines": order.aim.space.size}
        answer(order.flags, plan_text(order), plan, str(order.folder))
        return 0
    optuna()
    begun = time.monotonic()
    with stoppable():
        _claim(order)
        with open_study(order.folder, order.aim.objectives, order.own["sampler"], order.aim.experiment.seed) as study:
            with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere if QUIET in order.flags else sys.stderr):
                return search(order, study, begun)


def _claim(order: Order) -> None:
    """Take the folder, or refuse one of another search. Raises ``ConfigError``."""
    make_folder(order.folder)
    with locked(order.folder / ".lock"):
        before = read_json(order.folder / "study.json").get("search", {})
        if not isinstance(before, dict):
            raise ConfigError(f"{order.folder / 'study.json'} is damaged; {MOVE}")
        differing = [name for name, value in order.identity.items() if before and before.get(name) != value]
        if differing:
            was, asked = (f"{str(told.get(differing[0]))[:80]}" for told in (before, order.identity))
            raise ConfigError(f"name={order.name} is another search ({differing[0]} was {was}, not {asked}); choose another name")
        write_json(order.folder / "study.json", {"search": order.identity, "command": order.command})


def search(order: Order, study: Study, begun: float) -> int:
    """The whole of it, in a study that is open."""
    aim, own, load = order.aim, order.own, load_once()
    launch = Launch(order.hydra, order.jobs, order.folder, load)
    recorded, others = (
        Recorded(aim.experiment, order.folder / "activations", load, aim.facts.trained_tok, aim.divisor, n) for n in (0, SEED)
    )
    until = begun + 3600 * float(own["hours"])
    going = Search(aim, study, launch, recorded, order.name, int(own["trials"]), int(own["batch"]), until)
    final = Final(aim, launch, others, own["baseline"], order.held_out, int(own["checked"]), going.file)
    base = Point(-1, order.base.pipeline)
    base.attended_bytes, base.bytes = aim.bytes_of(base.pipeline)
    if OBJECTIVES["recall"] in aim.objectives and base.pipeline is not None:
        base.recall = recorded.of(base.pipeline)
    to_stderr(f"{order.folder}: {counts(study.points())}" if study.points() else f"{order.folder}: a new search")
    if aim.asks:
        final.ask(base, 0)
        check_hours(order, final.expected_s(base, study.points()), study.points())
    going.reserve_s = lambda: final.expected_s(base, study.points())
    going.run()
    best = sorted(going.best(), key=lambda point: point.values(aim.objectives)[0], reverse=aim.objectives[0].more)
    if not best:
        raise RunFailed(
            f"nothing was measured in {duration(time.monotonic() - begun)} ({counts(study.points())}); give it more hours= or trials="
        )
    points = study.points()
    return hand_over(order, points, final.check(base, best, [point for point in points if point.kind == "measured"]))


def check_hours(order: Order, last_s: float, points: Sequence[Point]) -> None:
    """Tell how long the last check will take. Raises ``RunFailed`` where it leaves no time to measure anything before it."""
    to_stderr(f"the last check should take {duration(last_s)}, which is kept back of hours={order.own['hours']}")
    if last_s >= 3600 * float(order.own["hours"]) and not any(point.kind == "measured" for point in points):
        raise RunFailed(
            f"the last check alone should take {duration(last_s)}, and hours={order.own['hours']} leaves nothing for a search; "
            f"say hours={math.ceil(last_s / 1800) / 2 + 0.5:g} or more, or fewer prompts: held_out=, checked=, task.subtasks="
        )


def hand_over(order: Order, points: Sequence[Point], results: Sequence[Result]) -> int:
    """Write and print what was found."""
    aim, folder = order.aim, order.folder
    results = [results[0], *write_pipelines(folder, order.name, results, order.held_out.own, order.command)]
    drawn, told = picture(folder / "front.png", aim, points, results), as_data(aim, points, results, folder)
    text = report(order, points, results)
    write_text(folder / "table.txt", text + "\n")
    write_json(folder / "result.json", told)
    picture_line = f"picture:   {folder / 'front.png'}" if drawn else "no picture: there is one objective"
    places = [f"pipelines: {folder / 'pipelines'}", f"table:     {folder / 'table.txt'}", picture_line, str(folder)]
    answer(order.flags, "\n".join([text, *places]), told, str(folder))
    return 0


def report(order: Order, points: Sequence[Point], results: Sequence[Result]) -> str:
    """Everything there is to say in the end."""
    aim = order.aim
    head = f"{model_line(aim.experiment.model)}; {aim.experiment.task.name}, prompts of {aim.n_tok} tokens; bytes: of a mean decode step"
    run = shlex.join(["python", "-m", "hipexp", f"+pipeline={results[1].file}", *order.held_out.own])
    return "\n\n".join([head, "\n".join([counts(points), *reasons(points)]), table(aim, results), "\n".join(verdicts(aim, results)), run])
