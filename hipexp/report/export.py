"""Tables as CSV and LaTeX, figures as PNG, SVG and PDF, beside the page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hipexp.report.figures import Axis, HeatMap, draw_chart, draw_heat_maps
from hipexp.report.parts import Cell, HeatChart, Link, Section, Table
from hipexp.report.tables import show
from hipexp.run.ledger import make_folder, write_text

FORMATS = ("png", "svg", "pdf")
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"}}
LATEX |= {"–": "--", "×": r"$\times$", "∞": r"$\infty$", "→": r"$\to$", "≤": r"$\leq$", "≥": r"$\geq$"}


def tables_of(sections: Sequence[Section]) -> Iterator[Table]:
    """Every table of the report, those of charts too."""
    for section in sections:
        yield from section.tables
        yield from (chart.table for chart in section.charts)


def export(sections: Sequence[Section], folder: Path) -> None:
    """Write all tables to ``folder/tables`` and all figures to ``folder/figures``; what an earlier report left there goes."""
    for name in ("tables", "figures"):
        make_folder(folder / name)
        for path in (folder / name).iterdir():
            if path.suffix in (".csv", ".tex", *(f".{kind}" for kind in FORMATS)):
                path.unlink()
    for table in tables_of(sections):
        write_text(folder / "tables" / f"{table.name}.csv", csv_text(table))
        write_text(folder / "tables" / f"{table.name}.tex", latex_text(table))
    for section in sections:
        for chart in section.charts:
            path = folder / "figures" / f"{chart.name}.png"
            if isinstance(chart, HeatChart):
                _draw_heat(path, chart)
            else:
                draw_chart(path, chart, FORMATS)


def csv_text(table: Table) -> str:
    """A table as CSV (RFC 4180): numbers in full, nothing for what is missing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(table.header))
    writer.writerows([[cell.text if isinstance(cell, Link) else cell for cell in row] for row in table.rows])
    return text.getvalue()


def latex_text(table: Table) -> str:
    """A table as a LaTeX ``tabular``; numbers rounded as on the page, columns of numbers flush right. Needs no package."""
    columns = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.header)
    kinds = "".join("r" if any(isinstance(cell, int | float) for cell in column) else "l" for column in columns)
    lines = [" & ".join(escape_latex(cell) for cell in row) + r" \\" for row in [list(table.header), *table.rows]]
    body = [rf"\begin{{tabular}}{{{kinds}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]
    return f"% {table.caption}\n" + "\n".join(body) + "\n"


def escape_latex(cell: Cell) -> str:
    """A cell as LaTeX text."""
    text = cell.text if isinstance(cell, Link) else show(cell)
    return re.sub(r"[\\~^&%$#_{}–×∞→≤≥]", lambda found: LATEX[found[0]], text)


def _draw_heat(path: Path, chart: HeatChart) -> None:
    maps = [HeatMap(name, {at: score for at, (score, _) in cells.items()}) for name, cells in chart.maps.items()]
    numbers = [n for cells in chart.maps.values() for _, n in cells.values()]
    note = f"samples a cell: {min(numbers)}" + (f" to {max(numbers)}" if max(numbers) > min(numbers) else "")
    draw_heat_maps(path, chart.title, maps, Axis("depth", chart.rows), Axis("context, tokens", chart.columns), note, FORMATS)
