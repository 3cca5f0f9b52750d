"""Whether torch can compile here. Imports no torch."""

from __future__ import annotations

import shutil


def missing_compiler() -> str | None:
    """What ``torch.compile`` lacks: it writes C++, for a GPU too."""
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler"
