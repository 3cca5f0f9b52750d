"""Plain-text tables: aligned for a terminal, or as Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MISSING = "–"


def show(value: object, digits: int = 1) -> str:
    """A cell as text: numbers rounded, those that rounding would hide to two figures, None as a dash."""
    if value is None:
        return MISSING
    if isinstance(value, float) and 0 < abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def width(text: str) -> int:
    """Columns that ``text`` takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A table for a terminal; the first ``left`` columns are flush left, the others flush right."""
    cells = [list(header), *([show(cell) for cell in row] for row in rows)]
    widths = [max(width(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = []
        for i, cell in enumerate(row):
            blank = " " * (widths[i] - width(cell))
            padded.append(cell + blank if i < left else blank + cell)
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * n for n in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """The same table as Markdown."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [header, rule, *([show(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_text(score: float, interval: Sequence[float] | None) -> str:
    """A score with its 95 % interval in brackets, where it has one."""
    return f"{score:.1f}" + (f" ({interval[0]:.0f} to {interval[1]:.0f})" if interval else "")


def duration(seconds: float) -> str:
    """A time span in the unit one would say it in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d"
