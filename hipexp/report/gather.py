"""All runs of a folder, read once: what became of each, under which protocol it scored, and its samples in DuckDB.

Only finished runs whose records are whole are counted; every other run keeps its reason in ``Entry.problem``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ConfigError, Task
from hipexp.report.differences import binding
from hipexp.report.runs import Run, run_folders
from hipexp.suites import rules_of

if TYPE_CHECKING:
    import duckdb

LOG = logging.getLogger("hipexp")
NOT_WHOLE = "move its folder away and run the same command again"
SAME_MODEL = ("dtype", "trained_tok")  # a difference to dense is one of attention alone


@dataclass(eq=False)
class Entry(Run):
    """A run in the report. ``problem`` is empty for one that counts, else why it does not; ``label`` names its attention there."""

    problem: str = ""
    label: str = ""
    n_samples: int = 0

    @property
    def attention(self) -> str:
        """Preset or method of the pipeline, ``dense``, or ``served`` for a server's own."""
        return "served" if (self.config.get("model") or {}).get("base_url") else self.pipeline if self.config else "not known"

    @property
    def offload(self) -> str:
        return str((self.config.get("offload") or {}).get("name", "none"))

    @property
    def is_dense(self) -> bool:
        """Whether others may be compared to it: every token is attended to, at full precision."""
        return self.attention == "dense" and self.offload == "none"

    @property
    def protocol(self) -> str:
        return str(self.card.get("protocol", "not known"))

    @property
    def device(self) -> str:
        return str(self.environment.get("device", "not known"))

    @property
    def machine(self) -> tuple[str, int | str]:
        """Device and number of threads."""
        return self.device, self.environment.get("threads", "unknown")

    @property
    def tags(self) -> dict[str, str]:
        """What the page filters by."""
        return {"task": self.task, "model": self.model or "not known", "protocol": self.protocol}


@dataclass
class Gathered:
    """All runs, and the samples of those that count: ``query`` runs SQL over the table ``samples``.

    ``samples`` has a row for every sample: ``run`` (place in ``runs``), the columns of ``records.parquet``, ``pid`` (the protocol of the
    subtask) and ``dense``.
    """

    root: Path
    runs: list[Entry]
    connection: duckdb.DuckDBPyConnection = field(repr=False)

    def query(self, sql: str) -> list[dict[str, Any]]:
        """The rows of an answer, by column."""
        found = self.connection.execute(sql)
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    @property
    def counted(self) -> list[Entry]:
        return [run for run in self.runs if not run.problem]


def gather(root: Path) -> Gathered:
    """Read every run under ``root``. Raises ``ConfigError`` if there is none, or duckdb is not installed."""
    folders = run_folders(root)
    if not folders:
        raise ConfigError(
            f"runs={root} must be a folder with runs (<task>/<run>/status.json), and has none; make one with "
            "`python -m hipexp +pipeline=3stage task=infbench`, or name another folder: report runs=<folder>"
        )
    try:
        import duckdb
    except ImportError:
        raise ConfigError("duckdb is not installed, and the report needs it; `pip install duckdb`, or `make setup` in a checkout") from None
    runs = [read_run(folder) for folder in folders]
    connection = duckdb.connect()
    _load(connection, runs)
    return Gathered(root, runs, connection)


def read_run(folder: Path) -> Entry:
    """One run folder, and whether it counts."""
    run = Entry(folder)
    if run.state != "done":
        run.n_samples = len(run.samples())
        run.problem = run.status.get("message", "") if run.state == "failed" else ""
        run.problem = run.problem or {"damaged": f"files of it are missing or damaged; {NOT_WHOLE}"}.get(run.state, "not finished")
    elif not run.config or not run.card:
        run.problem = f"{'card.json' if run.config else 'config.yaml'} is damaged; {NOT_WHOLE}"
    elif not (folder / "records.parquet").exists():
        run.problem = f"there is no records.parquet (pyarrow was missing when it ran); install pyarrow, {NOT_WHOLE}"
    return run


def _load(connection: duckdb.DuckDBPyConnection, runs: Sequence[Entry]) -> None:
    """Make the table ``samples`` of all runs whose records can be read and are complete; the others get a problem."""
    import duckdb
    import pyarrow as pa

    whole: list[tuple[int, str]] = []
    for number, run in enumerate(runs):
        if run.problem:
            continue
        path, expected = str(run.folder / "records.parquet"), run.status.get("finished")
        try:
            [found] = connection.execute("SELECT count(*), count_if(status = 'done') FROM read_parquet(?)", [path]).fetchall()
        except duckdb.Error as error:
            run.problem = f"records.parquet cannot be read ({str(error).splitlines()[0]}); {NOT_WHOLE}"
            continue
        run.n_samples = found[1]
        if found != (expected, expected):
            run.problem = f"records.parquet holds {found[1]} finished samples of {expected}: nothing is scored from a part; {NOT_WHOLE}"
        else:
            whole.append((number, path))
    if not whole:
        connection.execute("CREATE TABLE samples AS SELECT * FROM (SELECT 0 AS run, '' AS subtask) WHERE false")
        return
    numbers, paths = zip(*whole, strict=True)
    connection.register("files", pa.table({"run": numbers, "filename": paths, "changed": [runs[n].changed for n in numbers]}))
    records = "read_parquet(?, union_by_name=true, filename=true)"
    named = connection.execute(f"SELECT DISTINCT run, subtask FROM {records} JOIN files USING (filename)", [list(paths)]).fetchall()
    protocols = [(n, name, protocol_id(runs[n], name), runs[n].is_dense) for n, name in named]
    columns = zip(("run", "subtask", "pid", "dense"), zip(*protocols, strict=True), strict=True)
    connection.register("protocols", pa.table(dict(columns)))
    joined = f"{records} JOIN files USING (filename) JOIN protocols USING (run, subtask)"
    connection.execute(f"CREATE TABLE samples AS SELECT * EXCLUDE (filename) FROM {joined}", [list(paths)])


def protocol_id(run: Entry, subtask: str) -> str:
    """What two samples of a subtask must share for a difference to dense, as a short hash: what ``compare`` asks for, model, and dtype."""
    return digest(_shared(run, (subtask,)))


def _shared(run: Entry, subtasks: Sequence[str]) -> dict[str, Any]:
    model = run.card.get("model") or {}
    return binding(run.card, subtasks) | {"name": run.model, "same": [model.get(name) for name in SAME_MODEL], "seed": seed_of(run)}


def seed_of(run: Entry) -> int | None:
    """The seed that samples were drawn with; None for published rows, which nobody draws."""
    task = run.config["task"]
    known = {name: task[name] for name in ("name", "protocol", "edition") if name in task}
    if known.get("name") in ("recall", "latency"):
        return run.config.get("seed")
    return None if rules_of(Task(**known), None) else run.config.get("seed")


def family_id(run: Entry) -> str:
    """What runs share that make one curve over length: the protocol, but for lengths and numbers of samples."""
    numbers = {str(number) for name in ("length_tok", "samples") for number in (run.card.get(name) or {}).values()}
    data = re.sub(r"\d+", lambda found: "#" if found[0] in numbers else found[0], str(run.card.get("data")))
    templates = sorted({str(value) for value in (run.card.get("template") or {}).values()})
    return digest(_shared(run, ()) | {"data": data, "subtasks": sorted(plain_names(run)), "template": templates})


def plain_names(run: Entry) -> set[str]:
    """The subtasks of a run without lengths and divisors behind ``@``."""
    return {name.partition("@")[0] for name in run.card.get("metric") or {}}


def digest(data: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:8]


def groups_of(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    """Items by a key, groups in the order of their first item."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
