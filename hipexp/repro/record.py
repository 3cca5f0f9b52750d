"""``python -m hipexp.repro.record docs`` (``make reproduced``): every table and figure of the paper at needle size as one page of Markdown.

What is stored is written, as ``repro all size=needle stored=true`` shows it; nothing is run. Times that were measured with other sources
than these count as not there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from hipexp.config.schema import ConfigError
from hipexp.report.parts import Table
from hipexp.report.tables import markdown_table
from hipexp.repro import settings
from hipexp.repro.command import Asked, make_stand_ins, page_of
from hipexp.repro.data import NEEDLE, Published, known, read
from hipexp.repro.page import JUDGED, cell_table, counted, differences, ordering_table
from hipexp.repro.points import cells, points_of
from hipexp.run.ledger import write_text

HEAD = f"""# The paper's tables and figures at needle size

[All pages](README.md)

Written by `make reproduced` from the runs of `make repro-all SIZE=needle`. [Reproduce](reproduce.md) says what is run, how an ordering is
judged, and sums up what was seen. The embedded model is small and was trained to retrieve: its values are **not** compared with the
published ones, the order of the methods is.

{JUDGED}"""


def text() -> str:
    """The page. Raises ``ConfigError`` where no run is there."""
    sections = {name: list(section(read(name))) for name in known()}
    if not any(parts for name, parts in sections.items() if not read(name).settings):
        raise ConfigError("no run of a table is there; run: make repro-all SIZE=needle")
    return "\n\n".join([HEAD, *(part for parts in sections.values() for part in parts)]) + "\n"


def section(table: Published) -> Iterator[str]:
    """Orderings, numbers and differences of a table; nothing where none of its runs is there."""
    if table.settings:
        yield from (f"## {table.title}", table.about, plain(settings.compared(table)))
        return
    asked, found = Asked([table.id], NEEDLE, [], 1, stored=True), cells(table, NEEDLE, [])
    make_stand_ins(points_of(found))
    page = page_of(table, asked, found)
    if not page.values:
        return
    yield from (f"## {table.title}", table.about)
    if page.verdicts:
        yield from (f"{counted(page.counts())[0].upper()}{counted(page.counts())[1:]}.", plain(ordering_table(page)))
    yield plain(cell_table(page))
    yield "\n".join(f"* {about}: {line}" for about, line in differences(page))


def plain(table: Table) -> str:
    """A table as Markdown."""
    rows = [[cell.replace("|", "\\|") if isinstance(cell, str) else cell for cell in row] for row in table.rows]
    return markdown_table(table.header, rows, left=len(table.header))


def main(argv: list[str]) -> int:
    """Write ``reproduced.md`` into the folder ``argv`` names."""
    if len(argv) != 1 or not (Path(argv[0]) / "reproduce.md").is_file():
        raise ConfigError("record takes the folder of the documentation, as in `python -m hipexp.repro.record docs`")
    path = Path(argv[0]) / "reproduced.md"
    write_text(path, text())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
