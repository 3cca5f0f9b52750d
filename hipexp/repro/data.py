"""Published tables and figures as data: ``conf/experiment/<id>.yaml``, one schema for all, checked when it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from hipexp.config.convert import to_schema, unknown
from hipexp.config.overrides import conf_dir
from hipexp.config.schema import ConfigError

DERIVED = ("mean", "relative", "below")
CLAIMS = ("scores", "times", "counts")
NEEDLE, FULL, QUICK = "needle", "full", "quick"


@dataclass
class Row:
    """A published row: ``published`` has a number for each column, None for a blank, or a word that stands there.

    ``model``   its published name; empty where a table has one model only
    ``method``  which of the methods is run beside it; None: quoted only
    ``metric``  what its numbers are, where that is not the same in all rows
    ``window``  the published budget, for people
    ``words``   overrides of this row at full size
    """

    name: str
    published: list[Any | None]
    model: str = ""
    method: str | None = None
    metric: str = ""
    window: str = ""
    words: list[str] = field(default_factory=list)


@dataclass
class Method:
    """Overrides that choose an attention; ``dense``: the times that are read are those of dense attention beside it."""

    words: list[str] = field(default_factory=list)
    dense: bool = False


@dataclass
class Size:
    """What is run: every method under ``words`` and each of ``runs``, and what is read for a column or metric.

    ``columns``  overrides that are due for a column; where there are some, other columns are quoted only
    ``reads``    by column, by metric, or ``all``: what stands beside a published number (see ``hipexp.repro.values``)
    ``methods``  overrides that a method needs at this size besides
    ``says``     what stands in for what, in words
    ``beside``   where one model stands beside all published ones: the one whose own orderings are judged too
    ``minutes``  forecast on two processor cores, all runs
    """

    words: list[str]
    reads: dict[str, list[str]]
    says: str
    runs: dict[str, list[str]] = field(default_factory=lambda: {"": []})
    columns: dict[str, list[str]] = field(default_factory=dict)
    methods: dict[str, list[str]] = field(default_factory=dict)
    minutes: float | None = None
    beside: str = ""


@dataclass
class Cells:
    """Cells that an ordering speaks of: of a row, all columns unless some are named, and all runs.

    ``over``: two columns, of which the second is divided by the first.
    """

    row: str
    columns: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    metric: str = ""


@dataclass
class Claim:
    """An ordering of the paper: ``more`` lies above ``less``; ``source`` quotes the numbers that say so.

    ``kind``    ``scores`` (judged by samples), ``times`` (medians, by a ``factor``) or ``counts`` (exact)
    ``models``  the published models that it is about, where these are not all
    """

    says: str
    source: str
    more: Cells
    less: Cells
    kind: str = "scores"
    factor: float = 1.0
    models: list[str] = field(default_factory=list)


@dataclass
class Picture:
    """Lines over the columns: ``x`` has the place of each published one, ``ours`` the multiple of the trained length of those run here."""

    axis: str
    x: list[float]
    ours: dict[str, float]


@dataclass
class Setting:
    """A printed hyperparameter: ``key`` of a preset, and its value in the paper."""

    name: str
    preset: str
    key: str
    value: Any


@dataclass
class Published:
    """A published table or figure.

    ``tolerance``  by metric or ``all``: how far a number of the full size may be off, in ``points`` or ``percent``
    ``derived``    columns that are computed of others: ``mean`` of columns, ``relative`` to the best row by groups, ``below`` a row
    ``settings``   hyperparameters, for a table of these
    """

    title: str
    source: str
    unit: str
    about: str
    id: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    orderings: list[Claim] = field(default_factory=list)
    tolerance: dict[str, dict[str, float]] = field(default_factory=dict)
    tolerance_because: str = ""
    derived: dict[str, dict[str, Any]] = field(default_factory=dict)
    protocol: list[str] = field(default_factory=list)
    not_comparable: list[str] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    picture: Picture | None = None
    data_of: str = ""


def known() -> list[str]:
    """The ids there are, tables first, in the order of their numbers."""

    def place(name: str) -> tuple[int, int, str]:
        found = re.match(r"(table|figure)(\d+)", name)
        return (2, 0, name) if found is None else (["table", "figure"].index(found[1]), int(found[2]), name)

    return sorted((path.stem for path in (conf_dir() / "experiment").glob("*.yaml")), key=place)


def read(name: str) -> Published:
    """A published table by its id. Raises ``ConfigError`` for an unknown one, and for a file that is none, with what is wrong in it."""
    if name not in known():
        raise unknown(f"repro {name}", name, known())
    path = conf_dir() / "experiment" / f"{name}.yaml"
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({error}); mend it, or take the one of hipexp") from error
    if plain.get("data_of"):  # another view of the numbers of a table
        other = read(plain["data_of"])
        mine = to_schema(plain, Published)
        made = replace(other, **{key: getattr(mine, key) for key in plain}, id=name)
    else:
        made = replace(to_schema(plain, Published), id=name)
    wrong = list(mistakes(made))
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")
    return made


def mistakes(table: Published) -> Iterator[str]:
    """What contradicts itself in a table, in words."""
    for row in table.rows:
        if len(row.published) != len(table.columns):
            yield f"row {row.model} {row.name} {row.metric} has {len(row.published)} numbers under {len(table.columns)} columns"
        if row.method is not None and row.method not in table.methods:
            yield f"row {row.name}: method {row.method} is not among methods"
        if row.model and row.model not in table.models:
            yield f"row {row.name}: model {row.model} is not among models"
    for name, size in table.sizes.items():
        for column in (*size.columns, *(key for key in size.reads if key not in metrics_of(table) and key != "all")):
            if column not in table.columns:
                yield f"sizes.{name}: {column} is no column and no metric"
        if size.beside and size.beside not in table.models:
            yield f"sizes.{name}: beside={size.beside} is not among models"
        for method in size.methods:
            if method not in table.methods:
                yield f"sizes.{name}: {method} is no method"
    for column, how in table.derived.items():
        if column not in table.columns or len(how) != 1 or next(iter(how)) not in DERIVED:
            yield f"derived.{column} must be a column with one of {', '.join(DERIVED)}"
    for claim in table.orderings:
        if claim.kind not in CLAIMS:
            yield f"ordering {claim.says!r}: kind={claim.kind} must be one of {', '.join(CLAIMS)}"
        for model in claim.models:
            if model not in table.models:
                yield f"ordering {claim.says!r}: {model} is not among models"
        for cells in (claim.more, claim.less):
            if not any(row.name == cells.row and row.metric == (cells.metric or row.metric) for row in table.rows):
                yield f"ordering {claim.says!r}: there is no row {cells.row} {cells.metric}"
            for column in (*cells.columns, *cells.over):
                if column not in table.columns:
                    yield f"ordering {claim.says!r}: {column} is no column"
    if table.picture and len(table.picture.x) != len(table.columns):
        yield f"picture.x has {len(table.picture.x)} places for {len(table.columns)} columns"


def metrics_of(table: Published) -> set[str]:
    """The metrics that rows name."""
    return {row.metric for row in table.rows if row.metric}
