"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from hipexp_kernels.paged import KV


def choose(impl: str, implementations: dict[str, Callable], device: torch.device | None = None) -> Callable:
    """Return ``implementations[impl]``; ``auto`` means the fastest one for tensors on ``device``.

    That is ``triton`` for CUDA tensors where there is one and Triton is installed, else ``vectorized``.
    """
    name = impl
    if impl == "auto":
        on_gpu = device is not None and device.type == "cuda" and "triton" in implementations and has_triton()
        name = "triton" if on_gpu else "vectorized"
    if name not in implementations:
        raise ValueError(f"impl={impl!r} is unknown; use auto, {', '.join(implementations)}")
    return implementations[name]


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def gpu(device: torch.device) -> tuple[int, bool]:
    """How many multiprocessors, and whether they are NVIDIA's of Hopper's kind or newer: over 200 KB of shared memory for a program.

    Graphics cards of newer generations have half as much.
    """
    if device.type != "cuda":
        return 8, True  # the interpreter: a few splits
    found = torch.cuda.get_device_properties(device)
    roomy = torch.version.hip is None and found.major >= 9 and found.shared_memory_per_block_optin > 200 << 10
    return found.multi_processor_count, roomy


def lazy(op: str) -> Callable:
    """The Triton implementation of ``op``, imported when it is called: ``hipexp_kernels/<op>/triton.py``."""

    def run(*args, **kwargs):
        if not has_triton():
            raise ValueError(f"{op}: impl='triton' needs Triton (pip install triton)")
        return getattr(import_module(f"hipexp_kernels.{op}.triton"), op)(*args, **kwargs)

    return run


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def require_triton_can(op: str, x: KV, *, multiplies: bool = True) -> None:
    """Refuse what would run wrongly or crash: CPU tensors without Triton's interpreter, products of bfloat16 within it."""
    from triton import knobs

    if knobs.runtime.interpret:
        wrong = multiplies and x.dtype == torch.bfloat16
        require(not wrong, f"{op}: Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16")
    else:
        require(x.device.type == "cuda", f"{op}: impl='triton' needs CUDA tensors, these are on {x.device} (or set TRITON_INTERPRET=1)")
