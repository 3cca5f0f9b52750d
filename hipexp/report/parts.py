"""What a report is made of: sections of tables and charts, as data; pages and files are drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file; ``path`` is absolute."""

    text: str
    path: str


Cell = str | int | float | None | Link


@dataclass(frozen=True)
class Table:
    """Rows under a header; ``name`` is that of its files. ``tags`` holds, for each row, what the page filters by.

    Raises ``ValueError`` for a row that does not have a cell for each name in ``header``, and for tags that are not one for each row.
    """

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    tags: Sequence[dict[str, str]] = ()
    folded: bool = True

    def __post_init__(self) -> None:
        wrong = next((row for row in self.rows if len(row) != len(self.header)), None)
        if wrong is not None:
            raise ValueError(f"table {self.name}: a row has {len(wrong)} cells under {len(self.header)} names: {wrong}")
        if self.tags and len(self.tags) != len(self.rows):
            raise ValueError(f"table {self.name}: {len(self.tags)} tags for {len(self.rows)} rows")


@dataclass(frozen=True)
class Mark:
    """A point of a chart: ``words`` say what it rests on; ``span`` is its 95 % interval, if it has one."""

    x: float
    y: float
    words: str
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """Marks by series over two named axes. ``kind``: ``lines``, joined by x, or ``scatter``, with the Pareto front of small x and large y.

    ``scales``: ``log`` or ``linear`` for each axis; ``top``: where the vertical axis ends, if that is fixed (100 for scores).
    """

    name: str
    title: str
    kind: str
    axes: tuple[str, str]
    series: dict[str, list[Mark]]
    table: Table
    tags: dict[str, str]
    scales: tuple[str, str] = ("log", "linear")
    top: float | None = None
    note: str = ""


@dataclass(frozen=True)
class HeatChart:
    """Mean scores (0 to 100) and numbers of samples by depth and length, one map for each series."""

    name: str
    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    maps: dict[str, dict[tuple[str, str], tuple[float, int]]]
    table: Table
    tags: dict[str, str]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A chapter: ``missing`` pairs what is not there with the command that makes it."""

    name: str
    title: str
    words: str
    charts: Sequence[Chart | HeatChart] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[tuple[str, str]] = field(default=())


MOST_SERIES, MOST_CHARTS = 8, 12


def section(
    name: str, title: str, words: str, charts: Sequence[Chart | HeatChart], tables: Sequence[Table], few: tuple[str, str], found: bool
) -> Section:
    """A chapter with the first ``MOST_CHARTS`` charts; of the others the tables. ``few``: what is not there unless ``found``."""
    more = charts[MOST_CHARTS:]
    if more:
        words += f" {len(more)} more groups of runs are in tables only: narrow the folder with runs=<folder> to see them drawn."
    return Section(name, title, words, charts[:MOST_CHARTS], [*tables, *(chart.table for chart in more)], [] if found else [few])


def fewer(series: dict[str, list[Mark]]) -> tuple[dict[str, list[Mark]], str]:
    """At most ``MOST_SERIES`` of them, dense first, then the longest and highest; and a word on those that were left out."""
    order = sorted(series, key=lambda name: (name != "dense", -len(series[name]), -sum(mark.y for mark in series[name]), name))
    left = len(order) - MOST_SERIES
    return {name: series[name] for name in order[:MOST_SERIES]}, f"{left} more in the table, not drawn" if left > 0 else ""
