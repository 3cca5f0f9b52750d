"""The page of a published table: each cell beside ours, the orderings, and what differs; as text, as HTML with CSV, and as a picture."""

from __future__ import annotations

import hashlib
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hipexp.report.export import csv_text
from hipexp.report.page import page as html
from hipexp.report.parts import Cell, Chart, Mark, Section, Table
from hipexp.report.tables import MISSING, text_table
from hipexp.repro.data import FULL, Published, Row, Size
from hipexp.repro.orderings import ELSEWHERE, FAILS, HOLDS, NOT_RUN, OPEN, Verdict
from hipexp.repro.points import Line, by_model, lines
from hipexp.repro.values import Key, Value
from hipexp.run.ledger import make_folder, write_text

WORDS = (HOLDS, OPEN, FAILS, NOT_RUN, ELSEWHERE)
EMBEDDED = (
    "a small embedded model trained to retrieve, not a language model of 7B to 14B; its scores say how a method behaves, not how well "
    "such a model does"
)
JUDGED = (
    f"{HOLDS} / {FAILS}: by samples (of one text their mean), so many better than worse pairs happen by chance once in twenty times at "
    f"most (sign test; a permutation test where prompts differ); times: all medians by the factor; counts: exactly. {OPEN}: neither."
)


@dataclass(frozen=True)
class Page:
    """What is known of a table at a size: numbers of ours, verdicts, words on models and machines, and the overrides it was made with.

    ``embedded``: the model is the one that hipexp brings.
    """

    table: Published
    size_name: str
    size: Size
    values: Mapping[Key, Value]
    verdicts: Sequence[Verdict]
    notes: Sequence[str] = field(default=())
    overrides: Sequence[str] = field(default=())
    embedded: bool = False

    @property
    def name(self) -> str:
        """Of its files: pages of other overrides are other files."""
        return file_name(self.table.id, self.size_name, self.overrides)

    @property
    def compared(self) -> bool:
        """Whether values are set against the published ones: at full size, with the model, data and samples that the table names."""
        return self.size_name == FULL and not self.own

    @property
    def own(self) -> list[str]:
        """The overrides that make something else of the published runs."""
        return [word for word in self.overrides if not word.lstrip("+").startswith("track")]

    def counts(self) -> dict[str, int]:
        """How many orderings have each verdict."""
        return {word: sum(verdict.word == word for verdict in self.verdicts) for word in WORDS}


def file_name(name: str, size: str, overrides: Sequence[str]) -> str:
    """The name of a page's files: id, size, and eight digits of the overrides, in whatever order they were given."""
    mark = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]
    return f"{name}_{size}" + f"_{mark}" * bool(overrides)


def command_of(name: str, size: str, overrides: Sequence[str]) -> str:
    """The command that makes a page."""
    return shlex.join(["python", "-m", "hipexp", "repro", name, f"size={size}", *overrides])


def cell_table(page: Page) -> Table:
    """A row for each published number that has one of ours beside it."""
    table, size = page.table, page.size
    beside = lines(table, size)
    split, models = by_model(table, size), list(dict.fromkeys(row.model for row in table.rows))
    quoted = ["published"] if split or models == [""] else [f"published: {model}" for model in models]
    runs = list(size.runs)
    header = [
        *(["model"] if split else []),
        "row",
        "column",
        *quoted,
        *(f"hipexp {run}".strip() for run in runs),
        *(["verdict"] if page.compared else []),
    ]
    rows: list[list[str | int | float | None]] = []
    for line, published in beside.items():
        for number, column in enumerate(table.columns):
            mine = [page.values.get((line, run, column)) for run in runs]
            if not any(mine):
                continue
            theirs = [published[0]] if split or models == [""] else [_of(published, model) for model in models]
            shown = [None if row is None else row.published[number] for row in theirs]
            verdicts = [verdict_of(table, line, column, shown[0], mine)] if page.compared else []
            rows.append([*([line[0]] if split else []), labelled(line), column, *map(plain, shown), *map(value_text, mine), *verdicts])
    return Table(
        f"{page.name}_cells", f"{table.title}: {table.unit}; in brackets the 95 % interval of our samples", header, rows, folded=False
    )


def _of(published: Sequence[Row], model: str) -> Row | None:
    return next((row for row in published if row.model == model), None)


def labelled(line: Line) -> str:
    """A row's name, with what its numbers are."""
    return f"{line[1]}, {line[2]}" if line[2] and line[2] != line[1] else line[1]


def plain(published: Any) -> str:
    """A published number as it is printed."""
    return MISSING if published is None else f"{published:g}" if isinstance(published, int | float) else str(published)


def value_text(value: Value | None) -> str:
    """A number of ours, of scores with the interval."""
    if value is None:
        return MISSING
    digits = f"{value.number:.1f}" if abs(value.number) >= 10 else f"{value.number:.3g}"
    return digits + (f" ({value.interval[0]:.0f} to {value.interval[1]:.0f})" if value.interval else "")


def verdict_of(table: Published, line: Line, column: str, published: Any, mine: Sequence[Value | None]) -> str:
    """Whether ours, of several runs their mean, is as near to the published number as the table asks for."""
    numbers = [value.number for value in mine if value is not None]
    if len(numbers) != len(mine) or not isinstance(published, int | float):
        return "not compared"
    allowed = next((table.tolerance[key] for key in (column, line[2], "all") if key in table.tolerance), {})
    off = statistics.fmean(numbers) - published
    if "points" in allowed:
        return f"{'within' if abs(off) <= allowed['points'] else 'outside'} ±{allowed['points']:g}: {off:+.1f}"
    if "percent" in allowed and published:
        percent = 100 * off / published
        return f"{'within' if abs(percent) <= allowed['percent'] else 'outside'} ±{allowed['percent']:g} %: {percent:+.0f} %"
    return "not compared"


def ordering_table(page: Page) -> Table:
    """Every ordering with its verdict."""
    header = ["verdict", "ordering", "published", "here"]
    rows = [
        [verdict.word, (f"{verdict.model}: " if verdict.model else "") + verdict.claim.says, verdict.claim.source, verdict.because]
        for verdict in page.verdicts
    ]
    return Table(f"{page.name}_orderings", "Orderings of the paper, and whether they are found here", header, rows, folded=False)


def published_table(table: Published) -> Table:
    """The table as published, whole."""
    extra = [name for name in ("model", "window", "metric") if any(getattr(row, name) for row in table.rows)]
    shown = [row for row in table.rows if any(value is not None for value in row.published)]
    rows = [[row.name, *(getattr(row, name) for name in extra), *map(plain, row.published)] for row in shown]
    caption = f"{table.title}, as published ({table.source})"
    return Table(f"{table.id}_published", caption, ["row", *extra, *table.columns], rows, folded=False)


def differences(page: Page) -> list[tuple[str, str]]:
    """What differs, line by line, each with what it is about."""
    table, compared = page.table, page.compared
    found = [("runs here", f"{page.size.says}.")]
    why = f"with {' '.join(page.own)}" if page.size_name == FULL else "at this size"
    found += [] if compared else [("values", f"NOT compared {why}; the orderings are.")]
    found += [("tolerance", f"{table.tolerance_because}.")] if compared and table.tolerance_because else []
    found += [("protocol", line) for line in table.protocol]
    found += [("not comparable", f"model: {EMBEDDED}")] if page.embedded else []
    found += [("not comparable", line) for line in table.not_comparable]
    return [*found, *(("made with", line) for line in (command_of(table.id, page.size_name, page.overrides), *page.notes))]


def text(page: Page) -> str:
    """The page for a terminal."""
    cells, table = cell_table(page), page.table
    parts = [f"{table.title} ({table.source})\n{table.about}", text_table(cells.header, cells.rows, left=len(cells.header))]
    if page.verdicts:
        parts += [text_table(*_narrow(ordering_table(page)), left=4), JUDGED, counted(page.counts())]
    return "\n\n".join([*parts, "\n".join(f"- {about}: {line}" for about, line in differences(page))])


def _narrow(table: Table) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
    """Verdict, ordering and what it rests on; the published numbers are on the page."""
    keep = (0, 1, 3)
    return [table.header[i] for i in keep], [[row[i] for i in keep] for row in table.rows]


def counted(counts: Mapping[str, int]) -> str:
    """Verdicts in a line."""
    return "orderings: " + ", ".join(f"{number} {word}" for word, number in counts.items() if number)


def charts(page: Page) -> list[Chart]:
    """The published lines, and ours, where a table is a figure."""
    table, picture = page.table, page.table.picture
    if picture is None:
        return []
    published: dict[str, list[Mark]] = {}
    for row in table.rows:
        name = ", ".join(filter(None, (row.model, row.name, row.metric)))
        if not row.metric or row.metric == table.rows[0].metric:
            marks = [Mark(x, float(y), "published") for x, y in zip(picture.x, row.published, strict=True) if isinstance(y, int | float)]
            published |= {name: marks} if marks else {}
    measured: dict[str, list[Mark]] = {}
    for (line, _, column), value in page.values.items():
        if page.size_name == FULL:
            x = picture.x[table.columns.index(column)]
        elif column in picture.ours:
            x = picture.ours[column]
        else:
            continue
        measured.setdefault(", ".join(filter(None, line)), []).append(
            Mark(x, value.number, f"{len(value.samples)} samples", value.interval)
        )
    axis = picture.axis if page.size_name == FULL else "multiples of the trained length"
    parts = [("published", "as published", picture.axis, published), ("ours", f"hipexp, {page.size_name}", axis, measured)]
    return [
        Chart(f"{page.name}_{name}", f"{table.title}: {words}", "lines", (along, "score"), series, _marks(page, name, series), {}, top=100)
        for name, words, along, series in parts
        if series
    ]


def _marks(page: Page, name: str, series: Mapping[str, Sequence[Mark]]) -> Table:
    rows: list[list[Cell]] = [[line, mark.x, mark.y, mark.words] for line, marks in series.items() for mark in marks]
    return Table(f"{page.name}_{name}_numbers", "the numbers of the picture", ["line", "x", "score", "of"], rows)


def write(page: Page, root: Path) -> Path:
    """Write the page as text, HTML and CSV, and its pictures, under ``root``; returns the HTML file."""
    from hipexp.report.figures import draw_chart

    make_folder(root)
    drawn = charts(page)
    tables = [cell_table(page), *([ordering_table(page)] if page.verdicts else [])]
    listed = Table(f"{page.name}_differs", "What differs from the published setting", ["about", "what"], differences(page), folded=False)
    sections = [
        Section("cells", page.table.title, f"{page.table.about} {page.size.says}.", drawn, tables[:1]),
        *([Section("orderings", "Orderings", f"{counted(page.counts())}. {JUDGED}", (), tables[1:])] if page.verdicts else []),
        Section("differs", "What differs", "Read this before comparing numbers.", (), [listed]),
        Section("published", "As published", page.table.unit, (), [published_table(page.table)]),
    ]
    made = command_of(page.table.id, page.size_name, page.overrides)
    about = f"{made}; {page.table.source}. Written {time.strftime('%Y-%m-%d %H:%M %Z')}."
    path = root / f"{page.name}.html"
    write_text(path, html(sections, page.table.title, about, root))
    write_text(root / f"{page.name}.txt", text(page) + "\n")
    for one in (*tables, published_table(page.table)):
        write_text(root / f"{one.name}.csv", csv_text(one))
    for chart in drawn:
        draw_chart(root / f"{chart.name}.png", chart, ("png", "svg"))
    return path
