"""The report as one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from hipexp.report.parts import Cell, Chart, HeatChart, Link, Section, Table
from hipexp.report.svg import draw, draw_heat, legend
from hipexp.report.tables import MISSING, show

TAGS = ("task", "model", "protocol")


def page(sections: Sequence[Section], title: str, about: str, folder: Path) -> str:
    """The text of the file; ``folder`` is where it will lie, which links to run folders start from. ``about`` is plain text.

    Where no table has tags there is nothing to filter by.
    """
    assets = files("hipexp.report") / "assets"
    style, script, frame = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html"))
    tags = [one for section in sections for table in section.tables for one in table.tags]
    nav = "".join(f'<li><a href="#{section.name}">{escape(section.title)}</a></li>' for section in sections)
    body = "".join(_section(section, folder) for section in sections)
    filters = "".join(_select(name, sorted({one[name] for one in tags})) for name in TAGS)
    told = {"title": escape(title), "about": escape(about), "first": sections[0].name, "hidden": "" if tags else " hidden"}
    return Template(frame).substitute(told, style=style, script=script, nav=nav, filters=filters, sections=body)


def _select(name: str, values: Sequence[str]) -> str:
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>'


def _section(section: Section, folder: Path) -> str:
    charts = "".join(_heat(chart, folder) if isinstance(chart, HeatChart) else _chart(chart, folder) for chart in section.charts)
    tables = "".join(_table(table, folder) for table in section.tables)
    missing = ""
    if section.missing:
        items = "".join(f"<li>{escape(what)}: <code>{escape(command)}</code></li>" for what, command in section.missing)
        many = len(section.missing)
        missing = f'<details class="missing"{" open" if many < 4 else ""}><summary>Missing ({many})</summary><ul>{items}</ul></details>'
    inside = f'<div class="charts">{charts}</div>{tables}{missing}'
    return f'<section id="{section.name}"><h2>{escape(section.title)}</h2><p>{escape(section.words)}</p>{inside}</section>'


def _chart(chart: Chart, folder: Path) -> str:
    return _figure(chart, draw(chart) + legend(chart), folder)


def _heat(chart: HeatChart, folder: Path) -> str:
    return _figure(chart, f'<div class="maps">{draw_heat(chart)}</div>', folder, wide=True)


def _figure(chart: Chart | HeatChart, drawn: str, folder: Path, wide: bool = False) -> str:
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    kind = ' class="wide"' if wide else ""
    caption = f"<figcaption>{escape(chart.title)}</figcaption>"
    return f"<figure{kind}{_data(chart.tags)}>{caption}{drawn}{note}{_table(chart.table, folder)}</figure>"


def _data(tags: dict[str, str]) -> str:
    return "".join(f' data-{name}="{escape(value)}"' for name, value in tags.items())


def _table(table: Table, folder: Path) -> str:
    head = "".join(f'<th scope="col" aria-sort="none"><button type="button">{escape(name)}</button></th>' for name in table.header)
    tags = list(table.tags) or [{}] * len(table.rows)
    rows = "".join(f"<tr{_data(own)}>{_cells(row, folder)}</tr>" for row, own in zip(table.rows, tags, strict=True))
    caption = f"<caption>{escape(table.caption)}</caption>"
    inside = f'<table id="table-{table.name}">{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    scroll = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.caption)}">{inside}</div>'
    count = f'<span class="count">{len(table.rows)} rows</span>'
    if not table.folded:
        return f'<p class="counted">{count}</p>{scroll}'
    what = escape(table.caption) if table.tags else "the numbers of this picture"
    return f"<details><summary>Table: {what} ({count})</summary>{scroll}</details>"


def _cells(row: Sequence[Cell], folder: Path) -> str:
    first, *others = row
    return f'<th scope="row">{_text(first, folder)}</th>' + "".join(_cell(cell, folder) for cell in others)


def _cell(cell: Cell, folder: Path) -> str:
    if isinstance(cell, int | float):
        return f'<td class="n" data-v="{cell:.10g}">{_text(cell, folder)}</td>'
    return f'<td class="n">{MISSING}</td>' if cell is None else f"<td>{_text(cell, folder)}</td>"


def _text(cell: Cell, folder: Path) -> str:
    if isinstance(cell, Link):
        end = "" if cell.path.endswith(".html") else "/"
        return f'<a href="{escape(os.path.relpath(cell.path, folder.resolve()))}{end}">{escape(cell.text)}</a>'
    return f"{cell:,}" if isinstance(cell, int) else escape(show(cell))
