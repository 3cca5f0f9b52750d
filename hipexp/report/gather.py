"""All runs of a folder, read once: what became of each, under which protocol it scored, and its samples in DuckDB.

Only finished runs whose records are whole are counted; every other run keeps its reason in ``Run.problem``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipexp.config.schema import ConfigError, Task
from hipexp.report.listing import state_in_words
from hipexp.report.runs import Run as Folder
from hipexp.run.ledger import read_json, read_rows
from hipexp.suites import rules_of

if TYPE_CHECKING:
    import duckdb

LOG = logging.getLogger("hipexp")
NOT_WHOLE = "move its folder away and run the same command again"
# Fields of a card that say how a score was made; those by subtask count for their subtask only. Left out: how many samples there were,
# what truncation removed from them, the strategy, and versions that no prompt and no scorer depend on.
CARD_WIDE = ("suite", "protocol", "edition", "wording", "scorer", "data", "stops", "decoding", "chat_template", "note")
BY_SUBTASK = ("template", "metric", "new_tok", "length_tok")
MODEL = ("revision", "dtype", "trained_tok")


@dataclass
class Run:
    """One run folder. ``problem`` is empty for a run that counts, else why it does not; ``label`` names its attention in the report."""

    folder: Path
    state: str
    status: dict[str, Any]
    summary: dict[str, Any]
    card: dict[str, Any]
    config: dict[str, Any]
    env: dict[str, Any]
    problem: str = ""
    label: str = ""
    n_samples: int = 0

    @property
    def task(self) -> str:
        return str(self.summary.get("task") or self.config.get("task", {}).get("name") or self.folder.parent.name)

    @property
    def model(self) -> str:
        model, task = self.config.get("model", {}), self.config.get("task", {})
        return str(self.summary.get("model") or task.get("geometry") or model.get("name") or model.get("path") or "not known")

    @property
    def attention(self) -> str:
        """Preset or method of the pipeline, ``dense``, or ``served`` for a server's own."""
        if "pipeline" in self.summary:
            return self.summary["pipeline"] or "dense"
        if (self.config.get("model") or {}).get("base_url"):
            return "served"
        pipeline = self.config.get("pipeline") or {}
        return str(pipeline.get("name") or pipeline.get("method") or ("dense" if self.config else "not known"))

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
        return str(self.env.get("device", "not known"))

    @property
    def updated(self) -> str:
        return str(self.status.get("updated", ""))

    @property
    def tags(self) -> dict[str, str]:
        """What the page filters by."""
        return {"task": self.task, "model": self.model, "protocol": self.protocol}


@dataclass
class Gathered:
    """All runs, and the samples of those that count: ``query`` runs SQL over the table ``samples``.

    ``samples`` has a row for every sample: ``run`` (place in ``runs``), the columns of ``records.parquet``, ``pid`` (the protocol of the
    subtask) and ``dense``.
    """

    root: Path
    runs: list[Run]
    connection: duckdb.DuckDBPyConnection = field(repr=False)

    def query(self, sql: str) -> list[dict[str, Any]]:
        """The rows of an answer, by column."""
        found = self.connection.execute(sql)
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    @property
    def counted(self) -> list[Run]:
        return [run for run in self.runs if not run.problem]


def gather(root: Path) -> Gathered:
    """Read every run under ``root``. Raises ``ConfigError`` if there is none, or duckdb is not installed."""
    folders = sorted({path.parent for name in ("status.json", "samples.jsonl") for path in root.glob(f"*/*/{name}")})
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


def read_run(folder: Path) -> Run:
    """The files of one run folder, and whether it counts."""
    state = state_in_words(Folder(folder))
    names = ("status.json", "summary.json", "card.json", "env.json")
    status, summary, card, env = (read_json(folder / name) for name in names)
    run = Run(folder, state, status, summary, card, read_config(folder / "config.yaml"), env)
    if state != "done":
        run.n_samples = len(read_rows(folder))
        run.problem = status.get("message", "") if state.startswith("failed") else ""
        run.problem = run.problem or {"damaged": f"files of it are missing or damaged; {NOT_WHOLE}"}.get(state, "not finished")
    elif not run.config:
        run.problem = f"config.yaml is damaged; {NOT_WHOLE}"
    elif not (folder / "records.parquet").exists():
        run.problem = f"there is no records.parquet (pyarrow was missing when it ran); install pyarrow, {NOT_WHOLE}"
    return run


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration of a run; empty if it is missing or damaged."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) and all(isinstance(data.get(name), dict) for name in ("model", "task")) else {}


def _load(connection: duckdb.DuckDBPyConnection, runs: Sequence[Run]) -> None:
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
    connection.register("files", pa.table({"run": numbers, "filename": paths, "updated": [runs[n].updated for n in numbers]}))
    records = "read_parquet(?, union_by_name=true, filename=true)"
    named = connection.execute(f"SELECT DISTINCT run, subtask FROM {records} JOIN files USING (filename)", [list(paths)]).fetchall()
    protocols = [(n, name, protocol_id(runs[n], name), runs[n].is_dense) for n, name in named]
    columns = zip(("run", "subtask", "pid", "dense"), zip(*protocols, strict=True), strict=True)
    connection.register("protocols", pa.table(dict(columns)))
    joined = f"{records} JOIN files USING (filename) JOIN protocols USING (run, subtask)"
    connection.execute(f"CREATE TABLE samples AS SELECT * EXCLUDE (filename) FROM {joined}", [list(paths)])


def protocol_id(run: Run, subtask: str) -> str:
    """What two samples of a subtask must share to be compared: model, prompts, data, cut, decoding and scorer, as a short hash."""
    shared = protocol_of(run)
    for name in BY_SUBTASK:
        values = run.card.get(name) or {}
        shared[name] = values.get(subtask, values)
    return digest(shared)


def protocol_of(run: Run) -> dict[str, Any]:
    """The part of a protocol that holds for all subtasks of a run."""
    card, model = run.card, run.card.get("model") or {}
    told = {name: card.get(name) for name in CARD_WIDE} | {name: model.get(name) for name in (*MODEL, "served", "geometry")}
    told |= {"model": run.model, "cut": (card.get("truncation") or {}).get("rule")}
    return told | {"seed": seed_of(run), "data_folder": run.config["task"].get("data")}


def seed_of(run: Run) -> int | None:
    """The seed that samples were drawn with; None for published rows, which nobody draws."""
    task = run.config["task"]
    known = {name: task[name] for name in ("name", "protocol", "edition") if name in task}
    if known.get("name") in ("recall", "latency"):
        return run.config.get("seed")
    return None if rules_of(Task(**known), None) else run.config.get("seed")


def family_id(run: Run) -> str:
    """What runs share that make one curve over length: the protocol, but for lengths and numbers of samples."""
    shared = protocol_of(run)
    words = str(shared["data"])
    numbers = {str(number) for name in ("length_tok", "samples") for number in (run.card.get(name) or {}).values()}
    for number in numbers:
        words = words.replace(f"/{number}", "/#").replace(f" of {number}", " of #")
    shared |= {"data": words, "subtasks": sorted(plain_names(run))}
    shared["template"] = sorted({str(value) for value in (run.card.get("template") or {}).values()})
    return digest(shared)


def plain_names(run: Run) -> set[str]:
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
