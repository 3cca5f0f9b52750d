"""From command line words to a checked ``Experiment``. Imports Hydra, never torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from hipexp.config.check import check_experiment
from hipexp.config.convert import to_plain, to_schema
from hipexp.config.overrides import ANY_MODEL, GROUPS, CommandLine, conf_dir, group_options, normalise
from hipexp.config.schema import ConfigError, Experiment

# Hydra 1.4 deprecates version_base; 1.3 warns without it.
VERSION: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}


def read_line(argv: Sequence[str]) -> CommandLine:
    """Command line words in Hydra's form; pipelines that are files are from then on known by their names.

    Raises ConfigError, see ``overrides.normalise``.
    """
    line = normalise(argv, group_options(conf_dir()))
    for name, path in line.files.items():
        with _in_words():
            ConfigStore.instance().store(f"{name}.yaml", _read_pipeline(path), group="pipeline")
    return line


def _read_pipeline(path: Path) -> Any:
    try:
        return OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"pipeline={path} cannot be read ({error}); it must be a YAML file") from error


def compose(argv: Sequence[str]) -> Experiment:
    """The experiment that command line words such as ``+pipeline=3stage`` describe, checked.

    Raises ConfigError for anything that cannot be right, except what depends on the model (see ``check.check_model``).
    """
    line = read_line(argv)
    if line.sweep:
        raise ConfigError("-m runs several points, and one is due here; leave it out")
    if line.show:
        raise ConfigError("--cfg shows one point and runs nothing; it goes with `python -m hipexp` and overrides, not with this command")
    return compose_point(line.overrides)


def compose_point(overrides: Sequence[str]) -> Experiment:
    """Like ``compose``, for overrides in Hydra's form."""
    with _in_words(), hydra.initialize_config_dir(str(conf_dir()), **VERSION):
        config = hydra.compose("config", list(overrides), return_hydra_config=True)
        return _build(config, config.hydra.runtime.choices)


def _build(config: DictConfig, choices: Any) -> Experiment:
    """The checked experiment of a composed config; a part without a name gets the option that was chosen, or its model's."""
    nodes = {str(key): node for key, node in config.items() if key != "hydra"}
    plain = {key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node for key, node in nodes.items()}
    experiment = to_schema(plain, Experiment)
    for group in GROUPS:
        part = getattr(experiment, group)
        if part is not None and not part.name:
            part.name = experiment.model.path.rstrip("/").split("/")[-1] if choices[group] in ANY_MODEL else str(choices[group])
    check_experiment(experiment)
    return experiment


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """The points of a sweep as Hydra's basic sweeper takes them: all combinations, each a list of overrides."""
    with _in_words():
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(point) for point in product(*map(_choices, parsed))]


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError(f"{override.input_line} cannot be listed point by point; write the values with commas") from error


def run_sweep(overrides: Sequence[str], job: Callable[[Callable[[], Experiment], list[str], Path], None], sweep_dir: Path) -> None:
    """Give every point of a sweep to ``job``, through Hydra's launcher: what composes it, its overrides, and Hydra's folder for it.

    Hydra writes its own notes into ``sweep_dir``.
    """

    def task(config: DictConfig) -> None:
        told = HydraConfig.get()
        job(partial(_build, config, told.runtime.choices), list(told.overrides.task), Path(told.runtime.output_dir))

    own = any(word.lstrip("+").startswith("hydra.sweep.dir=") for word in overrides)
    argv, sys.argv = sys.argv, [sys.argv[0], "-m", *overrides, *([] if own else [f"hydra.sweep.dir='{sweep_dir}'"])]
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", **VERSION)(task)()
    finally:
        sys.argv = argv


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML, every field written out."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(experiment)))


@contextmanager
def _in_words() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into ConfigError with their innermost reason."""
    try:
        yield
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name} line {mark.line + 1}" if mark else "a configuration file"
        raise ConfigError(f"{where} is no YAML: {error.problem or error.context}; mend it, or quote what stands there") from error
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        outer, inner = (str(part).strip().split("\n")[0] for part in (error, reason))
        outer = outer.replace("Error merging override ++", "")
        if isinstance(reason, IndexError):
            inner = "there is no entry with this number; they are counted from 0"
        if outer.startswith("Could not delete"):
            inner = outer = f"{outer.rstrip('.')}; --cfg job shows what there is"
        if launcher := re.search(r"Could not find 'hydra/launcher/((joblib|submitit)\w*)'", outer):
            inner = outer = f"hydra/launcher={launcher[1]} is not installed here; run: python -m pip install 'hipexp[launchers]'"
        raise ConfigError(outer if inner in outer else f"{outer}: {inner}") from error
