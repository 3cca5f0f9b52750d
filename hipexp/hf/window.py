"""The window of transformers releases that hipexp supports; differences inside it belong into this file."""

from __future__ import annotations

import transformers

FLOOR, CEILING = (5, 16), (6, 0)


def check_transformers() -> None:
    """Raise ImportError if the installed transformers lies outside the supported window."""
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not FLOOR <= found < CEILING:
        raise ImportError(
            f"transformers=={transformers.__version__} is not supported; install transformers>={FLOOR[0]}.{FLOOR[1]},<{CEILING[0]}"
        )
