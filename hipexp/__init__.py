"""hipexp: configuration-driven experiments around InfiniteHiP long-context attention.

As a library: ``from hipexp import install, generate`` (see ``docs/library.md``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hipexp.library import Answer, Sampling, generate, install

__version__ = "0.1.0"
__all__ = ["Answer", "Sampling", "generate", "install"]


def __getattr__(name: str) -> Any:
    """What is imported only when it is asked for: the command line needs no transformers to answer."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hipexp.library"), name)
