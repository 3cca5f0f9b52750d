"""Compile an operation's kernels for GPUs that are not here, and say what they need: ``python triton_aot.py attend_blocks [sm_90 ...]``.

Not within the interpreter: kernels are decorated for one or the other.
"""

import re
import subprocess
import sys
import tempfile
from importlib import import_module
from inspect import signature
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}


def aligned(kinds):
    """Pointers and 64-bit strides are multiples of 16, as a launch would find them."""
    attrs = {}
    for at, kind in enumerate(kinds.values()):
        for path, leaf in [((at, i), x) for i, x in enumerate(kind)] if isinstance(kind, tuple) else [((at,), kind)]:
            if leaf.startswith("*") or leaf == "i64":
                attrs[path] = [["tt.divisibility", 16]]
    return attrs


def compiled(case, target):
    """The compiled kernel of a case ``(name, kernel, signature, constexprs, options)`` of ``aot_cases``."""
    _, kernel, kinds, constants, options = case
    kinds = {name: kinds[name] for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, kinds, constants, aligned(kinds)), target=target, options=options)


def resources(kernel):
    """Registers, bytes of spills and of shared memory, as ``cuobjdump`` reads them from an NVIDIA binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"Function {kernel.metadata.name}:\s*(.*)", text).group(1)  # others are called, such as a division
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}
    return dict(registers=found["REG"], spilled=found["STACK"] + found["LOCAL"], shared=kernel.metadata.shared)


def cases(op, target):
    """What the operation compiles for a target; some have other tile sizes before Hopper."""
    make = import_module(f"hipexp_kernels.{op}.triton").aot_cases
    return make(hopper=target in ("sm_90", "sm_100")) if "hopper" in signature(make).parameters else make()


def main(op, *names):
    for name in names or TARGETS:
        for case in cases(op, name):
            kernel = compiled(case, TARGETS[name])
            print(case[0], name, resources(kernel) if "cubin" in kernel.asm else dict(shared=kernel.metadata.shared), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
