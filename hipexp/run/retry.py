"""``python -m hipexp retry``: go on with runs that failed or were stopped, one after the other, each as its folder's config.yaml says.

Finished samples are kept, as with the same command again. What another process runs is left to it; a run that fails does not stop the
others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hipexp.config.check import check_experiment
from hipexp.config.convert import to_schema
from hipexp.config.schema import ConfigError, Experiment
from hipexp.output import DRY, answer, aside, split_flags
from hipexp.report.listing import UNFINISHED, read_filters
from hipexp.report.runs import Run, find_run, load_runs
from hipexp.run.ledger import classify, is_held
from hipexp.run.point import Load, execute, folder_of, missing_folder, prepare
from hipexp.run.several import load_once
from hipexp.suites.sample import DataMissing

USAGE = (
    "python -m hipexp retry [run …] [class=out_of_memory] [task=…] [--dry-run] [--json|--quiet], where a run is a folder or begins its name"
)


def main(words: list[str]) -> int:
    """Run again what did not finish; 0 if all of it is done now, or is being done elsewhere. ``--dry-run`` only lists it.

    Raises ``ConfigError`` for wrong words, and ``KeyboardInterrupt`` where it is stopped itself.
    """
    flags, words = split_flags(words)
    unknown = [word for word in words if word.startswith("-")]
    if unknown:
        raise ConfigError(f"retry takes no {unknown[0]}: {USAGE}")
    runs = chosen(words)
    nothing = "" if runs else "nothing to retry: no such run failed or was stopped; `python -m hipexp ls` lists all"
    with aside(flags):
        told = retry(runs, dry=DRY in flags)
    answer(flags, nothing, told, "\n".join(one["folder"] for one in told))
    return int(any(one["class"] for one in told))


def chosen(words: Sequence[str]) -> list[Run]:
    """The unfinished runs that words name, all that pass the filters if they name none; runs in progress are among them."""
    filters = read_filters([word for word in words if "=" in word])
    named = [word for word in words if "=" not in word]
    if named and filters:
        raise ConfigError(f"{named[0]} names a run and {next(iter(filters))}=… chooses among all; leave one of them out")
    if named:
        return list({run.folder: run for run in map(find_run, named)}.values())
    return [run for run in load_runs(None, **filters) if run.state in (*UNFINISHED, "running")]


def retry(runs: Sequence[Run], dry: bool = False, load: Load | None = None) -> list[dict[str, Any]]:
    """Go on with ``runs`` in order and tell what became of each; the same as plain data, ``class`` and ``message`` of what fails."""
    load, told = load or load_once(), list[dict[str, Any]]()
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.name}: {run.outcome}, {len(run.samples())} sample(s) finished", flush=True)
        told.append({"folder": str(run.folder), "before": run.outcome, "state": run.state, "class": None, "message": None})
        if run.state == "done":
            continue
        if is_held(run.folder):
            told[-1]["state"] = "running"
            print("  skipped: another process is running it")
            continue
        try:
            experiment = experiment_of(run)
            if not dry:
                prepare(experiment)
                through = Run(execute(experiment, load))
                told[-1] |= {"folder": str(through.folder), "state": through.state}
                print(f"  {outcome(through)}", flush=True)
        except Exception as error:  # whatever a run dies of, the next one has its turn; its own status.json says more
            told[-1] |= {"state": "failed", "class": classify(error), "message": " ".join(str(error).split()) or type(error).__name__}
            print(f"  {told[-1]['class']}: {told[-1]['message']}", flush=True)
    return told


def outcome(run: Run) -> str:
    """What a run that is through has come to."""
    average = run.summary.get("average")
    return run.state if average is None else f"{run.state}: average {average:g}"


def experiment_of(run: Run) -> Experiment:
    """The experiment of a run folder, composed again from its config.yaml.

    Raises ``ConfigError`` if there is none, if this version of hipexp cannot read it, or if it stands for another run by now;
    ``DataMissing`` for a model out of reach.
    """
    again = "run the command that made it again"
    if not run.config:
        raise ConfigError(f"{run.folder / 'config.yaml'} is missing or no YAML; {again}")
    try:
        experiment = to_schema(run.config, Experiment)
        check_experiment(experiment)
        if run.folder.resolve() == missing_folder(experiment).resolve():  # its run key is known when its data or its model are here
            return experiment
        folder = folder_of(experiment)
    except ConfigError as error:
        raise ConfigError(f"{run.folder / 'config.yaml'} is nothing that this version of hipexp can run: {error}") from error
    except DataMissing as error:
        raise DataMissing(f"{run.folder / 'config.yaml'}: {error}") from error
    if folder.resolve() != run.folder.resolve():
        raise ConfigError(
            f"{run.folder / 'config.yaml'} stands for another run now, {folder.name}: the model, the data, this version of hipexp or, for "
            f"times, the machine has changed, or another command made the folder; {again}"
        )
    return experiment
