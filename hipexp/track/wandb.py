"""The Weights & Biases tracker. The only importer of wandb."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean
from typing import Any

from hipexp.config.schema import Track
from hipexp.config.wandb_key import has_wandb_key
from hipexp.track.metrics import metrics_of


def in_sweep() -> bool:
    """Whether a sweep agent started this process: it then owns the run's id."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def mode_of(track: Track) -> str:
    """wandb's mode; ``auto`` is what WANDB_MODE says, else online where wandb has an API key, else offline."""
    if track.mode != "auto":
        return track.mode
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


class WandbTracker:
    """Follows a run in wandb; see ``hipexp.track.Tracker``.

    Outside a sweep the run's id is made from the run key, so that a resumed run goes on in the same wandb run; in a sweep
    wandb takes it from the agent's environment. Whether wandb is installed is checked with the configuration.
    """

    def __init__(self, track: Track):
        import wandb

        self._wandb: Any = wandb
        self._run: Any = None
        self._track = track

    def start(self, folder: Path, config: dict[str, Any], card: dict[str, Any]) -> None:
        own = {} if in_sweep() else {"id": config["run_key"][:10], "resume": "allow", "name": folder.name}
        self._run = self._wandb.init(
            project=self._track.project,
            entity=self._track.entity,
            mode=mode_of(self._track),
            dir=str(folder),
            config={**config, "card": card},
            job_type=folder.parent.name,
            **own,
        )

    def log(self, row: dict[str, Any], means: dict[str, float]) -> None:
        times = {name: row[name] for name in ("prefill_ms", "decode_ms") if row.get(name) is not None}
        running = {f"running/{name}": mean for name, mean in means.items()}
        # What a sweep's early_terminate can watch: `average` itself comes once, when all samples are done.
        average = {"running/average": fmean(means.values())} if means else {}
        self._run.log({**running, **average, **{f"sample/{name}": value for name, value in times.items()}})

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        if summary is None:
            self._run.finish(exit_code=1)
            return
        columns = ["subtask", "metric", "score", "n", "protocol", "edition"]
        how = summary["protocol"], summary.get("edition", "")
        rows = [[name, *(cell[column] for column in columns[1:4]), *how] for name, cell in summary["scores"].items()]
        tables = {"scores": self._wandb.Table(columns=columns, data=rows)}
        if measured := summary["latency"].get("rows"):
            names = list(dict.fromkeys(name for row in measured for name, value in row.items() if not isinstance(value, (dict, list))))
            tables["latency_rows"] = self._wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in measured])
        self._run.log(tables | {p.stem: self._wandb.Image(str(p)) for p in pictures})
        whole = {name: summary[name] for name in ("protocol", "latency", "memory")}  # wandb itself makes latency.prefill_ms of them
        own = {name: value for name, value in metrics_of(summary).items() if not name.startswith(("latency.", "memory."))}
        self._run.summary.update(own | whole)
        self._run.finish()
