"""``python -m hipexp report``: all runs as one HTML file, with figures and tables beside it."""

from __future__ import annotations

import time
from pathlib import Path

from hipexp.config.schema import ConfigError
from hipexp.output import answer, split_flags
from hipexp.report import accuracy, costs, provenance
from hipexp.report.export import export
from hipexp.report.gather import Gathered, gather
from hipexp.report.naming import name_runs
from hipexp.report.page import page
from hipexp.report.parts import Section
from hipexp.run.ledger import make_folder, runs_root, write_text

KEYS = ("out", "runs")


def main(argv: list[str]) -> int:
    """Write the report of ``runs=`` (the runs folder) into ``out=`` (``<runs>/report``) and print its path last."""
    flags, words = split_flags(argv)
    chosen = read_words(words)
    root = Path(chosen.get("runs") or runs_root()).expanduser()
    out = Path(chosen.get("out") or root / "report").expanduser()
    gathered = gather(root)
    sections = sections_of(gathered)
    make_folder(out)
    export(sections, out)
    counted = len(gathered.counted)
    about = (
        f"{len(gathered.runs)} runs under {root}, {counted} of them finished and counted, {len(gathered.runs) - counted} not. "
        f"Written {time.strftime('%Y-%m-%d %H:%M %Z')}. Tables as CSV and LaTeX, and figures as PNG, SVG and PDF, lie beside this file."
    )
    path = out / "report.html"
    write_text(path, page(sections, f"hipexp: {root.resolve().name}", about, out))
    told = {"report": str(path), "runs": len(gathered.runs), "counted": counted}
    answer(flags, f"{about.partition('. ')[0]}\n{path}", told, str(path))
    return 0


def read_words(argv: list[str]) -> dict[str, str]:
    """``key=value`` words of the command line. Raises ``ConfigError`` for any other."""
    chosen = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if key not in KEYS or not equals or not value:
            raise ConfigError(f"report takes no {word!r}; only out=<folder>, runs=<folder>, --json and --quiet")
        chosen[key] = value
    return chosen


def sections_of(gathered: Gathered) -> list[Section]:
    """Every section of the report, in order."""
    name_runs(gathered.runs)
    scores = accuracy.scores_of(gathered)
    return [
        accuracy.leaderboard(scores),
        accuracy.over_length(scores),
        costs.latency(gathered),
        accuracy.against_time(scores),
        accuracy.depths(scores),
        costs.recall(gathered),
        costs.traffic(gathered),
        provenance.excluded(gathered),
        provenance.protocols(gathered),
    ]
