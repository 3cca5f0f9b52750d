"""Memory high-water mark of a piece of work."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class PeakMemory:
    """Bytes by which memory rose above its level at :meth:`start`: of the GPU if there is one, else of the process (Linux)."""

    def __init__(self) -> None:
        self.base = 0

    def start(self) -> None:
        """Give freed memory back to the system, forget the old high-water mark, note the level."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # another system: the mark is that of the whole process
        self.base = _status_bytes("VmRSS")

    def peak(self) -> int:
        """Bytes above the level at :meth:`start`; 0 where the system does not tell."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.base
        return max(0, _status_bytes("VmHWM") - self.base)


def _status_bytes(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
