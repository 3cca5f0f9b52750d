"""``python -m hipexp repro <id>``: a table or figure of the paper beside our numbers, each ordering judged; ``all``: every one of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.output import DRY, answer, aside, split_flags
from hipexp.report.page import page as html
from hipexp.report.parts import Cell, Link, Section, Table
from hipexp.report.tables import MISSING, duration, text_table
from hipexp.repro import settings
from hipexp.repro.data import FULL, NEEDLE, Published, known, read
from hipexp.repro.needs import plan_of, plan_text
from hipexp.repro.orderings import FAILS, judge_all
from hipexp.repro.page import Page, command_of, counted, file_name, text, write
from hipexp.repro.points import Cell as Ours
from hipexp.repro.points import cells, points_of, size_of, stand_ins
from hipexp.repro.values import values_of
from hipexp.run.ledger import classify, locked, make_folder, read_json, runs_root, write_text
from hipexp.run.point import Load, folder_of, stored
from hipexp.run.several import Named, helpers, load_once, model_line, refuse_own, run_all, split_jobs

STORED, ALL = "stored=true", "all"


@dataclass(frozen=True)
class Asked:
    """What a command line asks for: ids, size, overrides for every run, processes, and whether what is missing is run."""

    ids: list[str]
    size: str
    overrides: list[str]
    jobs: int
    stored: bool


@dataclass(frozen=True)
class Outcome:
    """What came out of a table: its page as text, where it is, in a few words how it ended, and whether nothing contradicts the paper."""

    id: str
    title: str
    path: Path | None
    told: str
    good: bool
    text: str = ""

    def plain(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"id": self.id, "title": self.title, "page": self.path and str(self.path), "outcome": self.told, "holds": self.good}


def main(argv: list[str]) -> int:
    """Run what is missing and show the page; resumable. Without an id: which there are. 1 where an ordering does not hold.

    ``--dry-run`` tells the runs and what they need; ``stored=true`` shows what is there and runs nothing.
    """
    flags, words = split_flags(argv)
    if not words:
        answer(flags, listing(), known(), "\n".join(known()))
        return 0
    asked = read_arguments(words)
    if DRY in flags:
        plans = [plan_of(read(name), asked.size, asked.overrides) for name in asked.ids]
        answer(flags, "\n\n".join(map(plan_text, plans)), plans, "")
        return 0
    load, outcomes = load_once(), list[Outcome]()
    for name in asked.ids:
        table = read(name)
        try:
            with aside(flags):
                outcomes.append(reproduce(table, asked, load))
                print(f"{outcomes[-1].text}\n\n{outcomes[-1].path}", flush=True)
        except Exception as error:
            if len(asked.ids) == 1:
                raise
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            outcomes.append(Outcome(name, table.title, None, f"{classify(error)}: {error}", False))
    path = outcomes[0].path if len(outcomes) == 1 else write_index(outcomes, asked)
    plain = [outcome.plain() for outcome in outcomes]
    told = ""
    if len(outcomes) > 1:
        told = text_table(["id", "title", "outcome"], [[one.id, one.title, one.told] for one in outcomes], left=3) + f"\n{path}"
    answer(flags, told, plain, str(path))
    return 0 if all(outcome.good for outcome in outcomes) else 1


def read_arguments(argv: list[str]) -> Asked:
    """The command line. Raises ``ConfigError`` for an unknown id or size, and for what a table varies itself."""
    jobs, words = split_jobs(argv)
    name, *rest = words or [""]
    if not name or "=" in name or name.startswith("-"):
        raise ConfigError(
            f"repro needs a table or figure first, or {ALL}, as in `python -m hipexp repro table2 size=needle`, not {name or 'nothing'}"
        )
    ids = known() if name == ALL else [read(name).id]
    flags = {word for word in rest if word == STORED}
    sizes = [word.removeprefix("size=") for word in rest if word.startswith("size=")]
    overrides = [word for word in rest if word not in flags and not word.startswith("size=")]
    refuse_own("repro", overrides, free=("task.samples", "task.data"))
    if len(sizes) > 1:
        raise ConfigError(f"repro {name}: size is given {len(sizes)} times ({', '.join(sizes)}); give one")
    size = (sizes or [FULL])[0]
    if (name == ALL or read(name).settings) and size not in (NEEDLE, FULL):
        raise ConfigError(f"repro {name}: size={size} must be {NEEDLE} or {FULL}")
    if name != ALL and not (table := read(name)).settings:
        size_of(table, size)
    if name == ALL:
        refuse_everywhere(size, overrides)
    return Asked(ids, size, overrides, jobs, bool(flags))


def refuse_everywhere(size: str, overrides: list[str]) -> None:
    """Raise ``ConfigError`` for overrides that no table can be run with; those that fit some are told table by table."""
    refused = None
    for table in map(read, known()):
        if not table.settings:
            try:
                cells(table, size, overrides)
                return
            except ConfigError as error:
                refused = refused or error
    if refused:
        raise refused


def reproduce(table: Published, asked: Asked, load: Load) -> Outcome:
    """Run a table and write its page."""
    root = runs_root() / "repro"
    if table.settings:
        told, path, good = settings.write(table, root)
        return Outcome(table.id, table.title, path, "all as printed" if good else "some differ from what is printed", good, told)
    found = cells(table, asked.size, asked.overrides)
    points = points_of(found)
    make_stand_ins(points)  # they are in the run keys, by which what is stored is found
    if not asked.stored:
        print(f"{table.id}: {table.title}, size={asked.size}, {left_of(points)} of {len(points)} runs left", flush=True)
        shared = [point for point in points if point.experiment.task.name != "latency"]
        with helpers(shared, asked.jobs, root):
            run_all(shared, load)
        run_all([point for point in points if point not in shared], load)  # what is timed runs alone
    page = page_of(table, asked, found)
    path = write(page, root)
    left, told = left_of(points), counted(page.counts()) if page.verdicts else "no ordering"
    told += f"; {left} of {len(points)} runs are missing" * bool(left)
    return Outcome(table.id, table.title, path, told, not page.counts()[FAILS], text(page))


def page_of(table: Published, asked: Asked, found: Sequence[Ours]) -> Page:
    """The page of what is stored of the cells."""
    size = size_of(table, asked.size)
    values, points = values_of(table, found), points_of(found)
    done = [point for point in points if stored(point.experiment)]
    notes = [] if len(done) == len(points) else [f"{len(points) - len(done)} of {len(points)} runs are not there yet"]
    models = [point for point in done if point.experiment.task.geometry is None]
    notes += dict.fromkeys(model_line(point.experiment.model) for point in models)
    notes += [f"ran on: {machine}" for machine in dict.fromkeys(point.machine() for point in done) if machine]
    dates = sorted({read_json(folder_of(point.experiment) / "status.json")["updated"][:10] for point in done})
    notes += [f"runs finished: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"] if dates else []
    samples = sorted({point.experiment.task.samples for point in done if point.experiment.task.name != "latency"})
    notes += [f"samples of each subtask: {' to '.join(map(str, dict.fromkeys((samples[0], samples[-1]))))}"] if samples else []
    embedded = any(of.model.name == NEEDLE for of in (point.experiment for point in points) if of.task.geometry is None)
    return Page(table, asked.size, size, values, judge_all(table, size, values, found), notes, asked.overrides, embedded)


def make_stand_ins(points: Sequence[Named]) -> None:
    """Make the texts that generated RULER samples are filled with, where a run reads them and they are not there."""
    folder = stand_ins()
    if not any(point.experiment.task.data == str(folder) for point in points):
        return
    from hipexp.suites.ruler.stand_ins import write_stand_ins

    make_folder(folder.parent)
    with locked(folder.with_name(".stand-ins.lock")):
        if not folder.is_dir():
            print(f"making stand-ins for RULER's texts in {folder}", flush=True)
            scratch = folder.with_name(".stand-ins")
            make_folder(scratch)
            write_stand_ins(scratch, 42)
            scratch.replace(folder)


def left_of(points: Sequence[Named]) -> int:
    """How many runs are not stored. For a model on a hub it asks the hub, as every run does."""
    return sum(not stored(point.experiment) for point in points)


def listing() -> str:
    """The ids with their titles, sizes, and how long they should take at needle size."""
    rows = []
    for name in known():
        table = read(name)
        needle = table.sizes.get(NEEDLE)
        minutes = duration(60 * needle.minutes) if needle and needle.minutes else MISSING
        rows.append([name, table.title, ", ".join(table.sizes) or "nothing is run", minutes])
    header = ["id", "title", "sizes", "needle, 2 cores (forecast)"]
    words = (
        "python -m hipexp repro <id> size=needle [jobs=2] [task.samples=1] [--dry-run]; without size: the real models and data; "
        "all instead of an id: every one"
    )
    return f"{text_table(header, rows, left=3)}\n{words}"


def write_index(outcomes: Sequence[Outcome], asked: Asked) -> Path:
    """The page that leads to all pages."""
    root = runs_root() / "repro"
    make_folder(root)
    rows: list[list[Cell]] = [[Link(one.id, str(one.path.resolve())) if one.path else one.id, one.title, one.told] for one in outcomes]
    table = Table("index", f"Tables and figures at size={asked.size}", ["id", "title", "outcome"], rows, folded=False)
    words = "Each page has every published number beside ours, the orderings with their verdicts, and what differs."
    path = root / f"{file_name('index', asked.size, asked.overrides)}.html"
    about = f"{command_of(ALL, asked.size, asked.overrides)}. Written {time.strftime('%Y-%m-%d %H:%M %Z')}."
    write_text(path, html([Section("index", "The paper's tables and figures", words, (), [table])], "Reproduction", about, root))
    return path
