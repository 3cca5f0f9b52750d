"""Several points in one process: the model is loaded once, and only if something is left to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hipexp.config.check import OFFLOADING
from hipexp.config.compose import compose
from hipexp.config.model import read_facts
from hipexp.config.schema import ConfigError, Experiment, Model
from hipexp.run.identity import model_revision
from hipexp.run.ledger import read_json, read_rows
from hipexp.run.point import check_point, execute, folder_of, load_model, stored

if TYPE_CHECKING:
    from hipexp.hf import Loaded
    from hipexp.run.point import Load


FREE_GROUPS = ("model", "seed", "track", "offload")


@dataclass(frozen=True)
class Named:
    """An experiment point and what to call it in progress lines and tables."""

    name: str
    experiment: Experiment

    def rows(self) -> list[dict[str, Any]]:
        """Its finished samples."""
        return read_rows(folder_of(self.experiment))

    def machine(self) -> str | None:
        """What it ran on; None while nothing has begun."""
        found = read_json(folder_of(self.experiment) / "env.json")
        return f"{found['device']}, {found['threads']} thread(s), torch {found['packages']['torch']}" if found else None

    def summary(self) -> dict[str, Any]:
        """Its ``summary.json``; empty while it is not done."""
        return read_json(folder_of(self.experiment) / "summary.json") if stored(self.experiment) else {}


def refuse_own(command: str, overrides: Sequence[str], free: Sequence[str] = ()) -> None:
    """Refuse overrides of what ``command`` varies itself, so that no table says one thing and shows another.

    Left to the user are model, seed, tracking, the offload of points with a pipeline, and the keys in ``free``. Raises ``ConfigError``.
    """
    for word in overrides:
        key = word.lstrip("+~-").split("=")[0]
        if key not in free and key.split(".")[0] in ("task", "pipeline"):
            allowed = ", ".join((*FREE_GROUPS, *free))
            raise ConfigError(
                f"{word} cannot be changed in `{command}`, which chooses tasks and pipelines itself; left to you are {allowed}"
            )


def compose_named(name: str, words: Sequence[str], overrides: Sequence[str]) -> Named:
    """The point of a command's own ``words`` and the user's ``overrides``; what cannot be offloaded is resident, whatever the offload."""
    experiment = compose([*words, *resident(overrides)])
    if experiment.pipeline is not None and experiment.pipeline.method in OFFLOADING:
        experiment = compose([*words, *overrides])
    return Named(name, experiment)


def resident(overrides: Sequence[str]) -> list[str]:
    """The overrides without those of an offload, which dense attention does not go with."""
    return [word for word in overrides if not word.lstrip("+~-").startswith(("offload=", "offload."))]


def model_line(model: Model) -> str:
    """Which model a table is of."""
    return f"model: {model.name or model.path}, revision {model_revision(model)}"


def trained_length(model: Model) -> int:
    """The trained length of a model on this machine; ``ConfigError`` for one that is still on a hub."""
    facts = read_facts(model)
    if facts is None:
        raise ConfigError(f"model.path={model.path} is on a hub; this command needs a model in a folder")
    return facts.trained_tok


def load_once() -> Load:
    """A ``load`` that keeps the last model, for as long as its files stay the same."""
    kept: dict[str, Any] = {}

    def load(model: Model) -> Loaded:
        asked = (model, model_revision(model))
        if kept.get("of") != asked:
            kept.update(of=asked, loaded=load_model(model))
        return kept["loaded"]

    return load


def run_all(points: Sequence[Named], load: Load | None = None) -> None:
    """Run what is not done yet, in order, telling what comes next. Raises what a run raises; finished points are kept.

    All are checked before the first one runs.
    """
    todo = [point for point in points if not stored(point.experiment)]
    for point in todo:
        check_point(point.experiment)
    load = load or load_once()
    for number, point in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {point.name}", flush=True)
        execute(point.experiment, load)
