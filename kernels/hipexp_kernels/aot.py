"""Compile every Triton kernel for GPUs that need not be here, and compare what it takes with the record: ``python -m hipexp_kernels.aot``.

Prints registers, bytes spilled and bytes of shared memory of every kernel and target. Ends with an error if a kernel does not compile,
spills on ``sm_90`` in a common geometry, takes more shared memory than a program may have, or needs over a tenth more of anything than
``docs/kernels.md`` says (of which ``--record`` writes the table anew). Not within Triton's interpreter: kernels are decorated for one or
the other.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}
SHARED = dict(sm_80=163 << 10, sm_89=99 << 10, sm_90=227 << 10, sm_100=227 << 10, gfx942=64 << 10)  # bytes a program may have
OPS = ("attend_blocks", "gather_kv", "keep_top", "merge_lse", "score_chunks", "summarize")
RECORD = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN = "<!-- written by `python -m hipexp_kernels.aot --record` -->"
SLACK = 1.1  # of what is recorded


@dataclass(frozen=True)
class Geometry:
    """What kernels are compiled for: number format, head dimension, query heads of a key/value head."""

    dtype: str
    dim: int
    group: int

    def __str__(self) -> str:
        return f"{self.dtype} d{self.dim} G{self.group}"


COMMON = (Geometry("bf16", 64, 4), Geometry("bf16", 128, 4))
OTHERS = (Geometry("fp16", 128, 4), Geometry("fp32", 128, 4), Geometry("bf16", 80, 1), Geometry("bf16", 96, 16), Geometry("bf16", 256, 8))


class Case(NamedTuple):
    """A kernel: its name in the table, types of its arguments (``*bf16``, ``i32``, ``i32:16``, or tuples), constants, compiler options."""

    name: str
    kernel: triton.JITFunction
    types: dict
    constants: dict
    options: dict


class Needs(NamedTuple):
    """Registers of a thread, bytes of a thread that are spilled, bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def cases(geometry: Geometry, target: str) -> Iterator[Case]:
    """Every kernel as it is launched for ``geometry`` on ``target``."""
    for op in OPS:
        make = import_module(f"hipexp_kernels.{op}.triton").aot_cases
        for name, *rest in make(geometry.dtype, geometry.dim, geometry.group, target in ("sm_90", "sm_100")):
            yield Case(f"{op} {name}".strip(), *rest)


def needs(case: Case, target: str) -> Needs:
    """Compile a case and say what it takes."""
    types = {name: "constexpr" if name in case.constants else case.types[name] for name in case.kernel.arg_names}
    types, aligned = _aligned(types)
    compiled = triton.compile(ASTSource(case.kernel, types, case.constants, aligned), target=TARGETS[target], options=case.options)
    read = _of_amd if TARGETS[target].backend == "hip" else _of_nvidia
    return Needs(*read(compiled), compiled.metadata.shared)


def _aligned(types: dict) -> tuple[dict, dict]:
    """The types, and which arguments are multiples of 16, as a launch would find them: pointers, and what is marked by ``:16``."""
    attributes = {}

    def plain(kind: str | tuple, *path: int):
        if isinstance(kind, tuple):
            parts = [plain(part, *path, i) for i, part in enumerate(kind)]
            return kind._make(parts) if hasattr(kind, "_make") else tuple(parts)
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[path] = [["tt.divisibility", 16]]
        return kind.removesuffix(":16")

    return {name: plain(kind, at) for at, (name, kind) in enumerate(types.items())}, attributes


def _of_nvidia(compiled) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    own = text.partition(f"Function {compiled.metadata.name}:")[2].strip().splitlines()[0]  # others are called, such as a division
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", own)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _of_amd(compiled) -> tuple[int, int]:
    def number(field: str) -> int:
        return int(re.findall(rf"\.{field}:\s*(\d+)", compiled.asm["amdgcn"])[0])

    return number("vgpr_count"), 4 * number("vgpr_spill_count")


Table = dict[tuple[str, str], dict[str, Needs]]  # (geometry, kernel) -> target -> what it takes


def measure(geometries: tuple[Geometry, ...], targets: list[str]) -> Table:
    """Compile everything, on all processors."""
    jobs = [(geometry, target) for geometry in geometries for target in targets]
    table: Table = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (geometry, target), rows in zip(jobs, pool.map(_measure, jobs), strict=True):
            print(f"{geometry} {target}: {len(rows)} kernels", file=sys.stderr, flush=True)
            for name, found in rows:
                table.setdefault((str(geometry), name), {})[target] = found
    return table


def _measure(job: tuple[Geometry, str]) -> list[tuple[str, Needs]]:
    geometry, target = job
    return [(case.name, needs(case, target)) for case in cases(geometry, target)]


def rendered(table: Table) -> str:
    """The table as Markdown: registers / bytes spilled / bytes of shared memory."""
    targets = [target for target in TARGETS if any(target in row for row in table.values())]
    lines = [f"Triton {triton.__version__}", "", "| for | kernel | " + " | ".join(targets) + " |", "|---|---|" + "---|" * len(targets)]
    for (geometry, name), row in sorted(table.items()):
        cells = (" / ".join(map(str, row[target])) if target in row else "" for target in targets)
        lines.append(f"| {geometry} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def recorded(text: str) -> tuple[str, Table]:
    """The Triton version and the table that a record holds."""
    version = re.search(r"^Triton (\S+)$", text, re.M)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("| ")]
    table: Table = {}
    for geometry, name, *cells in rows[1:]:
        table[geometry, name] = {
            target: Needs(*map(int, cell.split(" / "))) for target, cell in zip(rows[0][2:], cells, strict=True) if cell
        }
    return version[1] if version else "", table


def spills(table: Table) -> list[str]:
    """Common kernels that spill registers on ``sm_90``."""
    common = {str(geometry) for geometry in COMMON}
    found = [(*key, row["sm_90"].spilled) for key, row in table.items() if key[0] in common and "sm_90" in row]
    return [f"{geometry}, {name}, sm_90: {spilled} bytes of registers are spilled" for geometry, name, spilled in found if spilled]


def too_large(table: Table) -> list[str]:
    """Kernels that need more shared memory than a program may have."""
    found = [(*key, target, row[target].shared) for key, row in table.items() for target in row if row[target].shared > SHARED[target]]
    return [f"{geometry}, {name}, {target}: {n} bytes of shared memory, of {SHARED[target]}" for geometry, name, target, n in found]


def faults(table: Table, record: Table) -> list[str]:
    """What needs over a tenth more than on record, or is not on record."""
    out = []
    for (geometry, name), row in table.items():
        for target, found in row.items():
            where = f"{geometry}, {name}, {target}"
            before = record.get((geometry, name), {}).get(target)
            if before is None:
                out.append(f"{where}: not on record; run `python -m hipexp_kernels.aot --record`")
                continue
            out += [
                f"{where}: {field} were {old}, are {new}"
                for field, old, new in zip(Needs._fields, before, found, strict=True)
                if new > SLACK * old
            ]
    return out


def main() -> int:
    """Compile, print, compare; the exit code is 1 if anything is worse than it may be."""
    parser = argparse.ArgumentParser(prog="hipexp_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--common", action="store_true", help=f"only for {' and '.join(map(str, COMMON))}")
    parser.add_argument("--record", action="store_true", help=f"write the table into {RECORD.name}")
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; use {', '.join(TARGETS)}")
    if args.record and (args.targets or args.common):
        parser.error("--record is of everything; leave targets and --common out")
    if not RECORD.is_file():
        parser.error(f"{RECORD} is not there; the record belongs to a checkout of the project")
    text = RECORD.read_text()
    table = measure(COMMON if args.common else COMMON + OTHERS, args.targets or list(TARGETS))
    print(rendered(table))
    if args.record:
        text = text.partition(BEGIN)[0] + BEGIN + "\n\n" + rendered(table)
        RECORD.write_text(text)
    version, record = recorded(text.partition(BEGIN)[2])
    found = spills(table) + too_large(table)
    if version == triton.__version__:
        found += faults(table, record)
    else:
        print(f"not compared: the record is of Triton {version}, this is {triton.__version__}", file=sys.stderr)
    print("\n".join(found) or "nothing common spills on sm_90, all fits, nothing needs over a tenth more than on record", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
