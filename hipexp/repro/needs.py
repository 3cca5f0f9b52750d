"""``repro … --dry-run``: the runs of a table, and what each of them still needs, without asking any network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hipexp.config.model import model_folder
from hipexp.config.schema import ConfigError, Experiment, Model
from hipexp.report.tables import text_table
from hipexp.repro.data import FULL, Published
from hipexp.repro.estimate import estimate
from hipexp.repro.points import cells, longest, points_of, size_of, stand_ins
from hipexp.suites import origins
from hipexp.suites.sample import DataMissing


def dry_run(table: Published, name: str, overrides: Sequence[str]) -> str:
    """What would run at a size, in a table, and what is missing for it. Composes every point; raises ``ConfigError``."""
    if table.settings:
        return f"{table.id}: {len(table.settings)} printed hyperparameters against presets; nothing is run"
    size, rows, missing = size_of(table, name), [], dict[str, None]()
    points = points_of(cells(table, name, overrides))
    for number, point in enumerate(points, 1):
        task = point.experiment.task
        of = "attention alone" if task.geometry else point.experiment.model.path
        tokens = longest(point.experiment)
        rows.append([number, point.name, of, task.name, tokens or "the data's", samples_of(point.experiment)])
        missing |= dict.fromkeys(missing_of(point.experiment))
    needed = [f"- {what}" for what in missing] or ["- nothing: all of it is here"]
    told = []
    if name == FULL:
        found = estimate(points)
        told.append(
            f"estimate for one NVIDIA H200 (docs/reproduce.md says how): {found.gpu_hours:.2g} GPU hours, "
            f"{found.memory_gb:.0f} GB of GPU memory besides activations"
        )
    head = f"{table.id}: {table.title}, size={name}: {size.says}"
    return "\n".join([head, text_table(["", "run", "model", "task", "tokens", "samples"], rows, left=2), *told, "missing:", *needed])


def samples_of(experiment: Experiment) -> str:
    """How many samples of how many subtasks a run has at most."""
    task = experiment.task
    if task.name == "latency":
        return f"{task.repeats} rounds"
    return f"{task.samples} × {len(task.subtasks)}" if task.subtasks else str(task.samples)


def missing_of(experiment: Experiment) -> list[str]:
    """What a run needs that is not on this machine: weights, data, packages."""
    found = []
    task = experiment.task
    if task.geometry is None and not is_here(experiment.model):
        found.append(f"weights of {experiment.model.path}: hf download {experiment.model.path}")
    if task.data == str(stand_ins()) and not Path(task.data).is_dir():
        return found  # made when the table is run
    try:
        origins(task)
    except (DataMissing, ConfigError) as error:
        found.append(f"{task.name}: {error}")
    return found


def is_here(model: Model) -> bool:
    """Whether the configuration of a model is on this machine: in a folder, or in the cache of the hub's client."""
    if model_folder(model) is not None:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.path, "config.json", revision=model.revision), str)
