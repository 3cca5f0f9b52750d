"""``python -m hipexp ls``: every run and what became of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hipexp.config.schema import ConfigError
from hipexp.report.tables import text_table
from hipexp.run.ledger import is_done, is_held, read_json, read_rows, runs_root


def state_of(folder: Path) -> str:
    """What became of a run: done, running, failed with its class, or stopped or damaged (the same command continues it)."""
    status = read_json(folder / "status.json")
    match status.get("state"):
        case "running":
            return "running" if is_held(folder) else "stopped"
        case "failed":
            return f"failed: {status.get('class', 'error')}"
        case "done" if is_done(folder, status.get("run_key", "")):
            return "done"
    return "damaged"


def list_runs(root: Path) -> list[dict[str, Any]]:
    """One record per run folder under ``root``, oldest first."""
    runs = []
    for path in root.glob("*/*/status.json"):
        folder, status = path.parent, read_json(path)
        summary = read_json(folder / "summary.json")
        record = {"task": folder.parent.name, "run": folder.name, "state": state_of(folder), "samples": len(read_rows(folder))}
        record |= {"average": summary.get("average"), "protocol": summary.get("protocol")}
        runs.append(record | {"updated": str(status.get("updated", "")), "folder": str(folder)})
    return sorted(runs, key=lambda run: run["updated"])


def main(argv: list[str]) -> int:
    """List the runs; ``--json`` prints them as JSON."""
    unknown = [word for word in argv if word != "--json"]
    if unknown:
        raise ConfigError(f"ls takes no argument {unknown[0]!r}; only --json")
    runs = list_runs(runs_root())
    if "--json" in argv:
        print(json.dumps(runs, indent=2))
    elif not runs:
        print(f"no runs under {runs_root()} yet")
    else:
        columns = ["task", "run", "state", "samples", "average", "protocol", "updated"]
        print(text_table(columns, [[run[column] for column in columns] for run in runs], left=3))
    return 0
