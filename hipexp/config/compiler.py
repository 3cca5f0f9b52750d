"""Whether torch can compile here. Imports no torch."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from hipexp.config.schema import ConfigError, Model


def missing_compiler() -> str | None:
    """What ``torch.compile`` lacks: it writes C++ that includes Python's headers, and for a GPU Triton compiles such code too."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler"
    return None if Path(sysconfig.get_path("include"), "Python.h").is_file() else "no Python.h"


def check_compiler(model: Model) -> None:
    """Refuse ``model.compile`` where nothing compiles; raises ConfigError."""
    if model.compile and (lacks := missing_compiler()):
        raise ConfigError(
            f"model.compile=true needs a C++ compiler and Python's headers, for a GPU too, and there is {lacks} here; install g++ and "
            "python3-dev, or leave it out"
        )
