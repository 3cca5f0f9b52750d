"""``python -m hipexp.run.record_demo docs`` (``make results``): what the documentation shows of the demo, written from its runs.

That is the picture ``demo.png`` and the table in ``results.md`` between the two marks, with machine and date. Scores only: times depend on
what else a machine does, and are measured on one that does nothing else.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

from hipexp.config.compose import compose
from hipexp.config.schema import ConfigError
from hipexp.report.tables import markdown_table
from hipexp.run.demo import METHODS, TIMES, picture, points
from hipexp.run.ledger import read_json, write_text
from hipexp.run.point import folder_of
from hipexp.run.several import Named, run_all, trained_length

BEGIN, END = "<!-- written by `make results` -->", "<!-- end -->"
SUBTASKS = ("passkey", "number_string", "kv_retrieval")


def score_table(runs: dict[tuple[str, int, str], Named], trained_tok: int) -> str:
    """A row per length and attention, a column per subtask: the mean score and, in brackets, the number of samples."""
    lines = []
    for times in TIMES:
        for method in METHODS:
            rows = [row for (m, t, _), run in runs.items() if (m, t) == (method, times) for row in run.rows()]
            by_name = [[row["score"] for row in rows if row["subtask"].startswith(name)] for name in SUBTASKS]
            cells = [f"{statistics.fmean(scores):.0f} ({len(scores)})" if scores else None for scores in by_name]
            lines.append([f"{times * trained_tok:,}", f"{times}×", "dense" if method == "dense" else f"`{method}`", *cells])
    return markdown_table(["context", "× trained", "attention", *SUBTASKS], lines, left=0)


def section(runs: dict[tuple[str, int, str], Named], trained_tok: int) -> str:
    """The table, on what and when its runs were made."""
    machines = sorted({told for run in runs.values() if (told := run.machine())})
    dates = sorted({read_json(folder_of(run.experiment) / "status.json")["updated"][:10] for run in runs.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{score_table(runs, trained_tok)}\n\n{when}; {'; '.join(machines)}. Score, and in brackets the number of samples; –: not run."


def written(page: str, text: str) -> str:
    """``page`` with ``text`` between the marks. Raises ``ConfigError`` where they are not."""
    if page.count(BEGIN) != 1 or END not in page.split(BEGIN)[1]:
        raise ConfigError(f"the page must have the marks {BEGIN} and {END}, once each; put them where the table shall be")
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page, flags=re.DOTALL)


def main(argv: list[str]) -> int:
    """Run what is missing of the demo, and write its table and picture into the folder ``argv`` names."""
    if len(argv) != 1 or not (Path(argv[0]) / "results.md").is_file():
        raise ConfigError("record_demo takes the folder of the documentation, as in `python -m hipexp.run.record_demo docs`")
    page, runs = Path(argv[0]) / "results.md", points([])
    trained_tok = trained_length(compose(["task=passkey"]).model)
    run_all(list(runs.values()))
    write_text(page, written(page.read_text(encoding="utf-8"), section(runs, trained_tok)))
    picture(page.parent / "demo.png", runs, trained_tok)
    print(f"{page}\n{page.parent / 'demo.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
