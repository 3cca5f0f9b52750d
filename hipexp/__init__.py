"""hipexp: configuration-driven experiments around InfiniteHiP long-context attention.

As a library: ``from hipexp import install, generate, load_runs`` (see ``docs/library.md``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hipexp.library import Answer, Sampling, generate, install
    from hipexp.report.runs import load_runs

__version__ = "0.1.0"
__all__ = ["Answer", "Sampling", "generate", "install", "load_runs"]


def __getattr__(name: str) -> Any:
    """What is imported only when it is asked for: the command line needs no transformers to answer, and stored runs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hipexp.report.runs" if name == "load_runs" else "hipexp.library"), name)
