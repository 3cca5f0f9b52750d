"""``repro … --dry-run``: the runs of a table, and what each of them still needs, without asking any network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hipexp.config.model import model_folder
from hipexp.config.schema import Experiment, Model
from hipexp.report.tables import text_table
from hipexp.repro.data import FULL, Published
from hipexp.repro.estimate import estimate, prompts
from hipexp.repro.points import cells, longest, points_of, size_of, stand_ins
from hipexp.suites import lacking, rules_of


def plan_of(table: Published, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What would run at a size, and what is missing for it. Composes every point; raises ``ConfigError``."""
    told: dict[str, Any] = {"id": table.id, "title": table.title, "size": name, "runs": [], "missing": []}
    if table.settings:
        return told | {"says": f"{len(table.settings)} printed hyperparameters against presets; nothing is run"}
    points = points_of(cells(table, name, overrides))
    for point in points:
        task = point.experiment.task
        of = "attention alone" if task.geometry else point.experiment.model.path
        size = {"tokens": longest(point.experiment), "samples": samples_of(point.experiment)}
        told["runs"].append({"run": point.name, "model": of, "task": task.name} | size)
        told["missing"] += [what for what in missing_of(point.experiment) if what not in told["missing"]]
    if name == FULL:
        found = estimate(points)
        told |= {"gpu_hours": found.gpu_hours, "memory_gb": found.memory_gb}
    return told | {"says": size_of(table, name).says}


def plan_text(plan: dict[str, Any]) -> str:
    """A plan in words."""
    head = f"{plan['id']}: {plan['title']}, size={plan['size']}: {plan['says']}"
    if not plan["runs"]:
        return head
    keys = ["run", "model", "task", "tokens", "samples"]
    rows = [[number, *(run[key] or "the data's" for key in keys)] for number, run in enumerate(plan["runs"], 1)]
    told = [head, text_table(["", *keys], rows, left=2)]
    if (hours := plan.get("gpu_hours")) is not None:
        told.append(
            f"estimate for one NVIDIA H200 (docs/reproduce.md says how): {hours:{'.0f' if hours >= 100 else '.2g'}} GPU hours, "
            f"{plan['memory_gb']:.0f} GB of GPU memory besides activations"
        )
    needed = [f"- {what}" for what in plan["missing"]] or ["- nothing: all of it is here"]
    return "\n".join([*told, "missing:", *needed])


def samples_of(experiment: Experiment) -> str:
    """How many samples of how many subtasks a run has; of published data, which have more of one than of another, all."""
    task = experiment.task
    if task.name == "latency":
        return f"{task.repeats} rounds"
    if rules_of(task, None):
        return f"{sum(count for count, _ in prompts(experiment))} in {len(task.subtasks or [])}"
    return f"{task.samples} × {len(task.subtasks)}" if task.subtasks else str(task.samples)


def missing_of(experiment: Experiment) -> list[str]:
    """What a run needs that is not on this machine: weights, data, packages."""
    found = []
    task = experiment.task
    if task.geometry is None and not is_here(experiment.model):
        found.append(f"weights of {experiment.model.path}: hf download {experiment.model.path}")
    if task.data == str(stand_ins()) and not Path(task.data).is_dir():
        return found  # made when the table is run
    return [*found, *(f"{task.name}: {what}" for what in lacking(task))]


def is_here(model: Model) -> bool:
    """Whether the configuration of a model is on this machine: in a folder, or in the cache of the hub's client."""
    if model_folder(model) is not None:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model.path, "config.json", revision=model.revision), str)
