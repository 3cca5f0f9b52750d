"""Where the keys and values of a layer go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where the keys and values of a layer go; sizes in tokens.

    ``unit_tok``: of a unit, which all heads share or (``per_head``) each has for itself; ``page_tok``: of a page, in whole units.
    ``device_tok``: sinks, window, a page and the pool, keys and values. ``host_tok``: in host memory, None if all; what is beyond goes to
    disk. ``format`` and ``policy`` as in ``Offload``.
    """

    unit_tok: int
    per_head: bool
    sink_tok: int
    window_tok: int
    page_tok: int
    device_tok: int
    host_tok: int | None = None
    format: str = "auto"
    policy: str = "clock"

    @property
    def newest_tok(self) -> int:
        """The most newest tokens that stay on the device between two steps."""
        return self.window_tok + self.page_tok

    @property
    def pool_tok(self) -> int:
        """Tokens for which the pool has room, keys and values."""
        return self.device_tok - self.sink_tok - self.newest_tok
