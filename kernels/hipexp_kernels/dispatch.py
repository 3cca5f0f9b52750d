"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Callable


def choose(impl: str, implementations: dict[str, Callable]) -> Callable:
    """Return ``implementations[impl]``; ``auto`` means the fastest one for this device (``vectorized`` on a CPU)."""
    name = "vectorized" if impl == "auto" else impl
    if name not in implementations:
        raise ValueError(f"impl={impl!r} is unknown; use auto, {', '.join(implementations)}")
    return implementations[name]


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)
