"""From command line words to a checked ``Experiment``. Imports Hydra, never torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hipexp.config.check import PACKAGE, check_experiment
from hipexp.config.overrides import DENSE, GROUPS, CommandLine, field_type, normalise
from hipexp.config.schema import ConfigError, Experiment

# Hydra 1.4 deprecates version_base; 1.3 warns without it.
VERSION_BASE: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}
ConfigStore.instance().store(name="experiment_schema", node=Experiment)


def conf_dir() -> Path:
    """The folder of configuration files: ``$HIPEXP_CONF``, the copy inside an installed package, or the checkout's ``conf/``.

    Raises ConfigError if there is no ``config.yaml`` in it.
    """
    shipped = PACKAGE / "_conf"
    folder = Path(os.environ.get("HIPEXP_CONF") or (shipped if shipped.is_dir() else PACKAGE.parent / "conf")).expanduser().resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"HIPEXP_CONF={folder} must be a folder with a config.yaml in it; unset HIPEXP_CONF to use the one of hipexp")
    return folder


def group_options(folder: Path) -> dict[str, list[str]]:
    """What each configuration group offers: the names of its files."""
    return {group: sorted(path.stem for path in (folder / group).glob("*.yaml")) for group in GROUPS}


def compose(argv: Sequence[str]) -> Experiment:
    """The experiment that command line words such as ``+pipeline=3stage`` describe, checked.

    Raises ConfigError for anything that cannot be right and is not a matter of the model (see ``check.check_model``).
    """
    line = normalise(argv, group_options(conf_dir()))
    if line.flags:
        raise ConfigError(f"{line.flags[0]} is for the command line only; here every word is key=value")
    return compose_point(line.overrides)


def compose_point(overrides: Sequence[str]) -> Experiment:
    """Like ``compose`` for overrides that are in Hydra's form already."""
    with in_words(), hydra.initialize_config_dir(str(conf_dir()), **VERSION_BASE):
        config = hydra.compose("config", list(overrides), return_hydra_config=True)
        choices = dict(config.hydra.runtime.choices)
        del config._metadata.flags["struct"]
        config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return build(config, choices)


def build(config: DictConfig, choices: dict[str, Any]) -> Experiment:
    """The checked experiment in a composed config; ``choices`` (group → option) name what has no name of its own.

    Raises ConfigError.
    """
    refuse_unknown(config)
    with in_words():
        experiment = OmegaConf.to_object(config)
    assert isinstance(experiment, Experiment)
    for group in GROUPS:
        part = getattr(experiment, group)
        if part is not None and not part.name:
            part.name = str(choices[group])
    check_experiment(experiment)
    return experiment
