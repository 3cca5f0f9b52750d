"""``python -m hipexp repro <table>``: a published table beside our numbers, and what differs between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hipexp.config.compose import compose, conf_dir
from hipexp.config.schema import ConfigError
from hipexp.output import DRY, answer, aside, split_flags
from hipexp.report.tables import MISSING, score_text, text_table
from hipexp.run.ledger import make_folder, runs_root, write_text
from hipexp.run.point import stored
from hipexp.run.several import (
    Named,
    compose_named,
    helpers,
    model_line,
    refuse_own,
    resident,
    run_all,
    split_jobs,
    told,
    trained_length,
)


def read_table(name: str) -> dict[str, Any]:
    """The data of a published table, ``conf/experiment/<name>.yaml``. Raises ``ConfigError`` for an unknown one."""
    import yaml

    folder = conf_dir() / "experiment"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"repro {name}: there is no such table; use one of {', '.join(known)}")
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def read_arguments(argv: list[str]) -> tuple[str, str, list[str]]:
    """Table, size, and overrides for every run. Raises ``ConfigError`` without a table."""
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise ConfigError("repro needs the name of a table first, as in `python -m hipexp repro table2 size=needle`")
    sizes = [word.removeprefix("size=") for word in argv[1:] if word.startswith("size=")]
    return argv[0], (sizes or ["needle"])[-1], [word for word in argv[1:] if not word.startswith("size=")]


def points(table: dict[str, Any], size: str, overrides: list[str]) -> dict[tuple[str, int], Named]:
    """Our runs by method and multiple of the trained length. Raises ``ConfigError`` for an unknown size."""
    if size not in table["sizes"]:
        raise ConfigError(f"size={size} is not there for this table; use one of {', '.join(table['sizes'])}")
    chosen = any(word.lstrip("+-").startswith("model=") for word in overrides)
    own_size = [word for word in table["sizes"][size]["overrides"] if not (chosen and word.startswith("model="))]
    common = ["task=infbench", f"task.subtasks=[{','.join(table['columns'].values())}]", *own_size]
    trained_tok = trained_length(compose([*common, *resident(overrides)]).model)
    found = {}
    for times in table["sizes"][size]["times"]:
        for row in table["rows"]:
            own = [word.format(trained_tok=trained_tok) for word in row["overrides"]]
            name = f"{row['method']}, {times} × the trained length ({times * trained_tok} tokens)"
            found[row["method"], times] = compose_named(name, [*common, f"task.length_tok={times * trained_tok}", *own], overrides)
    return found


def triple(values: list[float] | None) -> str:
    """The scores of one row in one cell."""
    return MISSING if values is None else " / ".join(f"{value:.1f}" for value in values)


def page(table: dict[str, Any], runs: dict[tuple[str, int], Named], trained_tok: int) -> str:
    """Published scores and ours, side by side, and every known difference."""
    samples = next(iter(runs.values())).experiment.task.samples
    multiples = list(dict.fromkeys(times for _, times in runs))
    models = [f"published: {name}" for name in table["models"]]
    header = ["method", *models, *(f"hipexp: {times}× ({times * trained_tok} tokens)" for times in multiples)]
    rows = []
    for row in table["rows"]:
        published = [triple(row["published"].get(model)) for model in table["models"]]
        rows.append([row["method"], *published, *(ours(table, runs[row["method"], times]) for times in multiples)])
    return "\n".join(
        [
            f"{table['title']} ({table['source']}); scores {' / '.join(table['columns'])}",
            "",
            text_table(header, rows),
            "",
            model_line(next(iter(runs.values())).experiment.model),
            "",
            "In brackets: 95 % interval of the mean of our samples.",
            "The published and the hipexp columns are NOT comparable number by number:",
            *(f"  - {line.format(samples=samples, points=f'{100 / samples:g}')}" for line in table["differs"]),
            f"Left out: {table['left_out']}.",
        ]
    )


def ours(table: dict[str, Any], run: Named) -> str:
    """Our scores in one cell, each with its interval, in the order of the table's columns."""
    scores = run.summary().get("scores")
    if not scores:
        return MISSING
    return " / ".join(score_text(cell["score"], cell.get("interval")) for cell in (scores[name] for name in table["columns"].values()))


def main(argv: list[str]) -> int:
    """Run what is missing of a table and print it beside the published one; resumable. ``jobs=``: processes that share it.

    ``--dry-run`` lists the runs and runs nothing.
    """
    flags, words = split_flags(argv)
    jobs, words = split_jobs(words)
    name, size, overrides = read_arguments(words)
    refuse_own("repro", overrides, free=("task.samples",))
    table = read_table(name)
    runs = points(table, size, overrides)
    if DRY in flags:
        rows = [[run.name, "done" if stored(run.experiment) else "to do", len(run.rows())] for run in runs.values()]
        answer(flags, text_table(["run", "state", "samples"], rows, left=2), told(runs.values()), "")
        return 0
    with aside(flags), helpers(list(runs.values()), jobs, runs_root() / "repro"):
        run_all(list(runs.values()))
    text = page(table, runs, trained_length(next(iter(runs.values())).experiment.model))
    path: Path = runs_root() / "repro" / f"{name}_{size}.txt"
    make_folder(path.parent)
    write_text(path, text + "\n")
    answer(flags, f"{text}\n{path}", told(runs.values(), table=path), str(path))
    return 0
