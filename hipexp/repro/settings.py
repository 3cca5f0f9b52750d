"""Printed hyperparameters against our presets: nothing is run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hipexp.config.compose import compose
from hipexp.config.convert import to_plain
from hipexp.report.export import csv_text
from hipexp.report.page import page as html
from hipexp.report.parts import Section, Table
from hipexp.report.tables import text_table
from hipexp.repro.data import Published
from hipexp.run.ledger import make_folder, write_text

SAME, DIFFERS = "as printed", "differs"


def compared(table: Published) -> Table:
    """Every printed hyperparameter, the preset's, and whether they are the same."""
    presets = {name: to_plain(compose([f"+pipeline={name}"]).pipeline) for name in dict.fromkeys(one.preset for one in table.settings)}
    rows = []
    for one in table.settings:
        ours = value_at(presets[one.preset], one.key)
        rows.append([one.name, one.preset, one.key, str(one.value), str(ours), SAME if ours == one.value else DIFFERS])
    return Table(f"{table.id}_settings", table.title, ["what", "preset", "key", "printed", "preset has", "verdict"], rows, folded=False)


def value_at(plain: Any, key: str) -> Any:
    """The value of a dotted key; None where there is nothing."""
    for part in key.split("."):
        if isinstance(plain, list):
            plain = plain[int(part)] if int(part) < len(plain) else None
        else:
            plain = plain.get(part) if isinstance(plain, dict) else None
    return plain


def write(table: Published, root: Path) -> tuple[str, Path, bool]:
    """Text and HTML file of the comparison, and whether all is as printed."""
    make_folder(root)
    found = compared(table)
    words = [f"- protocol: {line}" for line in table.protocol]
    told = "\n\n".join([f"{table.title} ({table.source})\n{table.about}", text_table(found.header, found.rows, left=6), "\n".join(words)])
    listed = Table(f"{table.id}_differs", "What to know", ["about", "what"], [["protocol", line] for line in table.protocol], folded=False)
    sections = [Section("settings", table.title, table.about, (), [found, listed])]
    path = root / f"{table.id}.html"
    write_text(path, html(sections, table.title, f"{table.source}. Written {time.strftime('%Y-%m-%d %H:%M %Z')}.", root))
    write_text(root / f"{table.id}.txt", told + "\n")
    write_text(root / f"{found.name}.csv", csv_text(found))
    return told, path, all(row[-1] == SAME for row in found.rows)
